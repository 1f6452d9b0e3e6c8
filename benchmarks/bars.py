"""Rates as horizontal bars in an SVG file, grouped by title: no plotting library for one picture.

A bar ends at the median; the line across its end goes from the smallest to the largest round. Each group has its own scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from pipeline.core.files import publish

LABELS, BARS, STEP = 230, 460, 24  # pixels: column of names, longest bar, height of a line


@dataclass(frozen=True, slots=True)
class Bar:
    """One rate of a group: `least` and `most` are the extremes of its rounds."""

    title: str
    name: str
    middle: float
    least: float
    most: float


def draw(path: Path, bars: list[Bar]) -> None:
    """Write the picture, whole or not at all; raises `PipelineError` when it cannot be written."""
    groups = [(title, list(group)) for title, group in groupby(bars, key=lambda bar: bar.title)]
    lines, y = [], STEP
    for title, group in groups:
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{escape(title)}: samples a second</text>')
        longest = max(bar.most for bar in group)
        for number, bar in enumerate(group, start=1):
            lines += _line(bar, y + number * STEP, BARS / longest, ours=bar.name.startswith("ours"))
        y += (len(group) + 2) * STEP
    size = f'width="{LABELS + BARS + 90}" height="{y}"'
    style = 'font-family="sans-serif" font-size="13"'
    with publish(path) as temporary:
        body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *lines])
        temporary.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n', encoding="utf-8")


def _line(bar: Bar, y: int, scale: float, *, ours: bool) -> Iterator[str]:
    colour = "#2a6f97" if ours else "#b0b7bd"
    least, middle, most = (LABELS + value * scale for value in (bar.least, bar.middle, bar.most))
    yield f'<text x="{LABELS - 8}" y="{y}" text-anchor="end">{escape(bar.name)}</text>'
    yield f'<rect x="{LABELS}" y="{y - 12}" width="{middle - LABELS:.1f}" height="15" fill="{colour}"/>'
    yield f'<path d="M{least:.1f} {y - 4.5}H{most:.1f}" stroke="black"/>'
    yield f'<text x="{most + 6:.1f}" y="{y}">{bar.middle:.2f}</text>'
