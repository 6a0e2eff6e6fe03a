"""The plot of ``lillama analyze``: predicted loss by size, and by map and depth. An SVG that stands alone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from lillama_core.output.plots import new_figure, plain_labels

WIDTH = 10.0
INK = "#333333"


def draw(found: Mapping[str, Any]) -> str:
    """The SVG of an analysis, as its ``to_dict`` gives it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LogNorm

    maps = found["maps"]
    part = list(maps[0]["losses"])[-2] if maps else ""
    kinds = list(dict.fromkeys(m["kind"] for m in maps))
    blocks = 1 + max((m["block"] for m in maps), default=0)
    grid = [[math.nan] * blocks for _ in kinds]
    for m in maps:
        row, value = grid[kinds.index(m["kind"])], m["losses"][part]
        # Of experts the sum.
        before = row[m["block"]]
        row[m["block"]] = value if math.isnan(before) else before + value
    shown = [v for row in grid for v in row if v > 0]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lillama"}):
        figure = new_figure(WIDTH, 4.2 + 0.3 * len(kinds))
        figure.set_facecolor("white")
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1 + 0.3 * len(kinds)])
        sizes = found["sizes"]
        upper.plot([100 * s["reduction"] for s in sizes], [s["loss"] for s in sizes], marker="o", color="#1f5fa8")
        upper.set_xlabel("parameters removed, %")
        upper.set_ylabel(f"predicted loss, {found['unit']}")
        upper.set_ylim(bottom=0)
        lower.set_title(f"predicted loss of a map left with {float(part or 0):.0%} of its parameters", fontsize=10)
        if shown:
            norm = LogNorm(min(shown), max(max(shown), 1.01 * min(shown)))
            image = lower.pcolormesh(grid, cmap="cividis", norm=norm, rasterized=False)
            figure.colorbar(image, ax=lower, fraction=0.03)
        lower.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
        plain_labels(lower.get_yticklabels())
        lower.invert_yaxis()
        lower.set_xlabel("block")
        for axes in (upper, lower):
            axes.tick_params(colors=INK, labelsize=9)
        out = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    return out.getvalue()
