"""Small pictures in SVG for the pages, the same on every machine."""

from __future__ import annotations

import html
from collections.abc import Sequence

LEFT, TOP, WIDTH, HEIGHT = 70, 20, 460, 260
"""Where the curves are drawn, in pixels."""


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def rule(y: float, words: str) -> list[str]:
    """A horizontal line with its label at the left."""
    line = f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
    return [line, text(LEFT - 8, y + 4, words, "end")]


def curve(points: Sequence[tuple[float, float]], colour: str, words: str) -> list[str]:
    """A line through ``points``, each marked, and its name behind the last one."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points),
        text(points[-1][0] + 8, points[-1][1] + 4, words),
    ]


def picture(parts: Sequence[str], below: str, room: int = 90) -> str:
    """All of it, with ``below`` under the axis; ``room`` in pixels for the names at the right."""
    body = "\n".join([*parts, text(LEFT + WIDTH / 2, TOP + HEIGHT + 38, below, "middle")])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + room}" height="{TOP + HEIGHT + 50}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
