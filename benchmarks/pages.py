"""results.md and results.html: the results of a suite as tables, and as plots of quality against size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

import lillama_core.output
from lillama_benchmarks.results import DENSE, Result, by_model, with_retention
from lillama_benchmarks.suites import SUITES
from lillama_core.output.numbers import count, duration, number, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
"""Of the methods in the plots (Okabe & Ito's, told apart by the colour-blind too), on light and dark ground."""
MARKERS = "osD^vPX"
IN_A_COLUMN = ("footprint/parameters",)
"""Metrics that the tables show of every model anyway."""


@dataclass(frozen=True)
class Table:
    """The results of one model, ready to be shown."""

    model: str
    architecture: str
    header: list[str]
    rows: list[list[str]]
    failures: list[tuple[str, str]]
    """Name of a cell and what went wrong."""
    meanings: list[tuple[str, str]]
    """Name of a metric and what it means."""
    options: list[tuple[str, str]]
    """Name of a cell and what its commands were told."""


def table(model: str, rows: list[Result]) -> Table:
    """``rows``: the results of one model, the dense one first."""
    metrics: dict[str, dict[str, Any]] = {}
    for row in rows:
        for metric in row.metrics:
            if metric["name"] not in IN_A_COLUMN:
                metrics.setdefault(metric["name"], metric)
    heads = [f"{name}{' (' + m['unit'] + ')' if m['unit'] else ''} {_arrow(m)}" for name, m in metrics.items()]
    good = [row for row in rows if row.error is None]
    return Table(
        model,
        next((row.architecture for row in rows if row.architecture), ""),
        ["method", "removed", "parameters", "weights", *heads, "time", "peak memory"],
        [
            [
                row.method,
                "" if row.method == DENSE else f"{100 * row.reduction:g} %",
                "" if row.parameters is None else count(row.parameters),
                "" if row.bytes is None else size(row.bytes),
                *(_value(row.metric(name)) for name in metrics),
                "" if row.seconds is None else duration(row.seconds),
                "" if row.peak_memory_bytes is None else size(row.peak_memory_bytes),
            ]
            for row in good
        ],
        [(_cell(row), row.error) for row in rows if row.error is not None],
        [(name, _meaning(metric)) for name, metric in metrics.items()],
        [(_cell(row), _told(row)) for row in rows],
    )


def _arrow(metric: dict[str, Any]) -> str:
    return "↑" if metric["better"] == "higher" else "↓"


def _meaning(metric: dict[str, Any]) -> str:
    data = metric.get("data")
    return metric["meaning"] if data is None else f"{metric['meaning']} SHA-256 of the data: {data}."


def _value(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "—"
    error, interval = metric.get("standard_error"), metric.get("interval")
    if interval is not None:
        low, high = interval
        return f"{number(metric['value'])} [{low:.2f}, {high:.2f}]"
    return number(metric["value"]) if error is None else f"{number(metric['value'])} ± {error:.2g}"


def _cell(row: Result) -> str:
    return row.method if row.method == DENSE else f"{row.method} {100 * row.reduction:g} %"


def _told(row: Result) -> str:
    """The options of a cell in a line; of paths their last parts."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ",".join(map(shown, value))
        return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and "/" in value else str(value)

    groups = [("compress", row.options.get("compress", {}))]
    groups += [("evaluate", e) for e in row.options.get("evaluate", [])]
    return "; ".join(
        f"{name} " + (" ".join(f"{k}={shown(v)}" for k, v in options.items()) or "as by default")
        for name, options in groups
        if options or name == "evaluate"
    )


def where(results: Iterable[Result]) -> list[str]:
    """Machines and versions, each once."""
    found: dict[str, None] = {}
    for result in results:
        if result.machine:
            machine = ", ".join(f"{k} {v}" for k, v in result.machine.items())
            versions = ", ".join(f"{k} {v}" for k, v in result.versions.items())
            found[f"{machine}; {versions}"] = None
    return list(found)


def markdown(suite: str, results: list[Result]) -> str:
    """The page results.md."""
    known = SUITES.get(suite)
    parts = [f"# Suite {suite}\n", *([f"{_escaped(known.protocol)}\n"] if known and known.protocol else [])]
    for model, rows in by_model(results).items():
        shown = table(model, with_retention(rows, known.retained if known else ()))
        parts.append(f"## {model}\n")
        if shown.architecture:
            parts.append(f"Architecture `{shown.architecture}`.\n")
        if shown.rows:
            lines = [shown.header, ["---", *["---:"] * (len(shown.header) - 1)], *shown.rows]
            parts.append("\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines) + "\n")
        if shown.failures:
            parts.append("\n".join(f"- {cell} failed: {_escaped(error)}" for cell, error in shown.failures) + "\n")
        parts.append("<details><summary>Metrics and options</summary>\n")
        parts.append("\n".join(f"- {name}: {_escaped(meaning)}" for name, meaning in shown.meanings) + "\n")
        parts.append("\n".join(f"- {cell}: `{told}`" for cell, told in shown.options) + "\n")
        parts.append("</details>\n")
    parts += [f"Measured on {line}.\n" for line in where(results)]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def quality_metric(rows: list[Result]) -> str | None:
    """The metric that a plot shows: the first one that the architecture's evaluation gives for compressed models."""
    compressed = [row for row in rows if row.method != DENSE and row.metrics]
    return compressed[0].metrics[0]["name"] if compressed else None


def plot(rows: list[Result], methods: list[str]) -> Figure | None:
    """Quality against parameters, a line for each method; ``methods`` gives the colours. None when there is nothing."""
    from lillama_core.output.plots import FAINT, GRID, INK, WIDTH, new_figure, style

    name = quality_metric(rows)
    if name is None:
        return None
    figure = new_figure(WIDTH, 3.6)
    axes = figure.add_subplot()
    sample: dict[str, Any] = {}
    values: list[float] = []
    for row in rows:
        metric = row.metric(name)
        if row.method == DENSE and metric is not None and row.parameters is not None:
            axes.axhline(metric["value"], color=FAINT, linewidth=1.0, linestyle="--")
            axes.plot([row.parameters], [metric["value"]], color=INK, marker="*", markersize=9, linestyle="none",
                      label="dense")  # fmt: skip
    for method in methods:
        points = []
        for row in rows:
            metric = row.metric(name)
            if row.method != method or metric is None or row.parameters is None or not math.isfinite(metric["value"]):
                continue
            points.append((row.parameters, metric["value"]))
            values.append(metric["value"])
            sample = metric
        if points:
            place = methods.index(method)
            axes.plot(*zip(*sorted(points), strict=True), color=COLOURS[place % len(COLOURS)],
                      marker=MARKERS[place % len(MARKERS)], linewidth=1.4, label=method)  # fmt: skip
    if not values:
        return None
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.set_xlabel("parameters")
    unit = f" ({sample['unit']})" if sample["unit"] else ""
    axes.set_title(f"{name}{unit}, {sample['better']} is better", loc="left", color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    style(axes)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    return figure


def page(suite: str, results: list[Result]) -> str:
    """The page results.html, which needs nothing besides itself."""
    from lillama_core.output.plots import drawing, svg

    known = SUITES.get(suite)
    methods = list(dict.fromkeys(r.method for r in results if r.method != DENSE))
    sections = []
    with drawing():
        for model, rows in by_model(results).items():
            figure = plot(rows, methods)
            shown = table(model, with_retention(rows, known.retained if known else ()))
            sections.append({"table": shown, "plot": None if figure is None else svg(figure)})
    folders = [Path(__file__).parent, *map(Path, lillama_core.output.__path__)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("results.html.j2").render(
        suite=suite,
        protocol=known.protocol if known else "",
        sections=sections,
        where=where(results),
        cells=sum(r.method != DENSE for r in results),
        failed=sum(r.error is not None for r in results),
    )


def write_pages(folder: Path, suite: str, results: list[Result]) -> None:
    """Write both pages into ``folder``, over older ones."""
    for name, text in (("results.md", markdown(suite, results)), ("results.html", page(suite, results))):
        unfinished = folder / f"{name}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
