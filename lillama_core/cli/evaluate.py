"""``lillama evaluate``: measure a model, beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import (
    MODEL,
    LillamaCommand,
    debug_option,
    device_option,
    exclusive,
    model_options,
    option,
    tokenizer_option,
)
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError


def _path(options: dict[str, Any], name: str) -> Path | None:
    value = options[name]
    if value == "":
        # Path("") is the current directory.
        raise UserError(f"--{name.replace('_', '-')} names nothing; give a path")
    return None if value is None else Path(value)


@click.command(
    cls=LillamaCommand,
    help=f"Measure a model with the metrics of its architecture's plugin, dense or compressed. {MODEL}",
)
@model_options
@tokenizer_option
@option("--baseline", metavar="MODEL", group="comparison", help="measure this model as well, side by side")
@option(
    "--baseline-details",
    metavar="DIR",
    group="comparison",
    help="compare with a model measured before: what --details kept of it",
)
@option("--metrics", default="", metavar="A,B", group="measurement", help="measure these alone (default: all)")
@option("--data", metavar="SRC", group="measurement", help="text for perplexity (default: the offline set)")
@option(
    "--tasks",
    default="",
    metavar="A,B",
    group="measurement",
    help="lm-eval tasks, 'paper' for the paper's (default: the offline set)",
)
@option(
    "--sequence-length",
    type=int,
    default=512,
    metavar="N",
    group="measurement",
    help="tokens in a window (default: 512)",
)
@option(
    "--windows",
    type=int,
    default=40,
    metavar="N",
    group="measurement",
    help="windows of text, 0 for all (default: 40)",
)
@option("--limit", type=int, metavar="N", group="measurement", help="items of each task (default: all)")
@option(
    "--shots",
    type=int,
    default=0,
    metavar="N",
    group="measurement",
    help="solved examples before each item of a task (default: 0)",
)
@option(
    "--dtype",
    metavar="auto|float32|bfloat16|float16",
    group="measurement",
    help="what to compute in; auto: what each model is stored in (default: float32 on a CPU, else auto)",
)
@option(
    "--answers",
    type=int,
    default=0,
    metavar="N",
    group="measurement",
    help="show what each model answers to N questions, or its transcripts of N utterances (default: 0)",
)
@option(
    "--stream/--no-stream",
    default=None,
    group="memory",
    help="read the models' blocks from disk whenever they run, or hold models in memory (default: as they fit)",
)
@option("--seed", type=int, default=0, metavar="N", group="measurement", help="seed of everything random")
@option("--json", metavar="FILE", group="output", help="write the numbers to a file as well")
@option("--details", metavar="DIR", group="output", help="keep what is compared case by case (transcripts, routing)")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@device_option
@debug_option
@click.pass_context
def evaluate(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "baseline", "baseline-details")
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Measure, and print a table on stdout, and JSON into a file when asked."""
    from lillama_core.evaluation.base import EvaluationOptions
    from lillama_core.evaluation.comparison import show_answers, show_comparison
    from lillama_core.pipeline.evaluate import EvaluationRequest, compare
    from lillama_core.system.processes import world_of_environment

    request = EvaluationRequest(
        models=tuple(m for m in (options["baseline"], options["model"]) if m is not None),
        options=EvaluationOptions(
            data=options["data"],
            tasks=tuple(t for t in options["tasks"].split(",") if t),
            sequence_length=options["sequence_length"],
            windows=options["windows"],
            limit=options["limit"],
            shots=options["shots"],
            answers=options["answers"],
            seed=options["seed"],
            details=_path(options, "details"),
        ),
        metrics=tuple(m for m in options["metrics"].split(",") if m),
        baseline_details=_path(options, "baseline_details"),
        architecture=options["architecture"],
        tokenizer=options["tokenizer"],
        device=options["device"],
        dtype=options["dtype"],
        trust_remote_code=options["trust_remote_code"],
        stream=options["stream"],
        json_file=_path(options, "json"),
        quiet=options["quiet"],
    )
    found = compare(request)
    if world_of_environment().is_main:
        print(show_comparison(found))
        if request.options.answers:
            print(show_answers(found))
    return 0
