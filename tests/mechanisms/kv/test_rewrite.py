"""Rows made with other weights are refused, and computed anew from the ids that a memory keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import InputError, MemoryMismatchError
from tests.mechanisms.kv.memories import decoder, logits, text, tokenizer, wrapped
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

REFUSED = r"weights of the base model have changed: compute them anew .* memory.rewrite\(\)"


def changed(model: Any, part: str = "mlp") -> Any:
    """The same model, other weights in ``part`` of the first layer: rows of the layers behind it are others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"layers.0.{part}" in name:
                parameter.mul_(1.5)
    return model


def told(memory: Any) -> Any:
    """Three sources, one of which was forgotten, so that clocks have a gap."""
    for turn in range(3):
        memory.write(text(11, turn), f"s{turn}")
    memory.forget("s1")
    memory.write(text(5, 7), "s0")
    return memory


def content(memory: Any, row: int = 0) -> dict[str, Any]:
    """Everything a stream holds, in plain numbers."""
    state, store = memory.states[row], memory.stores[row]
    rows = [store.gather(layer, store.ids(layer)).columns() for layer in range(store.layout.layers)]
    columns = [{name: column.tolist() for name, column in part.items()} for part in rows]
    table = {name: tensor.tolist() for name, tensor in state.tensors().items()}
    return {"rows": columns, "clock": state.clock, "sources": list(state.sources.items()), **table}


def rows_of(memory: Any) -> list[Any]:
    return [part["projected"] for part in content(memory)["rows"]]


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
@pytest.mark.parametrize("context", [0, 1])
def test_it_is_what_writing_with_the_new_weights_gives(part: str, context: int) -> None:
    model = wrapped(context_chunks=context)
    memory, prompt = told(model.new_memory(seed=1)), text(6, 2)[None]
    before = content(memory)
    changed(model, part)
    for refused in (lambda: logits(model, prompt, memory), lambda: memory.write(text(8, 9))):
        with pytest.raises(MemoryMismatchError, match=REFUSED):
            refused()
    report = memory.rewrite()
    again = told(model.new_memory(seed=1))
    after = content(memory)
    assert rows_of(memory) == rows_of(again)
    assert after["begin_rows"] == content(again)["begin_rows"]
    assert all(after[name] == value for name, value in before.items() if name not in ("rows", "begin_rows"))
    births = [[part["birth"] for part in one["rows"]] for one in (before, after)]
    assert births[0] == births[1]
    assert torch.equal(logits(model, prompt, memory), logits(model, prompt, again))
    assert (report.tokens, report.chunks) == ([27], [5])
    memory.write(text(8, 9))


def test_it_is_durable_and_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    with mplus.Memory.open(tmp_path / "memory", model, seed=1) as memory:
        told(memory)
        before, engine = content(memory), model.mplus_engine
        changed(model)
        write, calls = type(engine).write, []

        def broken(self: Any, *given: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("cut off")
            return write(self, *given)

        monkeypatch.setattr(type(engine), "write", broken)
        with pytest.raises(RuntimeError, match="cut off"):
            memory.rewrite()
        monkeypatch.undo()
        assert content(memory) == before
    with mplus.Memory.open(tmp_path / "memory", model) as memory:
        assert content(memory) == before
        with pytest.raises(MemoryMismatchError, match=REFUSED):
            logits(model, text(6, 2)[None], memory)
        memory.rewrite()
        after = content(memory)
    assert after["rows"] != before["rows"]
    with mplus.Memory.open(tmp_path / "memory", model) as memory:
        assert content(memory) == after
        assert rows_of(memory) == rows_of(told(model.new_memory(seed=1)))


def test_it_becomes_the_memory_of_another_model(tmp_path: Path) -> None:
    model, tuned = wrapped(), changed(wrapped())
    memory, prompt = told(model.new_memory(seed=1)), text(6, 2)[None]
    memory.save(tmp_path / "saved")
    memory.rewrite(tuned)
    assert memory.engine is tuned.mplus_engine
    expected = logits(tuned, prompt, told(tuned.new_memory(seed=1)))
    assert torch.equal(logits(tuned, prompt, memory), expected)
    loaded = mplus.Memory.load(tmp_path / "saved", tuned)
    with pytest.raises(MemoryMismatchError, match=REFUSED):
        logits(tuned, prompt, loaded)
    loaded.rewrite()
    assert torch.equal(logits(tuned, prompt, loaded), expected)


def test_access_times_stay_with_their_rows() -> None:
    model = wrapped(eviction="lru")
    memory = told(model.new_memory(seed=1))
    logits(model, text(6, 2)[None], memory)
    (notes,), (store,) = memory.streams.access_logs, memory.stores
    before = notes.times(0, store.ids(0)).tolist()
    assert len(set(before)) > 1
    memory.rewrite()
    (notes,), (store,) = memory.streams.access_logs, memory.stores
    assert notes.times(0, store.ids(0)).tolist() == before


def test_other_architectures_and_mechanisms_are_refused() -> None:
    memory = told(wrapped().new_memory())
    with pytest.raises(MemoryMismatchError, match="so write the texts to a memory of that model"):
        memory.rewrite(wrapped("gpt2"))
    with pytest.raises(MemoryMismatchError, match="needs a decoder wrapped"):
        memory.rewrite(torch.nn.Linear(1, 1))


def test_a_memory_that_keeps_its_texts_is_written_anew() -> None:
    model = tiny.build(memory_rows="projected")
    memory = model.new_memory(keep_text=True, seed=1)
    memory.write(text(40, 1), "a")
    changed(model, "self_attn")
    with pytest.raises(MemoryMismatchError, match=r"memory.rewrite\(\)"):
        logits(model, text(6, 2)[None], memory)
    memory.rewrite()
    again = model.new_memory(keep_text=True, seed=1)
    again.write(text(40, 1), "a")
    assert torch.equal(logits(model, text(6, 2)[None], memory), logits(model, text(6, 2)[None], again))
    with pytest.raises(InputError, match=r"which memories .* 'mplus' keep with new_memory\(keep_text=True\)"):
        model.new_memory().rewrite()


def test_what_chunks_are_found_by_is_computed_anew_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path))
    model = mplus.wrap(decoder(), {"mechanism": "kv", "chunk_tokens": 24, "retriever": "hidden"})
    made = model.new_memory(tokenizer=tokenizer(), keep_text=True, seed=1)
    made.write("The key is under the stone.", "a")
    made.write("The blue stone is under the key.", "b")
    before: Any = made.states[0]
    assert before.chunk_key.shape[1]
    rebuilt = made.fork()
    rebuilt.tokenizer = None
    rebuilt.forget("a", mode="rebuild")
    again: Any = rebuilt.states[0]
    assert torch.equal(again.calibration, before.calibration)
    torch.testing.assert_close(again.chunk_key, before.chunk_key[1:], rtol=0, atol=tiny.rounding())
    changed(model)
    without = made.fork()
    without.tokenizer = None
    with pytest.raises(InputError, match=r"set memory.tokenizer before memory.rewrite\(\)"):
        without.rewrite()
    made.rewrite()
    fresh = model.new_memory(tokenizer=tokenizer(), seed=1)
    fresh.write("The key is under the stone.", "a")
    fresh.write("The blue stone is under the key.", "b")
    after: Any = made.states[0]
    wanted: Any = fresh.states[0]
    assert torch.equal(after.calibration, wanted.calibration)
    assert torch.equal(after.chunk_key, wanted.chunk_key)
    assert not torch.equal(after.chunk_key, before.chunk_key)
