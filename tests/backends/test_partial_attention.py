"""Attention merged of parts is one softmax over all of them; queries may have memory of their own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.choose import BackendChooser
from mplus.backends.partial_attention import attend_per_query, attend_to_request, merged
from mplus.backends.reference import ReferenceBackend
from mplus.errors import NotSupported
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.decoder import Attended
from mplus.mechanisms.kv.mechanism import KvMechanism
from mplus.testing.rounding import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mplus.backends.base import AttentionResult
    from mplus.mechanisms.decoder import Compute


class OwnKeys(KvMechanism):
    """As "kv", but of what is in front every query attends to the keys that it likes best, as many as ``most`` says."""

    name, attends, most = "own-keys", True, 5

    def prefix(self, *what: Any) -> Attended | None:  # type: ignore[override]
        segments = super().prefix(*what)
        return Attended(segments, partial(own_keys, self.most)) if segments else None


def own_keys(most: int, request: AttentionRequest, compute: Compute) -> AttentionResult:
    (memory,) = request.segments
    copies = request.queries.shape[1] // memory.keys.shape[1]
    keys, values = (part.repeat_interleave(copies, 1) for part in (memory.keys, memory.values))
    keys, values = (part.expand(len(request.queries), -1, -1, -1) for part in (keys, values))
    scores = request.queries @ keys.transpose(-1, -2)
    if memory.valid is not None:
        scores = scores.masked_fill(~memory.valid[:, None, None], -torch.inf)
    best = scores.topk(min(most, keys.shape[2]), -1)
    places = best.indices.flatten(2)[..., None]
    own = (part.gather(2, places.expand(-1, -1, -1, 8)).unflatten(2, best.indices.shape[2:]) for part in (keys, values))
    text = attend_to_request(evolve(request, segments=(), joined=None), compute)
    return merged([attend_per_query(request, *own, visible=best.values > -torch.inf), text])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    MECHANISMS.register("own-keys", OwnKeys)
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 1, "retrieved_tokens": 32}
    every = {"name": "own-keys", "retrieved_chunks": None, "min_score": 0}
    yield mplus.wrap(load_decoder(), {"mechanism": every, **sizes})
    MECHANISMS.unregister("own-keys")


def ids(tokens: int, seed: int) -> Tensor:
    return torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(seed))


def written(model: Any, rows: int) -> mplus.Memory:
    memory = model.new_memory(rows)
    memory.write([ids(16 + 8 * row, row) for row in range(rows)])
    return memory


@torch.no_grad()
def logits(model: Any, text: Tensor, memory: Any, **options: Any) -> Tensor:
    found: Tensor = model(text, memory=memory, **options).logits
    return found


def test_with_keys_for_all_it_is_the_usual_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, text = written(model, 2), torch.stack([ids(9, 7), ids(9, 8)])
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    few = logits(model, text, memory, attention_mask=mask)
    monkeypatch.setattr(OwnKeys, "most", 100)
    whole = logits(model, text, memory, attention_mask=mask)
    monkeypatch.setattr(OwnKeys, "prefix", KvMechanism.prefix)
    usual = logits(model, text, memory, attention_mask=mask)
    real = mask.bool()
    assert error(whole[real], usual[real]) < 1e-3
    assert error(few[real], usual[real]) > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_generation_is_what_it_is_without_a_cache(model: Any, options: dict[str, Any]) -> None:
    text, memory = torch.stack([ids(9, 7), ids(9, 8)]), written(model, 2)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    steps: dict[str, Any] = {
        "attention_mask": mask,
        "memory": memory,
        "max_new_tokens": 6,
        "do_sample": False,
        **options,
    }
    assert model.generate(text, **steps).tolist() == model.generate(text, use_cache=False, **steps).tolist()


def request_of(**changes: Any) -> AttentionRequest:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    memory = Segment(draw(2, 2, 6, 8), draw(2, 2, 6, 8), torch.tensor([6, 4]))
    request = AttentionRequest(
        queries=draw(2, 4, 3, 8), keys=draw(2, 2, 5, 8), values=draw(2, 2, 5, 8), scale=0.4, segments=(memory,)
    )
    return evolve(request, **changes)


@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0}, {"window": 2}, {"mask": torch.ones(3, 5).tril(1).bool()}])
def test_parts_merge_to_one_softmax_with_its_gradient(changes: dict[str, Any]) -> None:
    request = request_of(**changes)
    chooser = BackendChooser("reference")
    found, grads = [], []
    for merge in (True, False):
        queries = request.queries.clone().requires_grad_()
        asked = evolve(request, queries=queries)
        if merge:
            (memory,) = request.segments
            keys, values = (part[:, :, None].expand(-1, -1, 3, -1, -1) for part in (memory.keys, memory.values))
            valid: Any = memory.valid
            parts = [
                attend_per_query(asked, keys, values, valid[:, None, None]),
                attend_to_request(evolve(asked, segments=()), lambda one: chooser.choose(one).attend(one)),
            ]
            output = merged(parts).output
        else:
            output = ReferenceBackend().attend(asked).output
        (output**2).sum().backward()
        found.append(output.detach())
        grads.append(queries.grad)
    assert error(*found) < 1e-12
    assert error(*grads) < 1e-12  # type: ignore[arg-type]


def test_sinks_belong_to_no_part() -> None:
    with pytest.raises(NotSupported, match="does not go with attention sinks"):
        attend_to_request(request_of(sinks=torch.zeros(4)), ReferenceBackend().attend)
