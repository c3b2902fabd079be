"""LaMemo as a mechanism of mplus: memory with look-ahead (Ji et al., NAACL 2022, arXiv 2204.07341).

A window of the M newest tokens is kept. Its places attend to what comes behind them, once, and what they found before
and what they find now is merged by the softmax mass of each. With c and z the output and the log-sum-exp of all scores
of a place so far, and c' and z' those of the look-ahead of this segment:

    alpha = e^z / (e^z + e^z'),    c <- alpha c + (1 - alpha) c',    z <- log(e^z + e^z')

A segment runs the places of the window through all layers anew, from their token embeddings; only c and z are carried.
Which keys a place looks ahead to is the paper's other half: those behind it that it has not seen, up to the first token
of the present segment, so that nothing leaks. What the released code does is known from golden traces of it; the full
paper was not at hand. How all this becomes calls of a mechanism:

* ``build``: a direction vector for each head, zero at first (``direction="mirrored"``).
* ``layout``: a list for every layer. A row is ``[c | z]`` of one place, and has its token in a further column.
* ``new_state``: the rows (``window``), which are no rows of a store, since every write exchanges all of them; and how
  many keys they have not looked at.
* ``write``: one pass over ``[window | segment]`` in which attention is ours (``Attended``): the text attends as usual,
  the window looks ahead, and the merge is what goes on to the next layer.
* ``absorb``: the newest M rows of both, detached as in the paper.
* ``open``: the same pass over the window alone, which ends at the last token that was written; what its layers receive
  are the rows that ``prefix`` puts in front of the text. Tokens that are read or generated refresh nothing.
* ``kept``: a place holds something of what is behind it, so that forgetting takes back all refreshes: the next pass
  computes c and z from the tokens that are left, as if they were one segment.

The golden traces judge the merge, the window and the recurrence (``attention``), in the published decoder, which is not
one of transformers (``published``). On a rotary decoder this is a named variant, not LaMemo: it has no position biases,
and a key on the right has a negative distance, which such a decoder has never seen. "mirrored" turns queries and keys
of the look-ahead the other way round, so that n to the right looks like n to the left, and adds the direction vector to
the query, as the paper tells the directions apart by a bias.
"""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).with_name("lamemo-tiny.toml")
"""A recipe that trains the direction vectors and adapters, on the small decoder that comes with mplus."""

RECALL = Path(__file__).with_name("lamemo-recall.toml")
"""A recipe that trains them to answer in the little language what the window holds."""

__all__ = ["RECALL", "TINY"]
