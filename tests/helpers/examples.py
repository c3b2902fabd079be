"""The classes of the programs in examples/, without running the rest of them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def classes_of(name: str) -> dict[str, Any]:
    """Return what the imports and classes of an example define, by name."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), f"{name}.py", "exec"), names)
    return names
