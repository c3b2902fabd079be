"""Compiling a kernel for a GPU that is not there, and what the result needs of that GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import attrs
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@attrs.define(frozen=True)
class Needs:
    """Shared memory in bytes; bytes of stack, to which registers are spilled; and the assembly it is about."""

    shared: int
    stack: int
    assembly: str = attrs.field(repr=False)


def compiled(kernel, types, constants, tiles, capability, *, aligned=()):
    """Compile one configuration.

    Args:
        types: argument name -> type, as ``*bf16`` or ``i32``.
        constants: argument name -> value of the ``constexpr`` arguments.
        aligned: arguments that are multiples of 16, as the runtime finds pointers of torch and most strides to be.
    """
    names = list(kernel.arg_names)
    assert set(names) == types.keys() | constants.keys()
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    return Needs(made.metadata.shared, _stack(made.asm["cubin"]), made.asm["ptx"])


def _stack(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"\bSTACK:(\d+)", shown)
    return int(stack)
