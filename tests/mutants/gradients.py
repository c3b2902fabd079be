"""Mistakes one could make in gradients. Each has to be found by the checks of the gradients."""

from __future__ import annotations

from tests.helpers import gradients as checks
from tests.mutants.planted import Subject, mutants

BY_PARTS = mutants(
    Subject("mplus.backends.partial_backward", checks.PART_CASES, checks.check_parts),
    ("not causal", "seen = place <= own", "seen = place <= own + text", "plain"),
    ("causal by one", "seen = place <= own", "seen = place < own", "plain"),
    ("aligned at the top", "arange(text - length, text,", "arange(0, length,", "plain"),
    (
        "text from its first chunk",
        "place = torch.arange(start, stop,",
        "place = torch.arange(0, stop - start,",
        "chunks",
    ),
    ("window by one", "place > own - window", "place >= own - window", "window"),
    ("window is ignored", "place > own - window", "place > -window", "window"),
    ("padding is ignored", "place >= padding[:, None]", "place >= 0 * padding[:, None]", "padding"),
    ("padding by one", "place >= padding[:, None]", "place > padding[:, None]", "padding"),
    ("fillers are seen", "< lengths[:, None]", "< lengths[:, None] + stop", "fillers"),
    ("fillers by one", "< lengths[:, None]", "<= lengths[:, None]", "fillers"),
    (
        "memory from its first chunk",
        "torch.arange(start, stop, device=lengths",
        "torch.arange(0, stop - start, device=lengths",
        "fillers",
    ),
    ("nothing of the output", "output.to(dtype)).sum(-1)", "output.to(dtype)).sum(-1) * 0", "plain"),
    ("sinks the other way", "-((column - log_sums)", "((column - log_sums)", "sinks"),
    ("sinks outside of the softmax", "(column - log_sums).exp()", "column.exp()", "sinks"),
    ("no scale", "q @ k.mT * scale", "q @ k.mT", "plain"),
    ("the scale has no part in the slope", "slope: Tensor | float = scale", "slope: Tensor | float = 1.0", "plain"),
    ("nor has it in the capped one", "softcap * capped, scale * (1", "softcap * capped, 1.0 * (1", "softcap"),
    ("no soft cap", "slope = softcap * capped, scale", "slope = scores, scale", "softcap"),
    ("no slope of the cap", "scale * (1 - capped**2)", "scale", "softcap"),
    ("the slope of a sigmoid", "(1 - capped**2)", "(capped - capped**2)", "softcap"),
    ("a part's own softmax", "(scores - whole).exp()", "scores.softmax(-1)", "plain"),
    ("what is hidden has weight", "spread.masked_fill(hidden, 0)", "spread", "plain"),
    ("what nobody sees is multiplied", "k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)", "pass", "fillers"),
    ("what somebody does not see is left out", "seen.any(2).any(1)", "seen.all(2).all(1)", "plain"),
    ("what one head does not see is left out", "seen.any(2).any(1)", "seen.any(2).all(1)", "mask per head"),
    (
        "masks of heads interleaved",
        "hidden.unflatten(1, (key_heads, -1))",
        "hidden.unflatten(1, (-1, key_heads)).transpose(1, 2)",
        "mask per head",
    ),
    ("the whole is not subtracted", "(grad @ v.mT - inner)", "(grad @ v.mT)", "plain"),
    ("last chunk only", "grad_queries += grad_scores", "grad_queries = grad_scores", "chunks"),
    ("keys of the first chunk", "keys[:, :, start:stop].to(", "keys[:, :, : stop - start].to(", "chunks"),
    ("values of the first chunk", "values[:, :, start:stop].to(", "values[:, :, : stop - start].to(", "chunks"),
    ("keys by weights", "_like(grad_scores.mT @ q", "_like(weights.mT @ q", "plain"),
    ("values by scores", "_like(weights.mT @ grad", "_like(grad_scores.mT @ grad", "plain"),
    ("mean over the batch", "gradient.sum(0, keepdim=True)", "gradient.mean(0, keepdim=True)", "shared"),
    ("one row of the batch", "gradient.sum(0, keepdim=True)", "gradient[:1]", "shared"),
    ("no bias", "scores = scores + bias[", "scores = scores + 0 * bias[", "bias"),
    ("bias of the first chunk", "bias[:, :, None, start:stop]", "bias[:, :, None, : stop - start]", "bias"),
    ("the bias is capped", "grad_scores.sum(2).sum_to_size", "(grad_scores * slope).sum(2).sum_to_size", "bias"),
    ("half precision", "torch.autocast(queries.device.type, enabled=False)", "torch.enable_grad()", "autocast"),
)

MERGED = mutants(
    Subject("mplus.backends.merge", checks.MERGE_CASES, checks.check_merge),
    (
        "a part by its own softmax",
        "output, total, ctx.scale)",
        "*part.attend(queries, keys, values, ctx.scale), ctx.scale)",
    ),
    ("last part only", "towards_queries += dq", "towards_queries = dq"),
    ("keys and values the other way round", "towards_rows += [dk, dv]", "towards_rows += [dv, dk]"),
    ("no scale", "ctx.scale, ctx.parts = scale,", "ctx.scale, ctx.parts = 1.0,"),
    ("sinks the other way", "towards_sinks = -(share", "towards_sinks = (share"),
    ("sinks outside of the softmax", "(sinks.to(total)[:, None] - total).exp()", "sinks.to(total)[:, None].exp()"),
    ("nothing of the output", "(gradient * output).sum(-1, dtype", "gradient.sum(-1, dtype"),
    ("no gradient of sinks", "if sinks is not None and ctx", "if sinks is None and ctx"),
)

PARTS = mutants(
    Subject("mplus.backends.parts", checks.MERGE_CASES, checks.check_merge_of),
    ("groups interleaved", "part.unflatten(1, (-1, groups)).sum(2)", "part.unflatten(1, (groups, -1)).sum(1)"),
    ("a batch row for all", "whole[rows] = dq", "whole[:] = dq"),
    ("heads and batch rows mixed", "dq = unpack(dq, shape)", "dq = dq.reshape(shape)"),
    ("what is hidden has weight", "o, lse, self.bias, self.causal", "o, lse, None, self.causal"),
    ("not causal", "o, lse, self.bias, self.causal", "o, lse, self.bias, False"),
    ("bias is ignored", "keys), keys, values, self.key_bias", "keys), keys, values, None"),
    ("no bias in the gradient", "o, lse, self.key_bias", "o, lse, None"),
    ("bias of the first batch row", "bias[row : row + 1]", "bias[:1]"),
    ("rows of memory learn nothing", "self._own(whole).copy_(gradient)", "self._own(whole).zero_()"),
)

MUTANTS = [*BY_PARTS, *MERGED, *PARTS]
