"""What the kernels that ship are compiled from: the types and constants that a launch would give them."""

from __future__ import annotations

import triton.language as tl

from mplus.backends.triton.configs import ATTENTION, GATHER, SCORE, padded
from mplus.backends.triton.kernels.attention import attention_kernel
from mplus.backends.triton.kernels.gather import gather_kernel
from mplus.backends.triton.kernels.score import score_kernel
from tests.compiled.ahead import compiled

NUMBERS = {16: "*bf16", 32: "*fp32"}
SWITCHES = ("LENGTHS", "WINDOW", "PADDING", "SOFTCAP", "BIAS")


def compile_attention(key, tiles, capability, *, segments=4, switches=True, aligned=True, ones=()):
    """With all a request can ask for, or with nothing of it; results in float32, as when keys are split.

    ``ones``: whole numbers that are 1. The runtime makes constants of them.
    """
    bits, width, _ = key
    constants = {
        "KV_HEADS": 8,
        "GROUPS": 4,
        "WIDTH": width,
        "VALUE_WIDTH": width,
        "SEGMENTS": segments,
        **dict.fromkeys(SWITCHES, switches),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PADDED_WIDTH": padded(width),
        "PADDED_VALUE_WIDTH": padded(width),
        "PRECISION": "ieee",
        "UPCAST": False,
        **dict.fromkeys(ones, 1),
    }
    tensors = [f"{kind}_{index}" for index in range(4) for kind in ("keys", "values")]
    tensors += ["queries", "text_keys", "text_values"]
    floats = dict.fromkeys(tensors, NUMBERS[bits])
    floats |= {"output": "*fp32", "log_sums": "*fp32", "score_scale": "fp32", "cap": "fp32"}
    types = _types(attention_kernel, constants, floats, {"lengths": "*i64", "padding": "*i64", "bias": "*fp32"})
    strides = [name for name in types if name[1:2] == "_" or name[2:3] == "_"]
    return compiled(
        attention_kernel,
        types,
        constants,
        tiles,
        capability,
        aligned=[*tensors, "output", *[name for name in strides if not name.startswith("l_")]] if aligned else [],
    )


def compile_score(key, tiles, capability, *, ones=()):
    """With a mask. ``ones`` as above."""
    bits, width = key
    constants = {
        "WIDTH": width,
        "MASKED": True,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PADDED_WIDTH": padded(width),
        "COMPUTE": {16: tl.bfloat16, 32: tl.float32}[bits],
        "PRECISION": "ieee",
        "ONE_INSTRUCTION": True,
        **dict.fromkeys(ones, 1),
    }
    floats = {"queries": NUMBERS[bits], "keys": NUMBERS[bits], "scores": "*fp32"}
    types = _types(score_kernel, constants, floats, {"mask": "*u8"})
    aligned = [name for name in ("queries", "keys", "q_b", "q_t", "k_b", "k_n") if name not in constants]
    return compiled(score_kernel, types, constants, tiles, capability, aligned=aligned)


def compile_gather(width, tiles, capability, *, ones=()):
    """All of a head rotated. ``ones`` as above."""
    constants = {
        "HEADS": 8,
        "WIDTH": width,
        "VALUE_WIDTH": width,
        "ROTATED": width,
        "ROWS": tiles.rows,
        "PADDED_WIDTH": padded(width),
        "PADDED_VALUE_WIDTH": padded(width),
        **dict.fromkeys(ones, 1),
    }
    floats = dict.fromkeys(("rows", "keys", "values"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
    types = _types(gather_kernel, constants, floats, {"indices": "*i64"})
    aligned = [*floats, "indices", "r_n", "c_n", "s_n", "k_h", "k_n", "v_h", "v_n"]
    return compiled(gather_kernel, types, constants, tiles, capability, aligned=aligned)


def _types(kernel, constants, *named):
    """Whatever is not named is a whole number."""
    types = {name: "i32" for name in kernel.arg_names if name not in constants}
    for given in named:
        assert given.keys() <= types.keys()
        types |= given
    return types


SHIPPED = [(compile_attention, key, tiles) for key, tiles in ATTENTION.items()]
SHIPPED += [(compile_score, key, tiles) for key, tiles in SCORE.items()]
SHIPPED += [(compile_gather, key, tiles) for key, tiles in GATHER.items()]
