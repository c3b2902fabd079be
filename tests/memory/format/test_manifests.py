"""A manifest whose digest is right and whose content is not is refused as a whole, by file, field, rule and value."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

from mplus.config import MPlusConfig
from mplus.errors import ConfigError, MemoryFileError
from mplus.memory import Memory
from mplus.memory.format import manifest as manifests
from mplus.memory.format.entries import LayoutEntry, layout_from
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.save import layout_entry
from mplus.memory.format.structure import structured, unstructured
from mplus.memory.format.verify import verify
from mplus.stores.base import StoreLayout
from tests.memory.disks.plain import PlainModel, chunk, reopened

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = PlainModel(mechanism={"name": "mplus", "merge_every": 2})
INFINITY = float("inf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    with Memory.open(folder / "live", MODEL, batch_size=2) as memory:
        for number in range(6):
            memory.write([chunk(number)] * 2, source=f"source {number % 2}")
        memory.save(folder / "saved")
    return {name: folder / name for name in ("live", "saved")}


def forged(folder: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with another manifest, its digest made to fit."""
    shutil.copytree(folder, copy)
    file = copy / "manifest.json"
    plain = json.loads(file.read_text())
    change(plain)
    plain["digest"] = manifests._digest(plain)
    file.write_text(json.dumps(plain))
    return copy


def stream(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["streams"][1].update(changes)


def rows(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["streams"][1]["rows"].update(changes)


def field(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain.update(changes)


def layout(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["layout"].update(changes)


def fact(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["fingerprint"].update(changes)


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    """With one tensor under another name."""
    return lambda plain: plain["data"]["tensors"].update({name: plain["data"]["tensors"]["stream.0.generator"]})


WHOLE = "must be a whole number"
BOTH: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (stream(clock=INFINITY), f"{WHOLE}, got inf @ manifest.streams[1].clock"),
    (stream(clock=3.0), f"{WHOLE}, got 3.0 @ manifest.streams[1].clock"),
    (stream(clock=True), f"{WHOLE}, got True @ manifest.streams[1].clock"),
    (stream(clock="3"), f"{WHOLE}, got '3' @ manifest.streams[1].clock"),
    (stream(clock=None), f"{WHOLE}, got None @ manifest.streams[1].clock"),
    (stream(clock=2**63), f"{WHOLE}, got 9223372036854775808 @ manifest.streams[1].clock"),
    (stream(clock=-1), "clock must be a whole number from 0 to 4398046511104, got -1 @ manifest.streams[1]"),
    (stream(sources=-1), "sources must be a whole number from 0"),
    (stream(sources=[["a", 1, 1]]), f"{WHOLE}, got [['a', 1, 1]] @ manifest.streams[1].sources"),
    (stream(sources=3), "streams[1].sources must be at most next_source, 2, got 3"),
    (stream(sources=1), "must have 1 sources, got 2"),
    (stream(next_source=INFINITY), f"{WHOLE}, got inf @ manifest.streams[1].next_source"),
    (stream(ltm=[1, 2]), "streams[1].ltm must count the rows of 3 layers, got [1, 2]"),
    (stream(ltm=[1, 2, INFINITY]), f"{WHOLE}, got inf @ manifest.streams[1].ltm[2]"),
    (stream(ltm=7), "must be a list"),
    (stream(rows=7), "must be a table"),
    (stream(rows={}), "must hold only tensors of a memory of 2 streams, got 'stream.1.rows."),
    (rows(stm=[0.5, 1, 1]), f"{WHOLE}, got 0.5 @ manifest.streams[1].rows['stm'][0]"),
    (rows(stm=[True, 1, 1]), f"{WHOLE}, got True @ manifest.streams[1].rows['stm'][0]"),
    (rows(stm=[-1, 1, 1]), "rows must be a whole number from 0"),
    (rows(stm=[]), "rows must count the rows of every part of 'stm', got none"),
    (rows(stm=[1] * 4), "streams[1].rows['stm'] must count the rows of at most 3 layers, got [1, 1, 1, 1]"),
    (rows(stm=[1] * 2), "must hold only tensors of a memory of 2 streams, got 'stream.1.rows."),
    (rows(**{"../x": [1]}), "rows must be like '<word>', got '../x'"),
    (stream(store=2), "streams[1].store must be below 2, got 2"),
    (stream(mechanism="memoryllm"), "streams[1].mechanism must be that of the fingerprint, 'mplus', got 'memoryllm'"),
    (stream(mechanism=None), "must be a text, got None @ manifest.streams[1].mechanism"),
    (stream(color="blue"), "there is no field 'color' @ manifest.streams[1]"),
    (field(later=1), "there is no field 'later' @ manifest"),
    (field(earlier=[]), "there is no field 'earlier' @ manifest"),
    (field(streams=[]), "streams must have at least one entry, got none"),
    (field(streams=[7]), "must be a table of fields, got 7 @ manifest.streams[0]"),
    (field(bytes_budget=0), "bytes_budget must be a whole number from 1"),
    (field(fingerprint=[]), "must be a table"),
    (field(eviction=7), "eviction must name a component"),
    (
        lambda plain: plain["fingerprint"].update(memory_tokens_per_chunk=INFINITY),
        "must be a whole number of at least 1",
    ),
    (fact(mechanism=7), "fingerprint must name a component"),
    (lambda plain: plain.pop("layout"), "is missing @ manifest.layout"),
    (layout(layers=INFINITY), f"{WHOLE}, got inf @ manifest.layout.layers"),
    (layout(layers=0), "layers must be a whole number from 1"),
    (layout(expiry=1), "must be true or false, got 1 @ manifest.layout.expiry"),
    (layout(dtype="complex64"), "dtype must be one of float64, float32"),
    (layout(dtype="__name__"), "got '__name__'"),
]
LIVE = [
    (field(number=-1), "number must be a whole number from 0"),
    (field(journal="../journal-1.bin"), "journal must be like 'journal-<id>-<n>.bin', got '../journal-1.bin'"),
    (field(journal="manifest.json"), "got 'manifest.json'"),
    (field(store={"inner": "mmap"}), "store must name a component"),
    (lambda plain: plain["state"].update(file="lock"), "state.file must be like"),
    (lambda plain: plain["state"].update(sha256="x"), "state.sha256 must be like '<64 hex digits>', got 'x'"),
    (lambda plain: plain["state"].update(bytes=8), "state must have the bytes of"),
    (lambda plain: plain["state"].update(bytes=INFINITY), f"{WHOLE}, got inf @ manifest.state.bytes"),
    (lambda plain: plain["stores"].pop(), "there must be one store for each stream, got 1 and 2"),
    (lambda plain: plain["stores"][0].update(next_ids=[1]), "stores[0].next_ids must have 3 entries, got 1"),
    (lambda plain: plain["stores"][0].update(next_ids=[-1, 0, 0]), "next_ids must be a whole number from 0"),
    (lambda plain: plain["stores"][0].update(files=[]), "stores[0] must have the bytes of"),
    (lambda plain: plain["stores"][0]["files"][0].update(file="/etc/passwd"), "files[0].file must be like"),
    (stream(ltm=[2**40] * 3), "stores[1] must have the bytes of"),
    (rows(stm=[2**40] * 3), "state must have the bytes of"),
    (stream(store=0), "streams[1].store must be 1, got 0"),
]
SAVED = [
    (field(capacity=-1), "capacity must be a whole number from 0"),
    (lambda plain: plain["data"].update(file="../x.safetensors"), "file must be like 'rows-<n>.safetensors'"),
    (lambda plain: plain["data"].update(bytes=16), "data.tensors must fit into the 16 bytes of"),
    (lambda plain: plain["data"]["tensors"]["stream.0.generator"].update(shape=[INFINITY]), "got inf @ manifest.data"),
    (lambda plain: plain["data"]["tensors"]["stream.0.generator"].update(shape=[2**40]), "data.tensors must fit"),
    (lambda plain: plain["data"]["tensors"]["stream.0.generator"].update(dtype="nothing"), "dtype must be one of"),
    (stream(store=0, ltm=[1, 2, 3]), "streams[1].ltm must be that of the stream whose store it shares"),
    (
        lambda plain: plain["data"]["tensors"].update(
            {"stream.7.generator": plain["data"]["tensors"]["stream.0.generator"]}
        ),
        "got 'stream.7.generator': it was altered, or written by a newer mplus",
    ),
    (
        lambda plain: plain["data"]["tensors"].update(
            {"stream.0.plan": plain["data"]["tensors"]["stream.0.generator"]}
        ),
        "got 'stream.0.plan': it was altered, or written by a newer mplus",
    ),
]
CASES = [("live", *case) for case in [*BOTH, *LIVE]] + [("saved", *case) for case in [*BOTH, *SAVED]]


@pytest.mark.parametrize(
    ("kind", "change", "message"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_is_refused_by_whoever_reads_it(
    kind: str, change: Callable[[dict[str, Any]], object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = forged(folders[kind], tmp_path / "forged", change)
    with pytest.raises(MemoryFileError, match=re.escape(message)) as caught:
        reopened(folder, MODEL) if kind == "live" else Memory.load(folder, MODEL)
    assert str(folder) in str(caught.value)
    assert any(message in fault for fault in verify(folder))
    for read in (
        saved_sources,
        lambda path: forget_saved(path, "source 0"),
        lambda path: repair(path, tmp_path / "out"),
    ):
        try:
            read(folder)
        except MemoryFileError as error:
            assert str(folder) in str(error)  # noqa: PT017 - what one does not need it may not look at


@pytest.mark.parametrize("kind", ["live", "saved"])
@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"\xff\xfe{}", b'{"format": "\xff"}', b"1" * 5000],
    ids=["deep list", "deep table", "900 levels", "UTF-16", "not UTF-8", "a large number"],
)
def test_other_files(kind: str, content: bytes, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "other")
    (folder / "manifest.json").write_bytes(content)
    for read in (lambda: reopened(folder, MODEL), lambda: Memory.load(folder, MODEL), lambda: saved_sources(folder)):
        with pytest.raises(MemoryFileError, match=re.escape(str(folder))):
            read()
    assert verify(folder) != []


@pytest.mark.parametrize("depth", [100, 900])
def test_a_manifest_of_many_levels(folders: dict[str, Path], tmp_path: Path, depth: int) -> None:
    """Deep enough to be read and too deep to be looked at."""
    folder = shutil.copytree(folders["saved"], tmp_path / "deep")
    plain = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(
        plain.replace('"eviction": ', f'"eviction": {"[" * depth}{"]" * depth}, "x": ')
    )
    with pytest.raises(MemoryFileError, match="must hold JSON"):
        Memory.load(folder, MODEL)
    assert verify(folder) != []


@pytest.mark.parametrize("name", ["config.json", "config.toml"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"a=" + b"[" * 100_000, b'{"store": ' + b"[" * 940 + b"]" * 940 + b"}"]
)
def test_a_config_file_that_is_none(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError):
        MPlusConfig.from_file(tmp_path / name)


def test_the_dtype_of_keys_is_kept_where_it_is_another_one() -> None:
    layout = StoreLayout(layers=1, hidden_size=4, key_size=2, dtype=torch.bfloat16, key_dtype=torch.float32)
    entry = layout_entry(layout)
    assert layout_from(structured(unstructured(entry), LayoutEntry, "manifest")) == layout
    assert "key_dtype" not in unstructured(layout_entry(evolve(layout, key_dtype=None)))
