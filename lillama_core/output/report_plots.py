"""The plots of report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lillama_core.output.card import Change
from lillama_core.output.numbers import duration, percent
from lillama_core.output.plots import (
    AFTER,
    BEFORE,
    FAINT,
    GRID,
    INK,
    WIDTH,
    plain_labels,
    room_for,
    roomy_figure,
    style,
)
from lillama_core.output.record import RunRecord
from lillama_core.output.stacks import Stack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUMBERS = 0.55
"""Inches for the numbers beside an axis."""


def short(value: float, _: object) -> str:
    """A number beside an axis."""
    return f"{value:.3g}"


def _block_ticks(axes: Axes, blocks: int, most: int) -> None:
    """Numbers of blocks below an axis, at most ``most`` of them."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, blocks) if blocks / s <= most)
    axes.set_xticks(range(0, blocks, step))
    axes.set_xlabel("block")


def rank_map(stack: Stack) -> Figure:
    """Heat map: part of the parameters that each map keeps; dense maps are hatched."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    names, blocks = list(stack.cells), len(stack.blocks)
    fractions = [c.kept_fraction for row in stack.cells.values() for c in row.values() if c.smaller]
    # From the next lower tenth, so that neighbours can be told apart; up to all, so that colours keep their meaning.
    lowest = min(math.floor(min(fractions) * 10) / 10, 0.9)
    norm = Normalize(lowest, 1.0)
    colours = colormaps["cividis"]
    figure = roomy_figure(WIDTH, 1.1 + 0.3 * len(names), room_for(names), right=0.8, bottom=0.5)
    axes = figure.add_subplot()
    grid = [[math.nan] * blocks for _ in names]
    for y, row in enumerate(stack.cells.values()):
        for x, cell in row.items():
            if cell.smaller:
                grid[y][x] = cell.kept_fraction
                if blocks <= 16:
                    ink = "black" if norm(cell.kept_fraction) > 0.55 else "white"
                    axes.text(
                        x, y, f"{100 * cell.kept_fraction:.0f}", ha="center", va="center", color=ink, fontsize=8.5
                    )
            else:
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor=FAINT, hatch="////", linewidth=0)
                )
    columns, rows = [x - 0.5 for x in range(blocks + 1)], [y - 0.5 for y in range(len(names) + 1)]
    axes.pcolormesh(columns, rows, grid, cmap=colours, norm=norm)
    axes.set_xlim(-0.5, blocks - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    plain_labels(axes.get_yticklabels())
    _block_ticks(axes, blocks, most=32)
    style(axes)
    axes.spines["bottom"].set_visible(False)
    # Drawn as cells rather than as the picture that matplotlib's colour bar would embed.
    steps = 48
    edges = [lowest + (1 - lowest) * i / steps for i in range(steps + 1)]
    bar = axes.inset_axes((1.02, 0, 0.015, 1))
    bar.pcolormesh([0, 1], edges, [[(low + high) / 2] for low, high in pairwise(edges)], cmap=colours, norm=norm)
    style(bar)
    bar.spines["bottom"].set_visible(False)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return figure


def _values(stack: Stack, key: str) -> list[float]:
    """One number for each block; nan where there is none that a logarithmic axis can show."""
    found = [block.get(key) for block in stack.blocks]
    return [v if isinstance(v, int | float) and math.isfinite(v) and v > 0 else math.nan for v in found]


def has_training(stack: Stack) -> bool:
    keys = ("loss_before", "loss_after", "error_before", "error_after")
    return any(not math.isnan(v) for key in keys for v in _values(stack, key))


def training(stack: Stack) -> Figure:
    """Held-out loss and relative error of each block's output, before and after training."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = roomy_figure(WIDTH, 3.2, NUMBERS, top=0.6, bottom=0.5)
    panels = (("loss", "loss on rows that chose nothing"), ("error", "relative squared error of the output"))
    handles: list[Any] = []
    for column, (key, title) in enumerate(panels):
        axes = figure.add_subplot(1, 2, column + 1)
        lines = []
        series = [("after", AFTER, "o", "-", "after training" if stack.trained else "without training")]
        if stack.trained:
            series.insert(0, ("before", BEFORE, "s", "--", "before training"))
        for when, colour, marker, dashes, label in series:
            values = _values(stack, f"{key}_{when}")
            if all(math.isnan(v) for v in values):
                continue
            lines += axes.plot(
                values, color=colour, marker=marker, linestyle=dashes, markersize=3.5, linewidth=1.4, label=label
            )
        if lines:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(short)
        handles = handles or lines
        axes.set_xlim(-0.5, len(stack.blocks) - 0.5)
        axes.set_title(title, loc="left", color=INK, fontsize=10, y=1)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        _block_ticks(axes, len(stack.blocks), most=16)
        style(axes)
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    """``text`` to the right of a bar's end."""
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=9)


def times(times: list[tuple[str, float]]) -> Figure:
    """Bars: where the time went."""
    figure = roomy_figure(WIDTH, 0.5 + 0.32 * len(times), room_for([name for name, _ in times]))
    axes = figure.add_subplot()
    longest, total = max(s for _, s in times), sum(s for _, s in times)
    axes.barh(range(len(times)), [s for _, s in times], color=AFTER, height=0.62)
    for y, (_, seconds) in enumerate(times):
        _beside(axes, seconds, y, f"{duration(seconds)} ({percent(seconds / total)})")
    axes.set_yticks(range(len(times)), [name for name, _ in times])
    plain_labels(axes.get_yticklabels())
    axes.set_xlim(0, longest * 1.3)
    axes.invert_yaxis()
    axes.set_xticks([])
    style(axes)
    axes.spines["bottom"].set_visible(False)
    return figure


def sizes(rows: list[Change]) -> Figure:
    """Pairs of bars: dense and compressed, each pair relative to its dense one."""
    figure = roomy_figure(WIDTH, 0.45 + 0.62 * len(rows), room_for([change.label for change in rows]))
    axes = figure.add_subplot()
    for y, change in enumerate(rows):
        pairs = (
            (-0.2, 1.0, BEFORE, change.before, ""),
            (0.2, change.ratio, AFTER, change.after, f" ({percent(change.ratio)})"),
        )
        for offset, length, colour, value, note in pairs:
            axes.barh(y + offset, length, color=colour, height=0.36)
            _beside(axes, length, y + offset, f"{change.unit(value)}{note}")
    axes.set_yticks(range(len(rows)), [change.label for change in rows])
    axes.set_xlim(0, 1.3)
    axes.invert_yaxis()
    axes.set_xticks([])
    style(axes)
    axes.spines["bottom"].set_visible(False)
    return figure


def losses(record: RunRecord) -> Figure:
    """What other sizes would lose, with this run's point; and what parts of the model lost against the prediction."""
    found = record.losses
    parts = [
        (predicted, measured) for _, predicted, measured in found.get("parts", []) if predicted > 0 and measured > 0
    ]
    figure = roomy_figure(WIDTH, 3.4, NUMBERS, top=0.35, bottom=0.5)
    axes = figure.add_subplot(1, 2 if parts else 1, 1)
    axes.plot(
        [100 * reduction for reduction, _ in found["sizes"]],
        [loss for _, loss in found["sizes"]],
        color=BEFORE, marker="s", linestyle="--", markersize=3.5, linewidth=1.4, label="predicted, untrained",
    )  # fmt: skip
    removed = 100 * record.parameters["reduction"]
    axes.plot([removed], [found["predicted"]], color=BEFORE, marker="D", linestyle="none", label="this plan, untrained")
    measured = (record.fidelity or {}).get("divergence")
    if found["unit"].startswith("nats") and measured is not None:
        axes.plot([removed], [measured], color=AFTER, marker="o", linestyle="none", label="this result, measured")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters removed, %")
    axes.set_title(f"loss, {found['unit']}", loc="left", color=INK, fontsize=10, y=1)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    every = [axes]
    if parts:
        every.append(figure.add_subplot(1, 2, 2))
        ends = min(min(p) for p in parts) / 1.5, max(max(p) for p in parts) * 1.5
        every[1].plot(ends, ends, color=FAINT, linewidth=0.8)
        every[1].plot(*zip(*parts, strict=True), color=AFTER, marker="o", linestyle="none", markersize=4)
        every[1].set_xscale("log")
        every[1].set_yscale("log")
        every[1].xaxis.set_major_formatter(short)
        every[1].set_xlabel("predicted")
        every[1].set_title("measured, of parts of the model by themselves", loc="left", color=INK, fontsize=10, y=1)
    for panel in every:
        panel.yaxis.set_major_formatter(short)
        panel.grid(color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        style(panel)
    return figure


def speeds(rows: Sequence[tuple[str, float, str]]) -> Figure:
    """Bars: how many times as fast as the dense model, which is the line at 1; label, times and note of each."""
    figure = roomy_figure(WIDTH, 0.6 + 0.36 * len(rows), room_for([label for label, _, _ in rows]))
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [times for _, times, _ in rows], color=AFTER, height=0.62)
    axes.axvline(1, color=INK, linewidth=0.8)
    for y, (_, times, note) in enumerate(rows):
        _beside(axes, times, y, f"{times:.2f} times{note}")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    plain_labels(axes.get_yticklabels())
    axes.set_xlim(0, 1.6 * max(1.0, *(times for _, times, _ in rows)))
    axes.invert_yaxis()
    axes.set_xticks([])
    style(axes)
    axes.spines["bottom"].set_visible(False)
    return figure
