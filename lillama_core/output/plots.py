"""What the plots of lillama's pages have in common.

They are inline SVG by matplotlib whose colours are variables of the page's style sheet, so that they follow its light
and dark themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
"""Of a plot as wide as the page, in matplotlib's inches of 72 points."""

INK, FAINT, GRID, BEFORE, AFTER = "#010101", "#010102", "#010103", "#010104", "#010105"
"""Stand-ins for colours of the style sheet, which are put in their place in the finished SVG."""

THEME = {INK: "--ink", FAINT: "--faint", GRID: "--grid", BEFORE: "--before", AFTER: "--after"}


def drawing() -> AbstractContextManager[None]:
    """Settings of matplotlib for its calls inside: text stays text, and ids are the same for the same numbers."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lillama"})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches of 72 points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def roomy_figure(
    width: float, height: float, left: float, right: float = 0.1, top: float = 0.1, bottom: float = 0.1
) -> Figure:
    """The same with room of these inches around its plots, for titles at ``y=1``.

    To have matplotlib measure it takes longer than all the drawing, and it measures a font that the page does not have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="none")
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=2 * left / width,
    )
    return figure


def room_for(labels: Sequence[str]) -> float:
    """Inches that these labels take beside an axis, in small print."""
    return 0.15 + min(0.07 * max(map(len, labels), default=0), WIDTH / 2)


def style(axes: Axes) -> None:
    """Thin lines, and colours that stand in for those of the page."""
    from matplotlib.transforms import ScaledTranslation

    axes.set_facecolor("none")
    axes.tick_params(colors=INK, which="both", length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(10)
    if axes.figure.get_layout_engine() is None:
        # Where matplotlib would move them to, had it measured the numbers that are in between.
        below = ScaledTranslation(0, -0.25, axes.figure.dpi_scale_trans)
        axes.xaxis.set_label_coords(0.5, 0, axes.transAxes + below)
        axes.yaxis.set_label_coords(0, 0.5)


def plain_labels(labels: Sequence[Any]) -> None:
    """Names are no formulas: a dollar sign in one must not start mathematics."""
    for label in labels:
        label.set_parse_math(False)


def svg(figure: Figure) -> Markup:
    """``figure`` as an inline SVG element in the page's colours, with neither links nor a fixed size."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for stand_in, variable in THEME.items():
        text = text.replace(stand_in, f"var({variable})")
    # Escaped by matplotlib: what it draws is written as XML text.
    return Markup(text)
