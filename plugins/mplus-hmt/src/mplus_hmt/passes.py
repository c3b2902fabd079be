"""The three passes of HMT: topic summary, the front of a read, and a segment with its prompt on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mplus.errors import NotSupported
from mplus.mechanisms.decoder import Adapter, Decoder


def summarised(
    decoder: Decoder,
    topic: Tensor,
    text: Tensor,
    seen: Tensor | None,
    count: int,
    adapter: Adapter,
    *,
    padding_counts: bool = False,
) -> Tensor:
    """Return the topic summary S ``[B, 1, w]`` of the first ``count`` tokens of every text.

    Args:
        decoder: runs the pass.
        topic: ``[1, w]``, T.
        text: ``[B, n, w]``, embeddings.
        seen: ``[B, n]`` bool, False at padding; None: there is none.
        count: p.
        adapter: of the pass.
        padding_counts: padding is among these tokens and takes positions, as in the released code, so that a padded
            row gets another summary than it would by itself.
    """
    around = topic.to(text).expand(text.shape[0], 1, -1)
    if seen is None or bool(seen.all()):
        return _last(decoder, torch.cat([around, text[:, :count], around], 1), adapter)
    if padding_counts:
        mask = functional.pad(seen[:, :count], (1, 1), value=True)
        return _last(decoder, torch.cat([around, text[:, :count], around], 1), adapter, mask)
    kept = seen & (seen.cumsum(1) <= count)
    # What is left out goes in front, behind the first T, where nothing sees it and it takes no position.
    order = kept.long().argsort(dim=1, stable=True)[:, text.shape[1] - int(kept.sum(1).max()) :]
    some = text.gather(1, order[:, :, None].expand(-1, -1, text.shape[2]))
    mask = functional.pad(kept.gather(1, order), (1, 1), value=True)
    return _last(decoder, torch.cat([around, some, around], 1), adapter, mask, (mask.cumsum(1) - 1).clamp(min=0))


def front_inputs(decoder: Decoder, prompt: Tensor, sensory: Sequence[Tensor], adapter: Adapter) -> tuple[Tensor, ...]:
    """Return what every layer receives for ``[P ; sensory]``, ``[B, 1 + k, d]``; behind shorter ones stands anything.

    Args:
        decoder: runs the pass.
        prompt: ``[B, 1, w]``, P.
        sensory: of each row ``[k_i, w]``, embeddings.
        adapter: of the pass.
    """
    longest = max(len(one) for one in sensory)
    padded = [functional.pad(one, (0, 0, 0, longest - len(one))) for one in sensory]
    front = torch.cat([prompt, torch.stack(padded).to(prompt)], 1)
    return decoder.run(front, adapter=adapter, collect={"inputs"}).inputs


def remembered(
    decoder: Decoder, prompt: Tensor, sensory: Tensor, text: Tensor, adapter: Adapter, mask: Tensor | None = None
) -> Tensor:
    """Return the hidden states of ``[P ; sensory ; text ; P]`` behind the final norm, ``[B, 1 + k + n + 1, w]``.

    The last one is the new memory vector.

    Args:
        decoder: runs the pass.
        prompt: ``[B, 1, w]``, P.
        sensory: ``[B, k, w]``, embeddings.
        text: ``[B, n, w]``, embeddings.
        adapter: of the pass.
        mask: ``[B, n]`` bool, False at padding of the text, which takes positions; None: there is none.

    Raises:
        NotSupported: the decoder's hidden states are not as wide as its token embeddings.
    """
    if mask is not None:
        mask = functional.pad(mask, (1 + sensory.shape[1], 1), value=True)
    found = decoder.run(torch.cat([prompt, sensory, text, prompt], 1), adapter=adapter, mask=mask).need_hidden()
    if found.shape[2] != text.shape[2]:
        raise NotSupported(
            f"HMT reads a final hidden state as a token embedding, and this decoder's are {found.shape[2]} and "
            f"{text.shape[2]} wide: use another decoder"
        )
    return found


def _last(
    decoder: Decoder, whole: Tensor, adapter: Adapter, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    return decoder.run(whole, adapter=adapter, mask=mask, positions=positions).need_hidden()[:, -1:]
