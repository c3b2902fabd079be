"""A mechanism that shares nothing with M+ is written and read by a real decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.errors import ConfigError, InputError, MechanismError, NotSupported
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.decoder import Attended, Compute, Rows
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.retrievers.base import Selection
from mplus.retrievers.linear import LinearRetriever
from tests.mechanisms.gists import GistMechanism
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor


class HalfMechanism(GistMechanism):
    """Half of what attention gives is that without memory."""

    name = "half"
    attends = True

    def prefix(self, *what: Any) -> Attended:
        return Attended(super().prefix(*what), half)  # type: ignore[arg-type]


def half(request: AttentionRequest, compute: Compute) -> AttentionResult:
    without = compute(evolve(request, segments=(), joined=None)).output
    return AttentionResult((compute(request).output + without) / 2)


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    for mechanism in (GistMechanism, HalfMechanism):
        MECHANISMS.register(mechanism.name, mechanism)
    yield
    for mechanism in (GistMechanism, HalfMechanism):
        MECHANISMS.unregister(mechanism.name)


def wrapped(name: str = "gists", architecture: str = "llama", **config: Any) -> Any:
    model = tiny.BY_NAME[architecture].build(0)
    sizes = {**tiny.SIZES, "memory_rows": "hidden", "adapters": None, **config}
    return mplus.wrap(model, mplus.MPlusConfig.from_dict({**sizes, "mechanism": name}))


@pytest.fixture(scope="module")
def model(installed: None) -> Any:
    return wrapped()


def written(model: Any, rows: int = 1) -> mplus.Memory:
    memory = model.new_memory(rows, seed=1)
    for turn in range(2):
        memory.write([tiny.ids(tiny.CHUNK, 10 * turn + row) for row in range(rows)], f"s{turn}")
    return memory


@torch.no_grad()
def logits(model: Any, ids: Tensor, memory: Any = None, **options: Any) -> Tensor:
    found: Tensor = model(ids, memory=memory, **options).logits
    return found


def test_an_empty_memory_leaves_the_decoder_as_it_is(model: Any) -> None:
    text = tiny.prompts(2)
    assert torch.equal(logits(model, text, model.new_memory(2)), logits(model, text))
    assert "empty memory = base model, bit for bit" in {one.name for one in model.mplus_installed.checks if one.checked}


def test_what_was_written_is_read(model: Any) -> None:
    text, memory = tiny.prompts(2), written(model, 2)
    both = logits(model, text, memory)
    assert float((both - logits(model, text)).std()) > 100 * tiny.rounding()
    for row in range(2):
        alone = logits(model, text[row : row + 1], memory.select([row]))
        assert float((both[row] - alone[0]).abs().max()) <= tiny.rounding()
    padded = torch.cat([text[:, :3], text], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert float((logits(model, padded, memory, attention_mask=mask)[:, 3:] - both).abs().max()) <= tiny.rounding()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_it_generates_as_full_forwards_do(model: Any, options: dict[str, Any]) -> None:
    text, memory = tiny.prompts(1), written(model)
    made = model.generate(text, memory=memory, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
    if not options:
        for place in range(text.shape[1], made.shape[1]):
            assert int(logits(model, made[:, :place], memory)[0, -1].argmax()) == int(made[0, place])
    assert made.shape == (1, text.shape[1] + 4)


def test_it_is_loaded_and_forgotten(model: Any, tmp_path: Path) -> None:
    memory, text = written(model), tiny.prompts(1)
    memory.save(tmp_path / "m")
    assert torch.equal(logits(model, text, mplus.Memory.load(tmp_path / "m", model)), logits(model, text, memory))
    for name in ("s0", "s1"):
        memory.forget(name)
    assert torch.equal(logits(model, text, memory), logits(model, text))


def test_it_attends_in_its_own_way() -> None:
    model, text = wrapped("half"), tiny.prompts(1)
    memory = written(model)
    moved, plain = logits(model, text, memory), logits(model, text)
    other = wrapped()
    usual = logits(other, text, written(other))
    assert float((moved - plain).std()) > 100 * tiny.rounding()
    assert float((moved - usual).std()) > 100 * tiny.rounding()
    beams = model.generate(text, memory=memory, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, text.shape[1] + 3)


def test_a_decoder_that_attends_by_itself_is_refused() -> None:
    with pytest.raises(NotSupported) as raised:
        wrapped("half", "bloom")
    assert any("'half' computes attention in its own way" in one for one in raised.value.details)


def test_rows_that_mean_nothing_to_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GistMechanism, "keeps", frozenset({"hidden"}))
    with pytest.raises(ConfigError, match=r"memory_rows must be one of 'hidden' or 'auto' .* 'gists', got 'both'"):
        wrapped(memory_rows="both")
    assert wrapped(memory_rows="auto").new_memory().stores[0].layout.keeps_hidden


@pytest.mark.parametrize("wrong", [lambda made: made[0], lambda made: torch.zeros(1), lambda made: (made[0], None)])
def test_a_prefix_of_the_wrong_type_is_named(model: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, own = written(model), GistMechanism.prefix
    monkeypatch.setattr(GistMechanism, "prefix", lambda self, *given: wrong(own(self, *given)))
    with pytest.raises(
        MechanismError,
        match=r"^the mechanism 'gists': prefix must return a tuple .* layer 0, got (Segment|Tensor|tuple with a \w+)$",
    ):
        logits(model, tiny.prompts(1), memory)
    monkeypatch.undo()
    assert torch.isfinite(logits(model, tiny.prompts(1), memory)).all()


PREFIXES: dict[str, tuple[Callable[..., Any], str]] = {
    "narrow rows": (lambda layer, state, project: (project(Rows(state.gists[layer].hidden[None, :, 1:])),), "failed"),
    "no rows": (lambda layer, state, project: (project(Rows(state.gists[layer].hidden[None, :0])),), "failed"),
    "a foreign layer": (lambda layer, state, project: (project(Rows(state.gists[layer + 3].hidden[None])),), "failed"),
    "five streams": (
        lambda layer, state, project: (project(Rows(state.gists[layer].hidden.expand(5, -1, -1))),),
        "must return rows of 1 or 2 streams",
    ),
    "more rows than it says": (
        lambda layer, state, project: (project(Rows(state.gists[layer].hidden.repeat(9, 1)[None])),),
        "must return at most as many rows as prefix_rows says, 2,",
    ),
}


@pytest.mark.parametrize("what", PREFIXES)
def test_a_prefix_of_the_wrong_shape_is_named(model: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled, said = PREFIXES[what]
    memory = written(model, 2)
    monkeypatch.setattr(
        GistMechanism,
        "prefix",
        lambda self, opened, layer, found, hidden, project: spoiled(layer, opened.views[0].state, project),
    )
    with pytest.raises(MechanismError, match=rf"^the mechanism 'gists': prefix {said}.* layer 0"):
        logits(model, tiny.prompts(2), memory)


WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "update": ("write", lambda made: None, "write must return an Update"),
    "narrow": ("write", lambda made: Update(tuple(one[..., 1:] for one in made.hidden)), "write must return hidden"),
    "absorbed": ("absorb", lambda made: None, "absorb must return an Absorbed"),
    "list": ("absorb", lambda made: evolve(made, state=evolve(made.state, gists=made.state.gists[:1])), "absorb must"),
    "state": ("new_state", lambda made: StreamState(), "new_state must return a state of class GistState"),
    "lists": ("new_state", lambda made: evolve(made, gists=made.gists[:1]), "new_state must return .* 3 layers, got"),
    "prefix": ("prefix", lambda made: made[0], "prefix must return a tuple of Segments"),
    "rows": ("prefix_rows", lambda made: None, "prefix_rows must return how many rows .* got None"),
}


@pytest.fixture
def wrong() -> Iterator[type[GistMechanism]]:
    """A mechanism by whose name no decoder was ever checked."""
    MECHANISMS.register("wrong", made := type("Wrong", (GistMechanism,), {"name": "wrong"}))
    yield made
    MECHANISMS.unregister("wrong")


def test_wrap_names_the_mechanism_that_leaves_a_size_open(wrong: type[GistMechanism]) -> None:
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 1, "memory_tokens_per_chunk": None}
    wrong.settle = classmethod(lambda cls, config, room: evolve(config, **sizes))  # type: ignore[assignment]
    with pytest.raises(
        MechanismError, match=r"^the mechanism 'wrong': settle must .* memory_tokens_per_chunk, got None"
    ):
        wrapped("wrong")


@pytest.mark.parametrize("what", WRONG)
def test_wrap_names_the_mechanism_and_does_not_blame_the_decoder(what: str, wrong: type[GistMechanism]) -> None:
    method, spoil, said = WRONG[what]
    own = getattr(GistMechanism, method)
    setattr(wrong, method, lambda *given, **named: spoil(own(*given, **named)))
    with pytest.raises(MechanismError, match=f"^the mechanism 'wrong': {said}"):
        wrapped("wrong")


def test_wrap_says_which_mechanism_wrote_what_is_not_finite(wrong: type[GistMechanism]) -> None:
    own = GistMechanism.write
    wrong.write = lambda *given: Update(tuple(one * torch.nan for one in own(*given).hidden))  # type: ignore[method-assign]
    with pytest.raises(NotSupported, match=r"NonFiniteError: .*write of the mechanism 'wrong'"):
        wrapped("wrong")


def test_wrap_keeps_where_a_mechanism_failed(wrong: type[GistMechanism]) -> None:
    wrong.write = lambda *given: {}["what it is about"]  # type: ignore[method-assign]
    with pytest.raises(NotSupported, match="KeyError: 'what it is about'") as raised:
        wrapped("wrong")
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"collect": {"input"}}, "collect must name some of inputs, outputs, .* got 'input'"),
        ({"adapter": "reader"}, "adapter must be 'write', 'read' or None, got 'reader'"),
    ],
)
def test_a_pass_refuses_what_it_does_not_know(model: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}$"):
        model.mplus_engine.decoder.run(tiny.prompts(1), **asked)


def test_a_mechanism_is_told_whether_a_generation_goes_on_behind_a_text(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then is none of its tokens to be predicted, so that all of them may say what they read."""
    own, told = GistMechanism.open, []

    def opened(mechanism: Any, decoder: Any, views: Any, text: Any) -> Any:
        told.append(text.prompt)
        return own(mechanism, decoder, views, text)

    monkeypatch.setattr(GistMechanism, "open", opened)
    memory, ids = written(model), tiny.ids(6, 9)[None]
    logits(model, ids, memory)
    model.generate(ids, memory=memory, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert told == [False, True]


SELECTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda found: None, "got NoneType"),
    "one too few": (lambda found: found[1:], "got 1"),
    "ids": (lambda found: [one.ids for one in found], "got a Tensor"),
    "more rows than asked for": (
        lambda found: [Selection(one.ids.repeat(9), one.scores.repeat(9)) for one in found],
        r"n at most \d+, got ids \[\d+\] torch.int64",
    ),
    "other scores": (lambda found: [Selection(one.ids, one.scores[1:]) for one in found], r"and scores \[\d+\]"),
}


@pytest.mark.parametrize("what", SELECTIONS)
def test_a_retriever_that_selects_otherwise_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, said = SELECTIONS[what]
    model, own = tiny.build(), LinearRetriever.select
    memory = model.new_memory(2)
    for _ in range(6):
        memory.write([tiny.ids(tiny.CHUNK, seed) for seed in (5, 6)])
    logits(model, tiny.prompts(2), memory)
    monkeypatch.setattr(LinearRetriever, "select", lambda *given: spoil(own(*given)))
    with pytest.raises(MechanismError, match=f"^the retriever 'linear': select must return .* 2 stores.*{said}"):
        logits(model, tiny.prompts(2), memory)
