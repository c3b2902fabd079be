"""``mplus info``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired, TypedDict, cast

import typer

import mplus
from mplus.cli.output import print_json

if TYPE_CHECKING:
    import torch

    from mplus.config import JsonValue

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "accelerate")
OPTIONAL = ("bitsandbytes", "bm25s", "faiss-cpu", "faiss-gpu", "matplotlib", "triton")


class BackendFacts(TypedDict):
    """A backend on a device, and whether it runs there."""

    backend: str
    device: str
    dtype: str
    usable: bool
    reason: str | None


class Facts(TypedDict):
    """The output of ``mplus info``."""

    versions: dict[str, str | None]
    devices: list[dict[str, str]]
    implementations: dict[str, list[str]]
    backends: list[BackendFacts]
    model: NotRequired[list[str]]


def info(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder of a saved decoder with memory: load it and show what was chosen for it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON instead.")] = False,
) -> None:
    """Show versions, devices, registered implementations, and which attention backends run on which device.

    What to add to a bug report. With MODEL, also the technique, positions and sizes of its memory, and what the
    self-check finds.
    """
    facts = gather()
    if model is not None:
        facts["model"] = described(model)
    if as_json:
        print_json(cast("JsonValue", facts))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    for name, value in facts["versions"].items():
        table.add_row(name, value or "not installed")
    for device in facts["devices"]:
        table.add_row(device["name"], escape(device["description"]))
    for kind, names in facts["implementations"].items():
        table.add_row(kind, escape(", ".join(names)))
    for entry in facts["backends"]:
        where = f"{entry['device']}, {entry['dtype']}"
        verdict = "runs" if entry["usable"] else f"cannot run: {entry['reason']}"
        table.add_row(escape(f"backend {entry['backend']}"), escape(f"{where}: {verdict}"))
    for line in facts.get("model", []):
        name, _, value = line.partition(": ")
        table.add_row(escape(name), escape(value))
    Console(highlight=False).print(table)


def gather() -> Facts:
    """Return all of it as plain data."""
    from mplus.cli.plugins import registries

    found = devices()
    versions: dict[str, str | None] = {"mplus": mplus.__version__, "python": platform.python_version()}
    for package in PACKAGES + OPTIONAL:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "devices": found,
        "implementations": {registry.kind: registry.names() for registry in registries()},
        "backends": [entry for device in found for entry in backends_on(device["name"])],
    }


def described(model: Path) -> list[str]:
    """Return the lines of a saved decoder's ``mplus_summary``."""
    from mplus.hf.pretrained.load import from_pretrained, without_bars

    with without_bars():
        summary: str = from_pretrained(model).mplus_summary()
    return summary.splitlines()


def devices() -> list[dict[str, str]]:
    """Return the CPU and every accelerator torch sees, as torch calls them, described."""
    import torch

    found = [{"name": "cpu", "description": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = [] if accelerator is None else [accelerator.type] * torch.accelerator.device_count()
    for index, kind in enumerate(kinds):
        description = kind
        if kind == "cuda":
            facts = torch.cuda.get_device_properties(index)
            description = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
        found.append({"name": f"{kind}:{index}", "description": description})
    return found


def backends_on(device: str) -> list[BackendFacts]:
    """Return for every backend whether it runs on a device, in the dtype models usually have there, and if not why."""
    import torch

    from mplus.backends import BACKENDS

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: list[BackendFacts] = []
    for name in BACKENDS.names():
        reason = _why_not(name, torch.device(device), dtype)
        found.append(
            {
                "backend": name,
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "usable": reason is None,
                "reason": reason,
            }
        )
    return found


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run a small causal request with memory; None: it did."""
    import torch

    from mplus.backends import BACKENDS
    from mplus.backends.base import AttentionRequest, Segment

    try:
        backend = BACKENDS.get(name)()
        heads = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)
        memory = (Segment(heads, heads),)
        request = AttentionRequest(queries=heads, keys=heads, values=heads, scale=0.125, segments=memory)
        reasons = backend.unsupported_reasons(request)
        if reasons:
            return "; ".join(reasons)
        backend.attend(request)
    except Exception as error:  # noqa: BLE001 - a backend may fail in any way; that is what is asked
        return f"{type(error).__name__}: {error}"
    return None
