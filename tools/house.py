"""Count what the shape of the code costs its readers: import circles, crowded folders, untyped seams, long trips.

python -m tools.house [--root FOLDER] [--json] [--write-path] [--list [NAME]]

Counts are of the files of ``mplus/``; folders are counted in ``tests/`` too. Each row of the table is one function, and
its docstring says what counts. Everything but ``--write-path`` only parses files, so that ``--root`` can name any
checkout; ``--write-path`` runs the ``mplus`` that Python finds.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import TypeVar

import attrs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mplus"
MOST_FILES = 15
FEW_LINES = 6
STATE = {"stm", "pending", "newest"}
"""The fields of the M+ mechanism's own state."""
OWNERS = ("mplus.mechanisms", "mplus.interop")
"""Rooms that may name those fields: the mechanism's own, and the published model's, whose tensors are called so."""
NO_VERB = re.compile(r"(What|How|Whether|Of|As|Those|The same|See)\b")
"""Openings of a docstring that says a relation, where a function needs a verb and a class a noun."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)


@attrs.frozen
class Module:
    """A file of the package: its path below the root, its text and its syntax tree."""

    path: Path
    source: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is an ``__init__.py``."""
        return self.path.name == "__init__.py"

    def nodes(self, kind: type[Node]) -> Iterator[Node]:
        """Yield the nodes of a kind, at any depth."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kind))

    def functions(self) -> Iterator[Function]:
        """Yield all functions and methods, at any depth."""
        yield from self.nodes(ast.FunctionDef)
        yield from self.nodes(ast.AsyncFunctionDef)


Modules = Mapping[str, Module]


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """Parse every file of the package; by dotted name, a package's without ``__init__``."""
    modules = {}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        path = file.relative_to(root)
        parts = path.parts[:-1] if path.name == "__init__.py" else path.with_suffix("").parts
        source = file.read_text(encoding="utf-8")
        modules[".".join(parts)] = Module(path, source, ast.parse(source))
    return modules


def exports(modules: Modules) -> dict[str, str]:
    """Return the public names that ``mplus/__init__.py`` imports, each with the module it is imported from."""
    nodes = modules[PACKAGE].nodes(ast.ImportFrom)
    return {alias.name: node.module for node in nodes if node.module and node.module in modules for alias in node.names}


def import_graph(modules: Modules) -> dict[str, set[str]]:
    """Map each module to the modules it imports: at its top, inside functions and under ``TYPE_CHECKING``.

    Two imports are not what they seem. ``mplus/__init__.py`` exports lazily: it is left out of the graph, and
    ``mplus.wrap`` counts as an import of the module behind ``wrap``. And a public type may stand in annotations
    everywhere: under ``TYPE_CHECKING``, a name that ``mplus/__init__.py`` exports does not count, except in an
    ``__init__.py``, where it is a lazy export too.
    """
    public = exports(modules)
    graph = {name: set(_imported(module, modules, public)) - {name, PACKAGE} for name, module in modules.items()}
    return {**graph, PACKAGE: set()}


def _imported(module: Module, modules: Modules, public: Mapping[str, str]) -> Iterator[str]:
    guards = [node for node in module.nodes(ast.If) if "TYPE_CHECKING" in ast.unparse(node.test)]
    guarded = {node for guard in guards for part in guard.body for node in ast.walk(part)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node in guarded and alias.name in public and not module.is_package:
                    continue
                submodule = f"{node.module}.{alias.name}"
                origin = public.get(alias.name, PACKAGE) if node.module == PACKAGE else node.module or ""
                yield from {submodule if submodule in modules else origin} & modules.keys()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            yield public.get(node.attr, PACKAGE)


def circles(modules: Modules) -> list[list[str]]:
    """Return the import circles: largest sets of modules that all import one another, directly or through others."""
    graph = import_graph(modules)
    reached = {name: _reach(graph, name) for name in graph}
    found = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in graph}
    return sorted(list(circle) for circle in found - {()})


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting.extend(new)
    return seen


def one_importer(modules: Modules) -> list[str]:
    """Return the modules, packages apart, that exactly one other module imports."""
    importers = Counter(name for imported in import_graph(modules).values() for name in imported)
    return [name for name, module in modules.items() if importers[name] == 1 and not module.is_package]


def crowded_folders(root: Path = ROOT) -> dict[str, int]:
    """Return the folders of ``mplus/`` and ``tests/`` with more than 15 ``.py`` files of their own, and how many."""
    counts = Counter(
        str(file.parent.relative_to(root)) for top in (PACKAGE, "tests") for file in (root / top).rglob("*.py")
    )
    return {folder: count for folder, count in sorted(counts.items()) if count > MOST_FILES}


def state_users(modules: Modules, *, strict: bool = True) -> list[str]:
    """Return the modules outside ``mechanisms/`` and ``interop/`` that name a field of M+'s state.

    As an attribute or a keyword of a call; ``strict``: also as a parameter or as a whole string.
    """
    inside = tuple(f"{owner}." for owner in OWNERS)
    return [
        name
        for name, module in modules.items()
        if not f"{name}.".startswith(inside) and STATE & set(_field_names(module, strict=strict))
    ]


def _field_names(module: Module, *, strict: bool) -> Iterator[object]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) or (strict and isinstance(node, ast.arg)):
            yield node.arg
        elif strict and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def called_once(modules: Modules) -> list[str]:
    """Return the module-level functions of at most 6 lines, decorators apart, that are called at most once.

    A call counts for every function with the name that is called, ``f()`` or ``module.f()``; naming a function without
    calling it does not count.
    """
    functions = [node.func for module in modules.values() for node in module.nodes(ast.Call)]
    calls = Counter(
        function.id if isinstance(function, ast.Name) else function.attr
        for function in functions
        if isinstance(function, ast.Name | ast.Attribute)
    )
    return [
        f"{name}.{node.name}"
        for name, module in modules.items()
        for node in module.tree.body
        if isinstance(node, Function) and calls[node.name] <= 1 and _length(node) <= FEW_LINES
    ]


def untyped(modules: Modules) -> list[str]:
    """Return the annotations (of parameters, results and variables) that say ``Any``, as a part of a type too.

    Returned as well: ``object`` in an annotation, except of ``__eq__``; each alias, at the top of a module, of a type
    with ``Any`` in it, and each annotation that names such an alias in its module or in one that imports it from there.
    """
    aliases = {name: dict(_loose_aliases(module)) for name, module in modules.items()}
    found = [f"{name}:{line} {alias}" for name, lines in aliases.items() for alias, line in lines.items()]
    for name, module in modules.items():
        imports = ((node.module or "", alias) for node in module.nodes(ast.ImportFrom) for alias in node.names)
        imported = {alias.asname or alias.name for origin, alias in imports if alias.name in aliases.get(origin, ())}
        loose = {"Any", "object", *aliases[name], *imported}
        found += [f"{name}:{line} {ast.unparse(node)}" for line, node in _annotations(module) if loose & _names(node)]
    return found


def _loose_aliases(module: Module) -> Iterator[tuple[str, int]]:
    """Yield the names at the top of a module that stand for a type with ``Any`` in it, and their lines."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and "Any" in _names(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node.lineno) for target in targets if isinstance(target, ast.Name))


def _annotations(module: Module) -> Iterator[tuple[int, ast.expr]]:
    exempt = {given for node in module.nodes(ast.FunctionDef) if node.name == "__eq__" for given in node.args.args}
    for node in ast.walk(module.tree):
        annotation = node.returns if isinstance(node, Function) else None
        if isinstance(node, ast.arg | ast.AnnAssign) and node not in exempt:
            annotation = node.annotation
        if annotation is not None:
            yield annotation.lineno, annotation


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def no_verb(modules: Modules) -> list[str]:
    """Return the classes and functions whose docstring begins with one of the openings of ``NO_VERB``."""
    return [
        f"{name}:{node.lineno} {node.name}"
        for name, module in modules.items()
        for node in (*module.nodes(ast.ClassDef), *module.functions())
        if NO_VERB.match(ast.get_docstring(node) or "")
    ]


def function_lengths(modules: Modules) -> list[int]:
    """Return the lines of every function and method, from ``def`` to the end, docstring included."""
    return [_length(function) for module in modules.values() for function in module.functions()]


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def comment_share(modules: Modules) -> float:
    """Return the comments, whole lines and ends of lines, per line that is not blank."""
    written = sum(bool(line.strip()) for module in modules.values() for line in module.source.splitlines())
    return sum(map(_comments, modules.values())) / written


def _comments(module: Module) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(module.source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def files(modules: Modules) -> list[str]:
    """Return every file with its number of lines, the longest first."""
    return _ranked((len(module.source.splitlines()), str(module.path)) for module in modules.values())


def functions(modules: Modules) -> list[str]:
    """Return every function and method with its number of lines, the longest first."""
    found = ((name, function) for name, module in modules.items() for function in module.functions())
    return _ranked((_length(function), f"{name}:{function.lineno} {function.name}") for name, function in found)


def comments(modules: Modules) -> list[str]:
    """Return every file with its number of comments, the one with most first."""
    return _ranked((_comments(module), str(module.path)) for module in modules.values())


def _ranked(counts: Iterable[tuple[int, str]]) -> list[str]:
    return [f"{count} {what}" for count, what in sorted(counts, key=lambda pair: (-pair[0], pair[1]))]


LISTS = {
    listed.__name__: listed
    for listed in (circles, state_users, called_once, untyped, files, functions, comments, one_importer, no_verb)
}
"""Functions whose finds can be printed one by one; those of ``crowded_folders`` and ``write_trip`` can be, too."""


def finds(name: str, root: Path) -> list[str]:
    """Return what is behind one count, by the name of the function that finds it."""
    if name == write_trip.__name__:
        return write_trip()
    if name == crowded_folders.__name__:
        return _ranked((count, folder) for folder, count in crowded_folders(root).items())
    return [str(found) for found in LISTS[name](read_modules(root))]


def measure(root: Path = ROOT) -> dict[str, float]:
    """Return every number of a checkout that needs no running, by the name of its row."""
    modules = read_modules(root)
    lengths = [len(module.source.splitlines()) for module in modules.values()]
    return {
        "import circles": len(circles(modules)),
        "modules in import circles": sum(map(len, circles(modules))),
        "folders over 15 files": len(crowded_folders(root)),
        "files that touch .stm, .pending, .newest": len(state_users(modules, strict=False)),
        "the same, parameters and strings too": len(state_users(modules)),
        "functions called at most once, at most 6 lines": len(called_once(modules)),
        "Any, its aliases, object": len(untyped(modules)),
        "files": len(lengths),
        "median lines of a file": median(lengths),
        "most lines of a file": max(lengths),
        "functions": len(function_lengths(modules)),
        "median lines of a function": median(function_lengths(modules)),
        "comments per 100 lines": round(100 * comment_share(modules), 1),
        "files with one importer": len(one_importer(modules)),
        "docstrings that begin with no verb": len(no_verb(modules)),
    }


def write_calls() -> Counter[tuple[str, str]]:
    """Count the calls into ``mplus/`` of one write to a memory in a directory, by file and function, in first order.

    The memory is of the 5-layer decoder that comes with mplus, and the text is one chunk of at most 128 tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mplus

    home = Path(mplus.__file__).parent
    decoder = str(home / "data" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    mplus.wrap(model, mplus.MPlusConfig(chunk_tokens=128, memory_tokens_per_chunk=16, short_term_tokens=64))
    text = "Once upon a time a girl named Lily found a red stone in the garden. " * 4
    codes: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{home}/"):
            codes[frame.f_code] += 1

    with tempfile.TemporaryDirectory() as folder, mplus.Memory.open(folder, model, tokenizer=tokenizer) as memory:
        sys.setprofile(count)
        try:
            memory.write(text, source="Lily")
        finally:
            sys.setprofile(None)
    calls: Counter[tuple[str, str]] = Counter()
    for code, number in codes.items():
        calls[str(Path(code.co_filename).relative_to(home)), f"{code.co_qualname} :{code.co_firstlineno}"] += number
    return calls


def write_trip() -> list[str]:
    """Return the files that one write runs through, in order of first call, each with its functions and their calls."""
    by_file: dict[str, list[str]] = {}
    for (file, function), number in write_calls().items():
        by_file.setdefault(file, []).append(f"    {number:4} {function}")
    return [f"{file}\n" + "\n".join(functions) for file, functions in by_file.items()]


def write_path() -> dict[str, int]:
    """Return how many calls into ``mplus/``, distinct functions and files one write runs (see ``write_calls``)."""
    calls = write_calls()
    return {
        "calls in one write": calls.total(),
        "functions in one write": len(calls),
        "files in one write": len({file for file, _ in calls}),
    }


def main() -> None:
    """Print the numbers of a checkout, as a table or as JSON."""
    parser = argparse.ArgumentParser(description="Count what the shape of the code costs its readers.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to count; default: this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write-path", action="store_true", help="also run one write of the mplus that Python finds")
    names = [*LISTS, crowded_folders.__name__, write_trip.__name__]
    parser.add_argument(
        "--list",
        nargs="?",
        const="all",
        choices=[*names, "all"],
        help="print what is counted, not how much of it there is; without a name, of all counts that need no running, "
        "or with --write-path the files that one write runs through",
    )
    asked = parser.parse_args()
    if asked.list:
        every = [write_trip.__name__] if asked.write_path else names[:-1]
        for name in every if asked.list == "all" else [asked.list]:
            print(*([f"== {name}"] if asked.list == "all" else []), *finds(name, asked.root), sep="\n")
        return
    numbers = {**measure(asked.root), **(write_path() if asked.write_path else {})}
    if asked.json:
        print(json.dumps(numbers, indent=2))
    else:
        for name, number in numbers.items():
            print(f"{name:<48}{number:>8g}")


if __name__ == "__main__":
    main()
