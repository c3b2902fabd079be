"""Figures of the pages as SVG, the same bytes on every machine."""

from __future__ import annotations

import html
from collections.abc import Sequence

LEFT, TOP, WIDTH, HEIGHT = 70, 20, 460, 260
"""The area of the curves, in pixels."""


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Return a label at ``x, y``."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def rule(y: float, words: str) -> list[str]:
    """Return a horizontal grid line with its label at the left."""
    line = f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
    return [line, text(LEFT - 8, y + 4, words, "end")]


def curve(points: Sequence[tuple[float, float]], colour: str, words: str) -> list[str]:
    """Return a line through ``points`` with a mark at each, and its name behind the last one."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points),
        text(points[-1][0] + 8, points[-1][1] + 4, words),
    ]


def picture(parts: Sequence[str], below: str, room: int = 90) -> str:
    """Return the SVG of ``parts`` with the caption ``below``, and ``room`` pixels for names at the right."""
    body = "\n".join([*parts, text(LEFT + WIDTH / 2, TOP + HEIGHT + 38, below, "middle")])
    return svg(body, LEFT + WIDTH + room, TOP + HEIGHT + 50)


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: str) -> str:
    """Return an SVG of horizontal bars: groups of (title, bars), and bars of (name, value, colour)."""
    left, width, line = 190, 430, 18
    parts, y = [], line
    for title, values in groups:
        parts.append(f'<text x="0.0" y="{y}" font-weight="bold">{html.escape(title)}</text>')
        y += line
        longest = max(value for _, value, _ in values)
        for name, value, colour in values:
            size = max(1.0, width * value / longest)
            parts.append(f'<rect x="{left}" y="{y - 11}" width="{size:.1f}" height="13" fill="{colour}"/>')
            parts += [text(0, y, name), text(left + size + 6, y, f"{value:,.1f} {unit}")]
            y += line
        y += line // 2
    return svg("\n".join(parts), left + width + 100, y)


def svg(body: str, width: int, height: int) -> str:
    """Return a white picture of this size in pixels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
