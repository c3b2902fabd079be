"""HMT as a mechanism of mplus: hierarchical memory of segments (He et al., NAACL 2025, arXiv 2405.06067).

A text is cut into segments of L tokens (``chunk_tokens``). A segment leaves one vector as wide as token embeddings.
With E the token embeddings, H the decoder's hidden states behind the final norm, and x_n the tokens of segment n:

    S_n = H([T ; E(x_n[:p]) ; T])[-1]                        topic summary, p = round(summary L)
    a_n = softmax(Wq S_n (Wk M)^T / sqrt(h)),  P_n = a_n M   recall by cross-attention; P0 where M is empty
    m_n = H([P_n ; E(x_{n-1}[-k:]) ; E(x_n) ; P_n])[-1]      k sensory tokens; m_n joins the end of M

and M keeps the newest N vectors. What the released code does is known from golden traces of it; the full paper was not
at hand, so that no section numbers are given. How all this becomes calls of a mechanism:

* ``build``: T (``topic``), P0 (``first``), Wq and Wk, drawn as large as token embeddings are.
* ``layout``: one list of rows for all layers, as wide as token embeddings. The list is the stream's store, so that
  eviction, budgets, files and forgetting are those of every memory; first in, first out keeps the newest N.
* ``new_state``: the ids of the sensory tokens, and the source they came from.
* ``write``: the passes of S_n and m_n, ``p + 2`` and ``1 + k + L + 1`` tokens. No logits: what is in front of the
  closing P_n does not see it.
* ``open``: the same S and P for the text that is read, then one pass over ``[P ; sensory]``. A decoder is causal, so
  what its layers receive for these places does not depend on the text: as memory rows in front of the text they give,
  but for rounding, what ``[P ; sensory ; text]`` as embeddings would have given.
* ``prefix``: these rows, layer by layer. Caches, beams, padding and backends are those of every memory; generation may
  go on for as long as the decoder has positions, with the front that its prompt recalled.
* Learned positions (OPT): the front sits at 0, 1, ... and the text behind it (``Opened.text_offset``).
* ``hmt`` (objective): both stages of training; the first one reads the newest vector in the place of a recalled one.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
RECALL = FOLDER / "hmt-recall.toml"
"""A recipe for answers to facts in the little language, from nothing."""
TINY = FOLDER / "hmt-tiny.toml"
"""A recipe of both stages, on the small decoder that comes with mplus."""

__all__ = ["RECALL", "TINY"]
