"""A dot with its interval for each arm, a panel a figure, as one self-contained SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, LINE, HEAD = 640, 150, 70, 22, 40
WIDE = 50  # a panel whose ends are so many times apart is drawn on a logarithmic scale
ARM, OTHER = "#1f7a6d", "#8a8f94"


class Dot(NamedTuple):
    """A figure and the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    text: str
    arm: bool  # or a model that was not trained here


class Panel(NamedTuple):
    """One figure of all arms."""

    title: str
    hint: str
    dots: Sequence[Dot]


def dot_chart(title: str, panels: Sequence[Panel]) -> str:
    """The chart; every panel has a scale of its own."""
    height = HEAD + sum(HEAD + LINE * len(panel.dots) for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"',
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="14">{escape(title)}</text>',
    ]
    top = float(HEAD)
    for panel in panels:
        parts += _panel(panel, top)
        top += HEAD + LINE * len(panel.dots)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: float) -> list[str]:
    low, high = min(dot.low for dot in panel.dots), max(dot.high for dot in panel.dots)
    logarithmic = low > 0 and high > WIDE * low
    hint = f"{panel.hint}; logarithmic" if logarithmic else panel.hint

    def across(value: float) -> float:
        place, first, last = (math.log(v) if logarithmic else v for v in (value, low, high))
        return LEFT + (WIDTH - LEFT - RIGHT) * ((place - first) / (last - first) if last > first else 0.5)

    parts = [
        f'<text x="12" y="{top + 14}" font-weight="bold">{escape(panel.title)}</text>',
        f'<text x="{WIDTH - 12}" y="{top + 14}" text-anchor="end" fill="#63676a">{escape(hint)}</text>',
    ]
    for number, dot in enumerate(panel.dots):
        down, colour = top + HEAD - 8 + LINE * number, ARM if dot.arm else OTHER
        parts += [
            f'<text x="{LEFT - 12}" y="{down + 4}" text-anchor="end">{escape(dot.name)}</text>',
            f'<line x1="{across(dot.low):.1f}" x2="{across(dot.high):.1f}" y1="{down}" y2="{down}" stroke="{colour}" '
            'stroke-width="2"/>',
            f'<circle cx="{across(dot.value):.1f}" cy="{down}" r="4" fill="{colour}"/>',
            f'<text x="{WIDTH - 12}" y="{down + 4}" text-anchor="end">{escape(dot.text)}</text>',
        ]
    return parts
