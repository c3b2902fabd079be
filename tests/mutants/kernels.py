"""Mistakes one could make in the kernels. Each has to be found by the checks of its kernel."""

from __future__ import annotations

from tests.interpreted import checks
from tests.mutants.planted import Subject, mutants

KERNELS = "mplus.backends.triton.kernels"

ATTENTION = mutants(
    Subject(f"{KERNELS}.attention", checks.ATTENTION_CASES, checks.check_attention_case),
    ("causal by one", "place)[None, :] <= high", "place)[None, :] < high", "memory"),
    ("aligned at the top", "own = text - length + token", "own = token", "softcap"),
    ("causal in memory", "tl.where(in_text, own, count - 1)", "tl.minimum(own, count - 1)", "memory"),
    ("not causal", "tl.where(in_text, own, count - 1)", "count - 1 + own * 0", "memory"),
    ("no tail of keys", "own, count - 1)", "own, count + KEYS)", "memory"),
    ("keys beyond the tail are read", "stored = place < count - start", "stored = place < KEYS", "memory"),
    ("rows beyond the tail are written", "real = row < length * GROUPS", "real = row < ROWS * 99", "memory"),
    (
        "wide heads are cut",
        "other=0.0,\n    )\n    if UPCAST:\n        q =",
        "other=0.0,\n    ) * (wide < 16)\n    if UPCAST:\n        q =",
        "memory",
    ),
    ("groups interleaved", "h * GROUPS + row % GROUPS", "(row % GROUPS) * KV_HEADS + h", "memory"),
    ("tokens of one head", "token = row // GROUPS", "token = row % length", "softcap"),
    ("output is not rescaled", "weighted * shrink[:, None]", "weighted", "memory"),
    ("sum is not rescaled", "total * shrink +", "total +", "memory"),
    ("largest score is forgotten", "largest = larger", "largest = tl.max(scores, 1)", "memory"),
    ("a row without a key is NaN", 'tl.where(larger == float("-inf"), 0.0, larger)', "larger", "padding"),
    ("zero sums", "some = tl.where(total > 0, total, 1.0)", "some = total", "padding"),
    ("sums in base 2", "* 0.6931471805599453", "* 1.0", "memory"),
    (
        "splits overlap",
        "last = tl.minimum(first + share, blocks)",
        "last = tl.minimum(first + share + 1, blocks)",
        "one token",
    ),
    ("splits leave a block out", "first = split * share", "first = split * (share + 1)", "one token"),
    ("lengths are ignored", "tl.maximum(tl.minimum(real, rows), 0).to(tl.int32)", "rows", "fillers"),
    ("lengths of the first batch row", "index * batch + b)", "index * batch)", "fillers"),
    ("lengths of the first segment", "lengths + index * batch", "lengths", "fillers"),
    ("a segment in the place of another", "keys_1, key_base)", "keys_0, key_base)", "one token"),
    ("second segment from its second block", "(block - end_0) * KEYS, start)", "block * KEYS, start)", "one token"),
    ("shared segments are not shared", "0 if size == 1 else stride for", "stride + size for", "shared"),
    ("window by one", "text_low = own - window + 1", "text_low = own - window", "window"),
    ("window from the first text key", "text_low = own - window + 1", "text_low = token - window + 1", "window"),
    (
        "blocks skipped before the window",
        "first_row // GROUPS - window + 1, 0)",
        "first_row // GROUPS - window + 3, 0)",
        "window",
    ),
    ("window in memory", "tl.where(in_text, text_low, 0)", "text_low", "window"),
    ("padding is ignored", "tl.minimum(tl.load(padding + b), text).to(tl.int32)", "padded_keys", "padding"),
    ("padding of the first batch row", "tl.load(padding + b)", "tl.load(padding)", "padding"),
    (
        "window or padding, not both",
        "tl.maximum(text_low, padded_keys)",
        "text_low * 0 + padded_keys",
        "window and padding",
    ),
    ("no soft cap", "_tanh(scores) * cap", "scores * cap", "softcap"),
    ("soft cap in base e", "softcap * LOG2_E", "softcap", "softcap"),
    ("scores in base e", "request.scale * LOG2_E if", "request.scale if", "memory"),
    ("bias is ignored", "scores += added[None, :]", "scores += 0 * added[None, :]", "bias"),
    ("bias in base e", "dim=-1) * LOG2_E", "dim=-1)", "bias"),
    ("bias of the first batch row", "bias += b * a_b + h", "bias += h", "bias"),
    ("bias of the first head", "b * a_b + h * a_h", "b * a_b", "bias"),
    ("bias of the first segment", "bias + (before + start)", "bias + start", "bias"),
    ("bias of the first block", "bias + (before + start)", "bias + before", "bias"),
    ("bias at text", "if block < end_3:", "if block < blocks:", "bias"),
    ("a shared bias is not shared", "0 if size == 1 else stride", "1 if size == 1 else stride", "one bias"),
    ("values read as keys", "value_base + start", "key_base + start", "memory"),
)

SCORE = mutants(
    Subject(f"{KERNELS}.score", checks.SCORE_CASES, checks.check_score_case),
    (
        "padded tokens count a half",
        "tl.where(real[None, :], _sigmoid(products, ONE_INSTRUCTION), 0.0)",
        "_sigmoid(products, ONE_INSTRUCTION)",
    ),
    ("mask is ignored", "real &= tl.load(mask + b * m_b + token, mask=real, other=0) != 0", "real = token < length"),
    ("mask of the first text", "mask + b * m_b", "mask"),
    ("mean over padded length", "tl.maximum(tokens, 1).to(tl.float32)", "length"),
    ("mean over whole tiles", "tokens += tl.sum(real.to(tl.int32), 0)", "tokens += ROWS"),
    ("tail of tokens is read", "real = token < length", "real = token < length + ROWS"),
    ("tail of keys is written", "stored = place < count - start", "stored = place < KEYS"),
    ("first tile of keys", "* k_b + start * k_n", "* k_b"),
    ("keys of the first text", "keys + b * k_b", "keys"),
    ("no sigmoid", "y = 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))", "y = x"),
    ("sigmoid in base 2", "x * -1.4426950408889634", "x * -1.0"),
    ("last tile only", "sums += tl.sum(", "sums = tl.sum("),
)

GATHER = mutants(
    Subject(f"{KERNELS}.gather", checks.GATHER_CASES, checks.check_gather_case),
    ("rotation the other way", "tl.where(wide < half, -1.0, 1.0)", "tl.where(wide < half, 1.0, -1.0)"),
    ("neighbours rotated", "tl.where(wide < half, wide + half, wide - half)", "wide ^ 1"),
    ("no sine", "+ partner.to(tl.float32) * s.to(tl.float32) * sign", ""),
    (
        "sine of the other half",
        "sin + slot[:, None] * s_n + wide[None, :]",
        "sin + slot[:, None] * s_n + other[None, :]",
    ),
    ("angles of the row, not the slot", "cos + slot[:, None] * c_n", "cos + index[:, None] * c_n"),
    ("all of a head rotated", "turned = (wide < ROTATED)", "turned = (wide < WIDTH)"),
    ("slots by row", "index = tl.load(indices + slot, mask=real, other=0)", "index = slot"),
    ("wrong slot", "keys + h * k_h + slot[:, None] * k_n", "keys + h * k_h + (slot + 1)[:, None] * k_n"),
    ("tail of slots is written", "real = slot < count", "real = slot < count + ROWS"),
    ("values of the first head", "HEADS * WIDTH + h * VALUE_WIDTH", "HEADS * WIDTH"),
    ("values behind the keys of a head", "(base + HEADS * WIDTH + h", "(base + WIDTH + h"),
    ("wide values are written", "(value_wide < VALUE_WIDTH)", "(value_wide < PADDED_VALUE_WIDTH)"),
    ("keys of the first head", "mine = base + h * WIDTH", "mine = base"),
)

MUTANTS = [*ATTENTION, *SCORE, *GATHER]
