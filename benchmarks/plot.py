"""A line chart as one self-contained SVG: a panel a series over a shared, logarithmic x axis."""

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

WIDTH, PANEL, LEFT, GAP = 640, 150, 70, 46


def line_chart(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> str:
    """The chart; `x` are the same for every series."""
    height = GAP + len(series) * (PANEL + GAP)
    low, high = log2(min(x)), log2(max(x))

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 30) * ((log2(value) - low) / (high - low) if high > low else 0.5)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"',
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, values) in enumerate(series.items()):
        top, most = GAP + number * (PANEL + GAP), max(values) or 1.0
        points = [(across(at), top + PANEL - PANEL * value / most) for at, value in zip(x, values, strict=True)]
        path = " ".join(f"{left:.1f},{down:.1f}" for left, down in points)
        parts += [
            f'<text x="{LEFT}" y="{top - 6}">{escape(name)}</text>',
            f'<line x1="{LEFT}" y1="{top + PANEL}" x2="{WIDTH - 30}" y2="{top + PANEL}" stroke="#888"/>',
            f'<text x="{LEFT - 6}" y="{top + 5}" text-anchor="end">{most:.3g}</text>',
            f'<text x="{LEFT - 6}" y="{top + PANEL}" text-anchor="end">0</text>',
            f'<polyline points="{path}" fill="none" stroke="#2563eb" stroke-width="2"/>',
            *(f'<circle cx="{left:.1f}" cy="{down:.1f}" r="3" fill="#2563eb"/>' for left, down in points),
            *(
                f'<text x="{left:.1f}" y="{top + PANEL + 15}" text-anchor="middle">{at:g}</text>'
                for at, (left, _) in zip(x, points, strict=True)
            ),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
