"""report.html of a result: one file that shows a run, readable without a network.

The plots are inline SVG. All that comes from a model or a recipe is escaped, by the template or by matplotlib.
"""

from __future__ import annotations

from pathlib import Path

from lillama_core.output.card import (
    changes,
    cost_rows,
    environment,
    fidelity_rows,
    recipe_rows,
    size_rows,
    source_rows,
    stages,
)
from lillama_core.output.evaluation_rows import evaluation_rows, left_out_rows, speed_rows
from lillama_core.output.numbers import count, number, percent, size
from lillama_core.output.plots import drawing, svg
from lillama_core.output.public import public_name
from lillama_core.output.quantization_rows import before_rounding, quantization_rows
from lillama_core.output.record import RunRecord
from lillama_core.output.report_plots import has_training, losses, rank_map, sizes, speeds, times, training
from lillama_core.output.stacks import stacks


def write_report(result: Path, record: RunRecord) -> None:
    """Write report.html to ``result``."""
    with drawing():
        sections = [
            {
                "stack": stack,
                "ranks": svg(rank_map(stack)) if stack.low_rank else None,
                "training": svg(training(stack)) if has_training(stack) else None,
            }
            for stack in stacks(record)
        ]
        spent = [(name, seconds) for name, seconds in stages(record) if seconds > 0]
        time_plot = svg(times(spent)) if spent else None
        size_plot = svg(sizes(changes(record)))
        loss_plot = svg(losses(record)) if record.losses.get("sizes") else None
        faster = speed_rows(record)
        speed_plot = svg(speeds(faster)) if faster else None
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
            loss_plot=loss_plot,
            speed_plot=speed_plot,
            evaluation=evaluation_rows(record),
            left_out=left_out_rows(record),
            answers=(record.evaluation or {}).get("answers", []),
            sizes=size_rows(record),
            quantization=quantization_rows(record.quantization),
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
    when = before_rounding(record, ", ")
    return f"{parameters}; perplexity {when}on rows that chose nothing {number(before)} → {number(after)}"


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers at the top."""
    parameters, weights = changes(record)[:2]
    found = record.fidelity or {}
    rows = [
        ("parameters", count(parameters.after), f"of {count(parameters.before)}"),
        ("weights", size(weights.after), f"of {size(weights.before)}"),
    ]
    before, after = found.get("perplexity_before"), found.get("perplexity_after")
    when = before_rounding(record, "; ")
    if before is not None and after is not None:
        rows.append(("perplexity", number(after), f"{when}dense model: {number(before)}"))
    if found.get("divergence") is not None:
        rows.append(("divergence", number(found["divergence"]), f"{when}nats per token from the dense model"))
    if found.get("agreement") is not None:
        rows.append(("agreement", percent(found["agreement"]), f"{when}same most likely next token"))
    elif found.get("relative_error") is not None:
        rows.append(("relative error", number(found["relative_error"]), f"{when}of the outputs"))
    cost = dict(cost_rows(record))
    if "time" in cost:
        memory = f"peak memory {cost['peak memory']}" if "peak memory" in cost else f"on {record.device}"
        rows.append(("time", cost["time"], memory))
    return rows
