"""Rows kept projected: read as hidden states would be, never computed twice, and never stale."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.comparisons import TOLERANCE, error
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, K, Pair, retrofit
from mplus.errors import ConfigError, InputError, MemoryMismatchError, NotSupported
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.projection import Projection

pytestmark = pytest.mark.two_computations


@pytest.fixture(scope="module")
def shared() -> Pair:
    return retrofit(BY_NAME["llama"])


@pytest.fixture
def pair() -> Pair:
    """A decoder of its own, whose weights may be changed."""
    return retrofit(BY_NAME["llama"])


def written(pair: Pair, rows: str, chunks: int = 6, seed: int = 0, **options: Any) -> mplus.Memory:
    memory = pair.wrapped.new_memory(memory_rows=rows, seed=seed, **options)
    memory.write(pair.text(chunks * CHUNK, seed=100 + seed)[0], source="text")
    return memory


@torch.no_grad()
def logits(pair: Pair, memory: mplus.Memory, tokens: int = 9) -> torch.Tensor:
    return pair.wrapped(input_ids=pair.text(tokens).expand(memory.batch_size, -1), memory=memory).logits


class TestChoice:
    def test_auto_is_the_smaller_one(self) -> None:
        """In the tiny Llama keys and values are as wide as hidden states; with one head of keys they are half."""
        llama = BY_NAME["llama"]
        assert retrofit(llama).wrapped.mplus_engine.memory_rows == "hidden"
        narrow = dataclasses.replace(llama, options={**llama.options, "num_key_value_heads": 1})
        assert retrofit(narrow).wrapped.mplus_engine.memory_rows == "projected"
        layout = retrofit(narrow).wrapped.new_memory().stores[0].layout
        assert (layout.projected_size, layout.keeps_hidden) == (16, False)
        assert retrofit(narrow, variant="published").wrapped.mplus_engine.memory_rows == "hidden"

    @pytest.mark.parametrize("name", ["bloom", "hunyuan", "deepseek-v3", "llama-dynamic"])
    def test_a_decoder_whose_rows_cannot_be_kept_projected_says_why(self, name: str) -> None:
        wrapped = retrofit(BY_NAME[name]).wrapped
        reason = wrapped.mplus_engine.projection
        assert isinstance(reason, str)
        assert wrapped.new_memory().stores[0].layout.keeps_hidden
        with pytest.raises(NotSupported, match="memory_rows='both' cannot be had") as error:
            wrapped.new_memory(memory_rows="both")
        assert reason in str(error.value)
        with pytest.raises(NotSupported, match="memory_rows='projected' cannot be had"):
            retrofit(BY_NAME[name], memory_rows="projected")

    def test_other_words_are_refused(self, shared: Pair) -> None:
        with pytest.raises(ConfigError, match="memory_rows must be 'projected', 'hidden' or 'both', got 'keys'"):
            shared.wrapped.new_memory(memory_rows="keys")
        with pytest.raises(ConfigError, match="memory_rows must be one of"):
            mplus.MPlusConfig(memory_rows="keys")  # type: ignore[arg-type]


class TestReading:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "cohere2", "gpt-oss", "smollm3", "gemma3", "qwen3"])
    @pytest.mark.parametrize("chunks", [1, 6])
    def test_is_that_of_hidden_states(self, name: str, chunks: int) -> None:
        """Half-split, interleaved, narrow and no rotation; rotations that differ between layers; normed keys."""
        pair = retrofit(BY_NAME[name])
        found = [logits(pair, written(pair, rows, chunks)) for rows in ("hidden", "projected", "both")]
        assert error(found[1], found[0]) <= TOLERANCE
        assert torch.equal(found[2], found[1])

    @pytest.mark.parametrize(
        "layout",
        [{"memory_positions": "compressed", "position_span": 5}, {}, {"memory_positions": "constant"}],
        ids=str,
    )
    def test_streams_of_unequal_length(self, layout: dict[str, Any]) -> None:
        """Each as alone, wherever memory sits."""
        pair = retrofit(BY_NAME["llama"], **layout)
        texts = [pair.text(70)[0], pair.text(16)[0], None]
        found = {}
        for rows in ("hidden", "projected"):
            memory = pair.wrapped.new_memory(3, memory_rows=rows, seed=1)
            memory.write(texts)
            found[rows] = logits(pair, memory)
            for row in range(3):
                alone = logits(pair, memory.select([row]))
                assert error(alone[0], found[rows][row]) <= TOLERANCE
        assert error(found["projected"], found["hidden"]) <= TOLERANCE

    def test_copies_of_a_stream_share_its_short_term_rows(self, shared: Pair) -> None:
        memory = written(shared, "projected").select([0, 0, 0])
        found = logits(shared, memory)
        assert error(found[2], found[0]) <= TOLERANCE
        engine = shared.wrapped.mplus_engine
        prepared = engine.prepared(memory, memory.version, engine.watch.look())
        assert [segment.keys.shape[0] for segment in prepared.short_term.values()] == [1, 1, 1]

    def test_generation_with_beams_and_renewed_retrieval(self, shared: Pair) -> None:
        for options in ({"num_beams": 3}, {"retrieve_every": 2}):
            made = [
                shared.wrapped.generate(
                    shared.text(5), memory=written(shared, rows), max_new_tokens=7, do_sample=False, **options
                )
                for rows in ("hidden", "projected")
            ]
            assert torch.equal(*made)

    def test_after_short_chunks_and_forgetting(self, shared: Pair) -> None:
        """The next write reads the newest rows, as it would where all have hidden states."""
        found = []
        for rows in ("hidden", "projected"):
            memory = written(shared, rows, chunks=2)
            for seed, tokens in enumerate((2, 1, CHUNK, 3)):
                memory.write_chunk(shared.text(tokens, seed=seed), source=f"piece {seed}")
            memory.forget("piece 1")
            memory.write_chunk(shared.text(2, seed=9))
            found.append(logits(shared, memory))
        assert error(*found) <= TOLERANCE

    def test_when_the_newest_rows_are_forgotten_the_next_write_reads_what_is_left_of_them(self, shared: Pair) -> None:
        memory = written(shared, "projected", chunks=2)
        memory.write_chunk(shared.text(1, seed=1), source="short")  # encodes older rows again, so all K are its own
        memory.forget("short")
        assert [hidden.shape[0] for hidden in memory.states[0].newest] == [0, 0, 0]
        memory.write(shared.text(CHUNK)[0])
        assert [hidden.shape[0] for hidden in memory.states[0].newest] == [K, K, K]
        assert torch.isfinite(logits(shared, memory)).all()

    def test_numbers_that_are_not_finite_are_refused(self, shared: Pair) -> None:
        memory = written(shared, "projected")
        for rows in (memory.states[0].stm[1], memory.stores[0].slab_layers[1].slabs[0].block.columns):
            column = rows["projected"] if isinstance(rows, dict) else rows.projected
            before = column.clone()
            column[:] = torch.nan
            fresh = memory.fork()
            with pytest.raises(InputError, match="-term memory must be finite"):
                logits(shared, fresh)
            column.copy_(before)


class TestStores:
    def test_rows_in_many_slabs_read_as_in_one(self, shared: Pair) -> None:
        for rows in ("projected", "both"):
            one = written(shared, rows, chunks=8)
            many = written(shared, rows, chunks=8, store={"name": "ram", "slab_rows": 2})
            assert len(many.stores[0].slab_layers[0].slabs) > 4
            for memory in (one, many):
                memory.forget("text") if rows == "both" else None
                memory.write(shared.text(3 * CHUNK, seed=5)[0], source="more")
            assert error(logits(shared, one), logits(shared, many)) <= TOLERANCE

    @pytest.mark.parametrize("form", ["int8", "fp8"])
    def test_rows_in_8_bits_read_almost_as_others(self, shared: Pair, form: str) -> None:
        store = {"name": "quantized", "format": form, "group": 8, "keys": False}  # so that the same rows are retrieved
        for rows in ("projected", "hidden"):
            plain = logits(shared, written(shared, rows))
            found = logits(shared, written(shared, rows, store=store))
            wrong = (found - plain).std() / plain.std()
            assert 0 < wrong < {"int8": 0.02, "fp8": 0.06}[form], f"{wrong:.3g}"


class TestWork:
    @pytest.fixture
    def projected(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Rows that are projected, in order, by whichever way."""
        seen: list[int] = []
        rows, project = Projection.rows, Retrofit.project

        def count_rows(self: Projection, layer: int, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden.shape[0] * hidden.shape[1])
            return rows(self, layer, hidden)

        def count(self: Retrofit, spec: Any, prefix: Any, *args: Any) -> Any:
            seen.append(prefix.hidden.shape[0] * prefix.hidden.shape[1])
            return project(self, spec, prefix, *args)

        monkeypatch.setattr(Projection, "rows", count_rows)
        monkeypatch.setattr(Retrofit, "project", count)
        return seen

    @pytest.mark.parametrize("rows", ["projected", "both"])
    def test_no_read_projects_a_row_again(self, shared: Pair, projected: list[int], rows: str) -> None:
        memory = written(shared, rows)
        made = sum(projected)
        projected.clear()
        logits(shared, memory)
        assert projected == [1, 1, 1], "begin rows, once for each layer"
        projected.clear()
        logits(shared, memory, tokens=5)
        shared.wrapped.generate(shared.text(4), memory=memory, max_new_tokens=4, do_sample=False)
        assert projected == []
        memory.write(shared.text(CHUNK, seed=5)[0])
        writing = sum(projected)
        assert 0 < writing < made
        assert projected.count(K) >= 3, "the new rows of each layer, once"

    def test_hidden_rows_are_projected_by_every_read(self, shared: Pair, projected: list[int]) -> None:
        memory = written(shared, "hidden")
        projected.clear()
        for _ in range(2):
            logits(shared, memory)
        assert sum(projected) == 2 * 3 * Pair.rows(memory.snapshot()[0])

    def test_rotation_is_done_once_for_a_state(self, shared: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        turned: list[int] = []
        before = Projection.turned

        def count(self: Projection, layer: int, parts: Any, tables: Any) -> Any:
            turned.append(sum(part.shape[1] for part in parts))
            return before(self, layer, parts, tables)

        picked = Projection.picked

        def count_picked(self: Projection, layer: int, begin: Any, found: Any, tables: Any) -> Any:
            turned.append(1 + sum(len(places) for _, places in found.parts))
            return picked(self, layer, begin, found, tables)

        monkeypatch.setattr(Projection, "turned", count)
        monkeypatch.setattr(Projection, "picked", count_picked)
        memory = written(shared, "projected")
        logits(shared, memory)
        short_term, front = len(memory.states[0].stm[0]), 1 + 6
        assert sorted(turned) == sorted([front, short_term] * 3)
        turned.clear()
        shared.wrapped.generate(shared.text(4), memory=memory, max_new_tokens=6, do_sample=False)
        assert turned == [front] * 3, "what was retrieved, once for a prompt; nothing for a token"


class TestWeights:
    CHANGED = (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.self_attn.v_proj.lora_B.read.weight",
        "model.layers.0.input_layernorm.weight",
        "mplus.retriever.key_proj.1.0.weight",
    )

    @pytest.mark.parametrize("name", CHANGED)
    def test_one_changed_number_makes_projected_rows_useless(self, pair: Pair, name: str) -> None:
        memory = written(pair, "projected")
        logits(pair, memory)
        with torch.no_grad():
            pair.wrapped.get_parameter(name).flatten()[3] += 0.5
        for call in (lambda: logits(pair, memory), lambda: memory.write(pair.text(CHUNK)[0])):
            with pytest.raises(MemoryMismatchError, match=r"weights .* have changed: write it again"):
                call()
        assert torch.isfinite(logits(pair, written(pair, "projected"))).all()

    @pytest.mark.parametrize("rows", ["both", "hidden"])
    @pytest.mark.parametrize("name", CHANGED)
    def test_rows_with_hidden_states_are_computed_anew(self, pair: Pair, name: str, rows: str) -> None:
        memory = written(pair, rows)
        before, version = logits(pair, memory), memory.version
        with torch.no_grad():
            pair.wrapped.get_parameter(name).mul_(-1.5).add_(0.1)
        after = logits(pair, memory)
        of_keys = "layernorm" in name or "retriever" in name
        assert memory.version == version + (rows == "both" or of_keys), "only what depends on it is computed anew"
        assert error(after, before) > 1e-3
        again = memory.fork()
        for layer, state in enumerate(again.states[0].stm):
            if state.projected is not None:
                anew = pair.wrapped.mplus_engine.project(layer, state.need_hidden()[None])[0]
                assert torch.equal(state.projected, anew)
            stored = again.stores[0].gather(layer, again.stores[0].ids(layer))
            keys = pair.wrapped.mplus_engine.keys(layer, stored.need_hidden())
            assert error(stored.key, keys) <= (0 if memory.version > version else TOLERANCE)
        assert torch.equal(logits(pair, again), after)

    def test_other_weights_do_not_matter(self, pair: Pair) -> None:
        memory = written(pair, "projected")
        with torch.no_grad():
            for name in (
                "model.layers.1.mlp.down_proj.weight",
                "lm_head.weight",
                "model.layers.1.self_attn.k_proj.lora_A.write.weight",
            ):
                pair.wrapped.get_parameter(name).mul_(1.1)
        logits(pair, memory)
        memory.write(pair.text(CHUNK)[0])

    def test_another_begin_row_is_read_at_once(self, pair: Pair) -> None:
        memory = written(pair, "both")
        before = logits(pair, memory)
        with torch.no_grad():
            pair.wrapped.mplus.begin.mul_(-2)
        after = logits(pair, memory)
        assert error(after, before) > 1e-3
        assert error(after, pair.wrapped(input_ids=pair.text(9), memory=memory).logits) <= TOLERANCE

    def test_moved_weights_are_the_same_weights(self, pair: Pair) -> None:
        memory = written(pair, "projected")
        before = logits(pair, memory)
        for parameter in pair.wrapped.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(logits(pair, memory), before)

    def test_gradients_reach_the_reading_adapter_where_hidden_states_are_kept(self, pair: Pair) -> None:
        weight = pair.wrapped.get_parameter("model.layers.1.self_attn.k_proj.lora_B.read.weight")
        lengths = []
        for rows in ("both", "projected"):
            memory = written(pair, rows)
            pair.wrapped(input_ids=pair.text(1), memory=memory).logits.square().sum().backward()
            lengths.append(float(weight.grad.norm()))
            weight.grad = None
        assert lengths[0] > 1.5 * lengths[1] > 0, "projected rows are constants; the text's own keys are not"


class TestFiles:
    @pytest.mark.parametrize("rows", ["projected", "both", "hidden"])
    def test_a_saved_memory_keeps_what_it_keeps(self, shared: Pair, rows: str, tmp_path: Any) -> None:
        memory = written(shared, rows)
        memory.save(tmp_path / "memory")
        loaded = mplus.Memory.load(tmp_path / "memory", shared.wrapped)
        assert loaded.stores[0].layout == memory.stores[0].layout
        assert torch.equal(logits(shared, loaded), logits(shared, memory))
        for one in (memory, loaded):
            one.write(shared.text(CHUNK, seed=3)[0])
        assert torch.equal(logits(shared, loaded), logits(shared, memory))

    def test_moved_to_another_dtype_and_back(self, shared: Pair) -> None:
        memory = written(shared, "projected")
        there = memory.to(dtype=torch.float64).to(dtype=torch.float32)
        assert torch.equal(logits(shared, there), logits(shared, memory))
        assert there.states[0].newest[0].dtype == torch.float32

    def test_bytes(self, shared: Pair) -> None:
        """Keys and values of the tiny Llama are as wide as its hidden states."""
        both, hidden, projected = (written(shared, rows).nbytes for rows in ("both", "hidden", "projected"))
        assert both > hidden
        assert both > projected
