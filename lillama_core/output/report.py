"""report.html of a result: one file that shows a run, readable without a network.

The plots are inline SVG. All that comes from a model or a recipe is escaped, by the template or by matplotlib.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama_core.allocation.plan import rank_range
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.output.card import (
    Change,
    changes,
    cost_rows,
    environment,
    fidelity_rows,
    recipe_rows,
    size_rows,
    source_rows,
    stages,
)
from lillama_core.output.numbers import count, duration, number, percent, size
from lillama_core.output.plots import (
    AFTER,
    BEFORE,
    FAINT,
    GRID,
    INK,
    WIDTH,
    drawing,
    new_figure,
    plain_labels,
    style,
    svg,
)
from lillama_core.output.public import public_name
from lillama_core.output.record import RunRecord
from lillama_core.strategies import make

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40
"""Map names of a heat map; beyond, names that differ in numbers alone (experts.0, experts.1) share a row."""


@dataclass
class Cell:
    """The maps of one name in one block: their ranks (None: dense) and parameters."""

    ranks: list[int | None] = field(default_factory=list)
    dense: int = 0
    kept: int = 0

    def add(self, rank: int | None, dense: int, kept: int) -> None:
        self.ranks.append(rank)
        self.dense += dense
        self.kept += kept

    @property
    def smaller(self) -> bool:
        return self.kept < self.dense

    @property
    def kept_fraction(self) -> float:
        """Part of the dense parameters that is kept."""
        return self.kept / self.dense

    @property
    def text(self) -> str:
        """The rank, the range of several, or "dense"; of matrices that lost channels alone the part that is kept."""
        whole = all(rank is None for rank in self.ranks)
        return f"{100 * self.kept_fraction:.0f} %" if whole and self.smaller else rank_range(self.ranks)


@dataclass
class Stack:
    """A stack of blocks: what the run noted of each, and its maps as a table of names by blocks."""

    name: str
    blocks: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, dict[int, Cell]] = field(default_factory=dict)
    """Name of a map within its block -> number of the block -> cell."""
    shapes: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    @property
    def low_rank(self) -> bool:
        return any(cell.smaller for row in self.cells.values() for cell in row.values())

    @property
    def trained(self) -> bool:
        return any(block.get("steps") for block in self.blocks)


def write_report(result: Path, record: RunRecord) -> None:
    """Write report.html to ``result``."""
    with drawing():
        sections = [
            {
                "stack": stack,
                "ranks": svg(_rank_map(stack)) if stack.low_rank else None,
                "training": svg(_training(stack)) if _has_training(stack) else None,
            }
            for stack in stacks(record)
        ]
        times = [(name, seconds) for name, seconds in stages(record) if seconds > 0]
        time_plot = svg(_times(times)) if times else None
        size_plot = svg(_sizes(changes(record)))
    page = (
        environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            name=public_name(record.model).removesuffix(".gguf"),
            verdict=verdict(record),
            tiles=tiles(record),
            sections=sections,
            time_plot=time_plot,
            size_plot=size_plot,
            sizes=size_rows(record),
            fidelity=fidelity_rows(record),
            recipe=recipe_rows(record),
            data=record.data,
            sources=source_rows(record),
            cost=cost_rows(record),
            versions=list(record.versions.items()),
            record=record,
        )
    )
    (result / "report.html").write_text(page, encoding="utf-8")


def verdict(record: RunRecord) -> str:
    """The run in one line."""
    numbers = [f"{c.unit(c.before)} → {c.unit(c.after)}" for c in changes(record)[:2]]
    parameters = f"{percent(record.parameters['reduction'])} smaller: {numbers[0]} parameters, {numbers[1]}"
    found = record.fidelity or {}
    before, after = found.get("perplexity_before"), found.get("perplexity_after")
    if before is None or after is None:
        return parameters
    return f"{parameters}; perplexity on rows that chose nothing {number(before)} → {number(after)}"


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers at the top."""
    parameters, weights = changes(record)[:2]
    found = record.fidelity or {}
    rows = [
        ("parameters", count(parameters.after), f"of {count(parameters.before)}"),
        ("weights", size(weights.after), f"of {size(weights.before)}"),
    ]
    before, after = found.get("perplexity_before"), found.get("perplexity_after")
    if before is not None and after is not None:
        rows.append(("perplexity", number(after), f"dense model: {number(before)}"))
    if found.get("divergence") is not None:
        rows.append(("divergence", number(found["divergence"]), "nats per token from the dense model"))
    if found.get("agreement") is not None:
        rows.append(("agreement", percent(found["agreement"]), "same most likely next token"))
    elif found.get("relative_error") is not None:
        rows.append(("relative error", number(found["relative_error"]), "of the outputs"))
    cost = dict(cost_rows(record))
    if "time" in cost:
        memory = f"peak memory {cost['peak memory']}" if "peak memory" in cost else f"on {record.device}"
        rows.append(("time", cost["time"], memory))
    return rows


def stacks(record: RunRecord) -> list[Stack]:
    """The record's blocks and maps by stack, in the order of the run."""
    found: dict[str, Stack] = {}
    places: dict[str, tuple[Stack, int]] = {}
    for block in record.blocks:
        path, _, _ = block["name"].rpartition(".")
        stack = found.setdefault(path, Stack(path))
        places[block["name"]] = stack, len(stack.blocks)
        stack.blocks.append(block)
    outside: dict[str, Stack] = {}
    maps = []
    for name, (out, in_) in record.shapes.items():
        stack, position, inner = _place(name, places, outside)
        maps.append((stack, position, inner, name, out, in_))
    found = {**{f"{path} (outside)": s for path, s in outside.items()}, **found}
    crowded = {s.name for s in found.values() if len({m[2] for m in maps if m[0] is s}) > MOST_ROWS}
    format_ = make("formats", record.plan["format"])
    for stack, position, inner, name, out, in_ in maps:
        row = kind_of(inner) if stack.name in crowded else inner
        rank = record.plan["ranks"].get(name)
        left = record.plan.get("shapes", {}).get(name, (out, in_))
        kept = left[0] * left[1] if rank is None else format_.parameters(*left, rank)
        stack.cells.setdefault(row, {}).setdefault(position, Cell()).add(rank, out * in_, kept)
        stack.shapes.setdefault(row, set()).add((out, in_))
    return list(found.values())


def _place(name: str, places: dict[str, tuple[Stack, int]], outside: dict[str, Stack]) -> tuple[Stack, int, str]:
    """The stack, the block's number in it, and the name within the block of the map called ``name``.

    ``outside`` gets the stacks of maps that lie in no block.
    """
    block = name
    while block and block not in places:
        block = block.rpartition(".")[0]
    if not block:
        # The token embedding: a stack of one block, of which nothing else is noted.
        parent, _, inner = name.rpartition(".")
        return outside.setdefault(parent, Stack(parent or "model", [{"name": parent}])), 0, inner
    stack, position = places[block]
    return stack, position, name[len(block) + 1 :]


# Plots


def _block_ticks(axes: Axes, blocks: int, most: int) -> None:
    """Numbers of blocks below an axis, at most ``most`` of them."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, blocks) if blocks / s <= most)
    axes.set_xticks(range(0, blocks, step))
    axes.set_xlabel("block")


def _rank_map(stack: Stack) -> Figure:
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
    figure = new_figure(WIDTH, 1.1 + 0.3 * len(names))
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


def _has_training(stack: Stack) -> bool:
    keys = ("loss_before", "loss_after", "error_before", "error_after")
    return any(not math.isnan(v) for key in keys for v in _values(stack, key))


def _training(stack: Stack) -> Figure:
    """Held-out loss and relative error of each block's output, before and after training."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(WIDTH, 3.2)
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
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        handles = handles or lines
        axes.set_xlim(-0.5, len(stack.blocks) - 0.5)
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        _block_ticks(axes, len(stack.blocks), most=16)
        style(axes)
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    """``text`` to the right of a bar's end."""
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=9)


def _times(times: list[tuple[str, float]]) -> Figure:
    """Bars: where the time went."""
    figure = new_figure(WIDTH, 0.5 + 0.32 * len(times))
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


def _sizes(rows: list[Change]) -> Figure:
    """Pairs of bars: dense and compressed, each pair relative to its dense one."""
    figure = new_figure(WIDTH, 0.45 + 0.62 * len(rows))
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
