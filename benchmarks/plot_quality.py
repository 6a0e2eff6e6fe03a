"""Draws docs/assets/quality.svg, quality against size of SmolLM2, from benchmarks/results/figures.json.

    python benchmarks/plot_quality.py

What is off the scale is left to the table.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
TEXT = "wikitext2-test"
LINE = "fast"
DOTS = {"modegpt": "MoDeGPT", "skipcat": "SkipCat", "obd-llm": "OBD-LLM", "svd-llm": "SVD-LLM"}
"""Methods that were measured at some sizes alone."""
TITLE = "SmolLM2-135M-Instruct, perplexity on WikiText-2 (lower is better)"
WIDTH, HEIGHT = 680, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 172, 44, 52
TICKS = (20, 30, 40, 50, 60, 70, 80)
REMOVED = (0, 10, 20, 30, 40)

STYLE = """
    .bg { fill: #ffffff } text { fill: #1d2733; font-size: 13px } .title { font-size: 15px; font-weight: 600 }
    .grid { stroke: #d8dee5 } .axis { stroke: #5b6b7b } .line { fill: none; stroke-width: 2.5 }
    .own { stroke: #b35900 } .dense { stroke: #5b6b7b; stroke-dasharray: 5 4 }
    .dot-own { fill: #b35900 } .dot-other { fill: #1565a8 }
    @media (prefers-color-scheme: dark) {
      .bg { fill: #14181d } text { fill: #e3e8ee } .grid { stroke: #2e3843 } .axis { stroke: #8796a5 }
      .own { stroke: #f0a04b } .dense { stroke: #8796a5 } .dot-own { fill: #f0a04b } .dot-other { fill: #62b0ee }
    }
"""


def read_results(text: str) -> dict[str, dict[int, float]]:
    """Perplexity by method and per cent removed, from the figures; ``dense`` has 0 removed."""
    found: dict[str, dict[int, float]] = {}
    for key, value in json.loads(text).items():
        name, _, removed = key.partition(" ")
        if "perplexity" in value:
            found.setdefault(name, {})[int(removed.rstrip("%") or 0)] = value["perplexity"][TEXT]
    return found


def draw(results: dict[str, dict[int, float]]) -> str:
    """The plot as SVG: text stays text, and colours follow a light or a dark page."""

    def x(removed: float) -> float:
        return LEFT + removed / REMOVED[-1] * (WIDTH - LEFT - RIGHT)

    def y(perplexity: float) -> float:
        return HEIGHT - BOTTOM - (perplexity - TICKS[0]) / (TICKS[-1] - TICKS[0]) * (HEIGHT - TOP - BOTTOM)

    dense = results["dense"][0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' role="img" font-family="system-ui, sans-serif">',
        "<title>Perplexity of SmolLM2-135M-Instruct on WikiText-2 by parameters removed</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="{LEFT}" y="26">{TITLE}</text>',
    ]
    for tick in TICKS:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for removed in REMOVED:
        parts.append(f'<text x="{x(removed):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{removed} %</text>')
    parts += [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text x="{x(20):.1f}" y="{HEIGHT - 10}" text-anchor="middle">parameters removed, of the whole model</text>',
        f'<line class="dense" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(dense):.1f}" y2="{y(dense):.1f}"/>',
        f'<text x="{WIDTH - RIGHT + 8}" y="{y(dense) + 4:.1f}">dense {dense:.1f}</text>',
    ]
    points = [(0, dense), *sorted(results[LINE].items())]
    line = " ".join(f"{x(r):.1f},{y(p):.1f}" for r, p in points)
    parts.append(f'<polyline class="line own" points="{line}"/>')
    for removed, perplexity in points[1:]:
        parts.append(f'<circle class="dot-own" cx="{x(removed):.1f}" cy="{y(perplexity):.1f}" r="4"/>')
        place = f'x="{x(removed):.1f}" y="{y(perplexity) + 20:.1f}" text-anchor="middle"'
        parts.append(f"<text {place}>{perplexity:.1f}</text>")
    last = points[-1]
    parts.append(f'<text x="{x(last[0]) + 12:.1f}" y="{y(last[1]) + 4:.1f}">{LINE} (no training)</text>')
    for method, label in DOTS.items():
        for removed, perplexity in results.get(method, {}).items():
            if perplexity <= TICKS[-1]:
                parts.append(f'<circle class="dot-other" cx="{x(removed):.1f}" cy="{y(perplexity):.1f}" r="4"/>')
                place = f'x="{x(removed) - 10:.1f}" y="{y(perplexity) + 4:.1f}" text-anchor="end"'
                parts.append(f"<text {place}>{label} {perplexity:.1f}</text>")
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    target = HERE.parent / "docs" / "assets" / "quality.svg"
    results = read_results((HERE / "results" / "figures.json").read_text(encoding="utf-8"))
    target.write_text(draw(results), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
