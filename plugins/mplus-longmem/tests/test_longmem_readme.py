"""The README's example runs."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs() -> None:
    [example] = [part.split("```")[0] for part in README.read_text(encoding="utf-8").split("```python\n")[1:]]
    found: dict[str, object] = {}
    exec(example, found)
    assert found["memory"].stores[0].count(0) > 0  # type: ignore[attr-defined]
