"""LongMem for mplus: a side network beside a frozen decoder, which reads a bank of that one's keys and values.

Wang, Dong, Cheng, Liu, Yan, Gao, Wei: "Augmenting Language Models with Long-Term Memory", NeurIPS 2023, arXiv
2306.07174; released code Victorwz/LongMem at b7f3c6b. With h[0] .. h[L] the decoder's hidden states:

- write: keys and values of decoder layer r, ``K = W_k norm(h[r])`` without positions, cut into chunks of c tokens; a
  row of the store is a chunk, its key the mean of the c keys of each head. Nothing is read for it.
- read: ``s_0 = h[0]; s_{i+1} = layer_i(s_i) + h[f (i+1)] - h[f i]``; in side layer r // f every token t and head j
  takes the K / c chunks whose mean keys have the largest ``q_tj . mean``, and attends
  ``(1 - g_j) softmax(q K_text / sqrt(d) + positions) V_text + g_j softmax(q K_bank / sqrt(d)) V_bank``,
  ``g_j = sigmoid(b_j)``; then the final norm of the side network and the decoder's head.
- trained: side layers (which start as copies of decoder layers f i + 1), final norm, b. The decoder gets no gradient.

In the seam of mplus: ``build`` makes the copies (``shape.copies``), ``write`` runs one pass and projects, ``absorb``
appends rows, ``open`` looks at the banks, ``prefix`` leaves the decoder's layers alone, and ``finish`` runs the side
network with the calls of the pass, its keys and values in ``new_cache``. ``variant="paper"`` is causal, with a bank for
every row; ``variant="published"`` is the released code with its defects as options. Decisions of ours (rotary decoders,
grouped heads, depths that f does not divide, chunks that are not full) are in the README.

Attributes:
    TINY: a recipe that trains the side network beside the decoder that comes with mplus, ``mplus train longmem-tiny``.
    RECALL: a recipe that trains it to answer in the little language, ``mplus train longmem-recall``.
"""

from pathlib import Path

from mplus_longmem.mechanism import LongMemMechanism
from mplus_longmem.settings import LongMemOptions

TINY = Path(__file__).with_name("longmem-tiny.toml")
RECALL = Path(__file__).with_name("longmem-recall.toml")

__all__ = ["RECALL", "TINY", "LongMemMechanism", "LongMemOptions"]
