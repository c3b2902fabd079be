"""Every way of generating with a memory, against greedy decoding by the oracle or the oracle's scores."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import SIZES, Pair, retrofit
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from tests.hf.references import TOLERANCE, error, ids, merged, stir

if TYPE_CHECKING:
    from torch import Tensor

    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

STEPS = 8
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


@dataclass(frozen=True)
class Remembering:
    """A decoder with a memory that reaches into the LTM, and the plain decoder that stands for its reads."""

    pair: Pair
    reader: Any
    memory: Memory

    @property
    def model(self) -> Any:
        return self.pair.wrapped

    def rows(self, prompt: Tensor, memory: Memory | None = None) -> list[Tensor]:
        """What every layer sees in front of ``prompt``: retrieved by the oracle, once."""
        (view,) = (memory or self.memory).snapshot()
        retrieve, found = self.pair.retrieving(view), []

        def keep(layer: int, text: Tensor) -> Tensor:
            found.append(retrieve(layer, text))
            return found[-1]

        oracle.read_with_retrieval(self.reader, prompt, keep, self.pair.rows(view))
        return [rows.detach() for rows in found]

    def greedy(self, prompt: Tensor) -> Tensor:
        """The expected continuation."""
        return oracle.generate_greedy(self.reader, prompt, self.rows(prompt), STEPS)

    def logits(self, sequence: Tensor, prompt: int) -> Tensor:
        """``[new, V]``: scores of every new token of ``sequence`` ``[1, prompt + new]``."""
        rows = self.rows(sequence[:, :prompt])
        return oracle.read(self.reader, sequence[:, :-1], rows)[0, prompt - 1 :].detach()


@pytest.fixture
def llama() -> Remembering:
    return shared("llama")


@functools.cache
def shared(name: str) -> Remembering:
    """For tests that change neither weights nor settings, nor hang anything on a decoder."""
    return remembering(name)


def remembering(name: str, **changes: Any) -> Remembering:
    pair = retrofit(BY_NAME[name], **changes)
    stir(pair.wrapped)
    return Remembering(pair, merged(pair.plain, pair.wrapped, "read"), pair.memory())


# ---------------------------------------------------------------- one continuation


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding", "gpt-oss", "falcon-new", "bloom"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cache", "no cache", "static cache"],
)
def test_greedy(name: str, options: dict[str, Any]) -> None:
    case, prompt = shared(name), ids(1, 9)
    expected = case.greedy(prompt)
    assert torch.equal(case.model.generate(prompt, memory=case.memory, **GREEDY, **options), expected)
    assert not torch.equal(case.model.generate(prompt, **GREEDY, **options), expected)


def test_the_result_is_that_of_the_decoder_when_there_is_no_memory(llama: Remembering) -> None:
    base = BY_NAME["llama"].build()
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        found = llama.model.generate(ids(1, 9), **GREEDY, **options)
        assert torch.equal(found, base.generate(ids(1, 9), **GREEDY, **options))


def test_prompt_as_embeddings(llama: Remembering) -> None:
    prompt = ids(1, 9)
    embedded = llama.model.get_input_embeddings()(prompt)
    found = llama.model.generate(inputs_embeds=embedded, memory=llama.memory, **GREEDY)
    assert torch.equal(found, llama.greedy(prompt)[:, 9:])


def test_no_prompt_starts_from_bos(llama: Remembering) -> None:
    expected = llama.greedy(torch.tensor([[llama.model.generation_config.bos_token_id]]))
    assert torch.equal(llama.model.generate(memory=llama.memory, **GREEDY), expected)


def test_output_attentions_cover_memory_and_text() -> None:
    pair = retrofit(BY_NAME["llama"], "eager")
    memory = pair.memory()
    seen = pair.rows(memory.snapshot()[0])
    options = {"output_attentions": True, "return_dict_in_generate": True}
    output = pair.wrapped.generate(ids(1, 9), memory=memory, **GREEDY, **options)
    assert [step[0].shape for step in output.attentions[:2]] == [(1, 4, 9, seen + 9), (1, 4, 1, seen + 10)]
    assert error(output.attentions[0][1].sum(-1), torch.ones(1, 4, 9)) < 1e-5


# ---------------------------------------------------------------- guessed tokens


def text_lengths(model: Any) -> list[int]:
    """Filled with the number of tokens of every forward of ``model``."""
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    return lengths


def test_prompt_lookup() -> None:
    case, prompt = remembering("llama"), ids(1, 4).repeat(1, 3)
    expected, lengths = case.greedy(prompt), text_lengths(case.model)
    found = case.model.generate(prompt, memory=case.memory, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found, expected)
    assert lengths[0] > 12, "the first forward held no guess, so retrieving with guesses was not tested"


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain assistant", "wrapped assistant"])
def test_assistant_model(wrapped: bool) -> None:
    case, prompt = remembering("llama"), ids(1, 9)
    expected, lengths = case.greedy(prompt), text_lengths(case.model)
    assistant: Any = retrofit(BY_NAME["llama"], seed=3).wrapped if wrapped else BY_NAME["llama"].build(seed=3)
    assistant.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    found = case.model.generate(prompt, memory=case.memory, assistant_model=assistant, **GREEDY)
    assert torch.equal(found, expected)
    assert lengths[0] > 9, "the first forward held no guess, so retrieving with guesses was not tested"


def test_assistant_with_the_same_memory() -> None:
    """An assistant that reads what the model reads guesses right, so that fewer forwards are needed."""
    case, prompt = remembering("llama"), ids(1, 9)
    expected, lengths = case.greedy(prompt), text_lengths(case.model)
    case.model.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    found = case.model.generate(prompt, memory=case.memory, assistant_early_exit=3, **GREEDY)
    assert torch.equal(found, expected)
    assert max(lengths[1:]) > 1


# ---------------------------------------------------------------- several continuations


def test_samples_of_one_prompt_are_scored_as_the_oracle_scores_them(llama: Remembering) -> None:
    torch.manual_seed(0)
    output = llama.model.generate(
        ids(1, 9),
        memory=llama.memory,
        max_new_tokens=STEPS,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row.tolist()) for row in output.sequences}) == 3
    for row, sequence in enumerate(output.sequences):
        found = torch.stack([logits[row] for logits in output.logits])
        assert error(found, llama.logits(sequence[None], 9)) < TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_beams_are_scored_as_the_oracle_scores_them(llama: Remembering, use_cache: bool) -> None:
    output = llama.model.generate(
        ids(1, 9),
        memory=llama.memory,
        **GREEDY,
        num_beams=4,
        num_return_sequences=3,
        use_cache=use_cache,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for score, sequence in zip(output.sequences_scores, output.sequences, strict=True):
        chosen = llama.logits(sequence[None], 9).log_softmax(-1).gather(1, sequence[9:, None])
        assert abs(float(score) - float(chosen.sum()) / STEPS) < TOLERANCE  # transformers divides by the length
    greedy = llama.logits(llama.greedy(ids(1, 9)), 9).log_softmax(-1).max(-1).values.sum() / STEPS
    assert float(output.sequences_scores[0]) >= float(greedy) - TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new"])
def test_padded_prompts_with_memories_of_their_own(name: str, options: dict[str, Any]) -> None:
    case = shared(name)
    long, short = ids(1, 9, seed=1), ids(1, 5, seed=2)
    both = case.model.new_memory(2)
    both.write([ids(1, 70, seed=3)[0], ids(1, 16, seed=4)[0]])
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    found = case.model.generate(padded, attention_mask=mask, memory=both, **GREEDY, **options)[:, 9:]
    singles = []
    for seed, (prompt, written) in enumerate(((long, ids(1, 70, seed=3)[0]), (short, ids(1, 16, seed=4)[0]))):
        memory = case.model.new_memory(seed=seed)
        memory.write(written)
        singles.append(case.model.generate(prompt, memory=memory, **GREEDY, **options)[:, prompt.shape[1] :])
    assert torch.equal(found, torch.cat(singles))


@pytest.mark.parametrize("streams", [2, 3])
def test_prompts_must_be_as_many_as_streams(llama: Remembering, streams: int) -> None:
    memory = llama.model.new_memory(streams)
    memory.write([ids(1, 20)[0]] * streams)
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(MemoryMismatchError, match=f"batch has 4 rows and the memory {streams}"):
            llama.model.generate(ids(4, 9), memory=memory, **GREEDY, **options)


# ---------------------------------------------------------------- streamers


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_streamer(llama: Remembering) -> None:
    streamer = Collected()
    output = llama.model.generate(ids(1, 9), memory=llama.memory, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.parts)[None], output)
    assert torch.equal(output, llama.greedy(ids(1, 9)))
    assert len(streamer.parts) == 1 + STEPS
    assert streamer.ended


def test_streaming_out_of_another_thread(llama: Remembering) -> None:
    class Words:
        """As much of a tokenizer as a streamer needs."""

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(f"w{token} " for token in tokens)

    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)  # type: ignore[arg-type]
    options = {"memory": llama.memory, "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=llama.model.generate, args=(ids(1, 9),), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [f"w{token}" for token in llama.greedy(ids(1, 9))[0, 9:].tolist()]


# ---------------------------------------------------------------- what was retrieved


def test_output_sources_name_what_was_retrieved(llama: Remembering) -> None:
    prompt, memory = ids(1, 9), llama.model.new_memory()
    for name in ("first", "second", "third"):
        memory.write(ids(1, 36, seed=len(name))[0], source=name)
    output = llama.model.generate(prompt, memory=memory, output_sources=True, return_dict_in_generate=True, **GREEDY)
    ((view,), rows) = memory.snapshot(), llama.rows(prompt, memory)
    assert len(output.memory_sources) == 1
    assert len(output.memory_sources[0]) == 3
    names = set()
    for layer, found in enumerate(output.memory_sources[0]):
        assert [entry.layer for entry in found] == [layer] * SIZES["retrieved_tokens"]
        ages = [entry.age for entry in found]
        assert ages == sorted(ages, reverse=True)
        stored = view.store.gather(layer, view.store.ids(layer))
        for place, entry in enumerate(found):
            (number,) = [
                i for i, birth in enumerate(stored.birth.tolist()) if birth == view.state.clock - 1 - entry.age
            ]
            assert torch.equal(stored.hidden[number], rows[layer][1 + place])
            assert entry.source == view.state.sources[int(stored.source[number])].name
            assert math.isfinite(entry.score)
            names.add(entry.source)
    assert len(names) > 1


def test_output_sources_need_a_place(llama: Remembering) -> None:
    with pytest.raises(ConfigError, match="return_dict_in_generate"):
        llama.model.generate(ids(1, 9), memory=llama.memory, output_sources=True, **GREEDY)


def attention_inputs(model: Any) -> list[list[Tensor]]:
    """Filled with what the attention of every layer receives, forward by forward."""
    seen: list[list[Tensor]] = []
    for spec in model.mplus_engine.retrofit.anatomy.specs:
        parts: list[Tensor] = []
        seen.append(parts)
        spec.attention.register_forward_pre_hook(
            lambda _, __, kwargs, parts=parts: parts.append(kwargs["hidden_states"].detach()), with_kwargs=True
        )
    return seen


@pytest.mark.parametrize("every", [1, 3])
def test_retrieve_every_takes_the_newest_tokens(every: int) -> None:
    case, prompt = remembering("llama"), ids(1, 9)
    (view,), seen = case.memory.snapshot(), attention_inputs(case.model)
    output = case.model.generate(
        prompt, memory=case.memory, retrieve_every=every, output_sources=True, return_dict_in_generate=True, **GREEDY
    )
    retrieve, steps = case.pair.retrieving(view), STEPS - 1  # forwards after the prompt
    last = steps // every * every
    for layer, parts in enumerate(seen):
        assert len(parts) == STEPS
        newest = torch.cat(parts[1 + last - every : 1 + last], 1)
        stored, expected = view.store.gather(layer, view.store.ids(layer)), retrieve(layer, newest)
        births = [view.state.clock - 1 - entry.age for entry in output.memory_sources[0][layer]]
        for place, birth in enumerate(births):
            assert torch.equal(stored.hidden[stored.birth == birth][0], expected[1 + place])


def test_retrieve_every_changes_what_follows_and_nothing_before() -> None:
    case, prompt = shared("llama"), ids(1, 9)
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    once = case.model.generate(prompt, memory=case.memory, **options)
    for every in (2, 5):
        again = case.model.generate(prompt, memory=case.memory, retrieve_every=every, **options)
        errors = [error(a, b) for a, b in zip(again.logits, once.logits, strict=True)]
        assert errors[:every] == [0] * every  # the prompt, and the tokens collected before
        assert errors[every] > 1e-3
    never = case.model.generate(prompt, memory=case.memory, retrieve_every=STEPS, **options)
    assert torch.equal(never.sequences, once.sequences)


def test_retrieve_every_in_a_batch_is_that_of_each_row() -> None:
    case = shared("llama")
    prompts, both = ids(2, 9), case.model.new_memory(2)
    both.write(ids(2, 60, seed=1))
    found = case.model.generate(prompts, memory=both, retrieve_every=2, **GREEDY)
    for row in range(2):
        memory = case.model.new_memory(seed=row)
        memory.write(ids(2, 60, seed=1)[row])
        alone = case.model.generate(prompts[row : row + 1], memory=memory, retrieve_every=2, **GREEDY)
        assert torch.equal(found[row : row + 1], alone)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_retrieve_every_must_be_a_count(llama: Remembering, value: Any) -> None:
    with pytest.raises(ConfigError, match="retrieve_every must be a whole number of at least 1"):
        llama.model.generate(ids(1, 9), memory=llama.memory, retrieve_every=value, **GREEDY)


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=4)}, "prefill_chunk_size"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"retrieve_every": 2, "use_cache": False}, "use_cache"),
        ({"retrieve_every": 2, "num_beams": 2}, "num_beams"),
        ({"retrieve_every": 2, "num_return_sequences": 2}, "num_return_sequences"),
        ({"retrieve_every": 2, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"retrieve_every": 2, "assistant_early_exit": 1}, "assistant_early_exit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(llama: Remembering, options: dict[str, Any], named: str) -> None:
    with pytest.raises(NotSupported, match=named):
        llama.model.generate(ids(1, 9), memory=llama.memory, **{**GREEDY, **options})


def test_a_default_of_the_model_is_refused_as_well() -> None:
    case = remembering("llama")
    case.model.generation_config.prefill_chunk_size = 4
    with pytest.raises(NotSupported, match="prefill_chunk_size"):
        case.model.generate(ids(1, 9), memory=case.memory, **GREEDY)


def test_prefill_in_pieces_goes_on_without_memory(llama: Remembering) -> None:
    found = llama.model.generate(ids(1, 9), prefill_chunk_size=4, **GREEDY)
    assert torch.equal(found, BY_NAME["llama"].build().generate(ids(1, 9), prefill_chunk_size=4, **GREEDY))


def test_continuous_batching_with_memory_is_refused(llama: Remembering) -> None:
    with pytest.raises(NotSupported, match="generate_batch"):
        llama.model.generate_batch([[5, 6]], memory=llama.memory)
    with pytest.raises(NotSupported, match="generate_batch"):
        llama.model.init_continuous_batching()


def test_continuous_batching_without_memory_is_that_of_the_decoder() -> None:
    case, prompts = remembering("llama"), [ids(1, 9)[0].tolist(), ids(1, 5, seed=1)[0].tolist()]
    options = {
        "max_new_tokens": 4,
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
    }
    found = case.model.generate_batch(prompts, **options)
    base = BY_NAME["llama"].build()
    for prompt, output in zip(prompts, found.values(), strict=True):
        expected = base.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        assert output.generated_tokens == expected.tolist()
    assert torch.equal(case.model.generate(ids(1, 9), memory=case.memory, **GREEDY), case.greedy(ids(1, 9)))


# ---------------------------------------------------------------- attention implementations, errors


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_can_be_changed_between_what_memory_goes_with(implementation: str) -> None:
    case, prompt = remembering("llama"), ids(1, 9)
    case.model.set_attn_implementation(implementation)
    assert torch.equal(case.model.generate(prompt, memory=case.memory, **GREEDY), case.greedy(prompt))
    base = BY_NAME["llama"].build(attn_implementation=implementation)
    assert torch.equal(case.model(prompt).logits, base(prompt).logits)


def test_attention_that_knows_no_memory_is_refused() -> None:
    case = remembering("llama")
    case.model.config._attn_implementation = "sdpa"  # around mplus: memory would be passed by in silence
    for use in (
        lambda: case.model(ids(1, 9), memory=case.memory),
        lambda: case.model.generate(ids(1, 9), memory=case.memory, **GREEDY),
        lambda: case.memory.write(ids(1, 9)),
    ):
        with pytest.raises(NotSupported, match="set_attn_implementation"):
            use()
    case.model(ids(1, 9))


def test_nothing_is_left_behind_by_a_generation_that_fails(llama: Remembering) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        llama.model.generate(ids(1, 9), memory=llama.memory, prefix_allowed_tokens_fn=fail, **GREEDY)
    assert torch.equal(llama.model(ids(1, 9)).logits, BY_NAME["llama"].build()(ids(1, 9)).logits)


def test_a_text_can_be_scored_without_leaking_its_future() -> None:
    """With ``query_tokens`` only the first tokens retrieve: later ones leave earlier logits as they are."""
    pair, text = retrofit(BY_NAME["llama"], query_tokens=4), ids(1, 12)
    stir(pair.wrapped)
    memory, changed = pair.memory(), text.clone()
    changed[:, 7:] = ids(1, 5, seed=9)
    assert not torch.equal(changed, text)
    a, b = (pair.wrapped(one, memory=memory).logits for one in (text, changed))
    assert torch.equal(a[:, :7], b[:, :7])
    (view,) = memory.snapshot()
    retrieve = pair.retrieving(view)
    plain = merged(pair.plain, pair.wrapped, "read")
    expected = oracle.read_with_retrieval(plain, text, lambda layer, h: retrieve(layer, h[:, :4]), pair.rows(view))
    assert error(a, expected) < TOLERANCE
    leaky = retrofit(BY_NAME["llama"]).wrapped  # the default retrieves with all of the text
    stir(leaky)
    memory = leaky.new_memory()
    memory.write(ids(1, 72, seed=1)[0])
    a, b = (leaky(one, memory=memory).logits for one in (text, changed))
    assert not torch.equal(a[:, :7], b[:, :7])
