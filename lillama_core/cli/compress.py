"""``lillama compress``: make a model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lillama_core.cli.options import (
    MODEL,
    RecipeCommand,
    debug_option,
    device_option,
    exclusive,
    model_options,
    option,
    recipe_of,
    recipe_options,
    residency_options,
    tokenizer_option,
    track_option,
)
from lillama_core.cli.pushing import push_options, pushing
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError

if TYPE_CHECKING:
    from lillama_core.pipeline import Request


@click.command(cls=RecipeCommand, help=f"Make a model smaller. {MODEL}")
@model_options
@tokenizer_option
@option("-o", "--output", required=True, metavar="DIR", group="output", help="directory to make")
@option("--overwrite", is_flag=True, group="output", help="replace DIR, and forget an unfinished run")
@option("--resume", is_flag=True, group="output", help="go on from the last finished block")
@option(
    "--dry-run",
    is_flag=True,
    group="output",
    help="check the model, the data and the output, and print what 'lillama plan' does; nothing is written",
)
@option(
    "--target-size",
    metavar="SIZE",
    group="what to remove",
    help="what the files of weights may take, such as 100MB, in place of --reduction: weights are held in 8 bits where"
    " that suffices, else as many as need be in 4, and where that is too much ranks are lowered first",
)
@track_option
@option("--evaluate", is_flag=True, group="output", help="measure both models at the end, for the record and the card")
@push_options
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@recipe_options
@residency_options
@device_option
@debug_option
@click.pass_context
def compress(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with pushing(options), silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Compress, and print the result's sizes and place on stdout."""
    recipe = recipe_of(options)
    from lillama_core.estimates.sizes import parse_size
    from lillama_core.output.quantization_rows import before_rounding
    from lillama_core.pipeline import Request
    from lillama_core.pipeline import compress as compress_model
    from lillama_core.pipeline.to_size import compress_to_size

    request = Request(
        model=options["model"],
        output=Path(options["output"]),
        recipe=recipe,
        architecture=options["architecture"],
        tokenizer=options["tokenizer"],
        device=options["device"],
        stream=options["stream"],
        max_memory=None if options["max_memory"] is None else parse_size(options["max_memory"]),
        trust_remote_code=options["trust_remote_code"],
        evaluate=options["evaluate"],
        track=options["track"],
        overwrite=options["overwrite"],
        resume=options["resume"],
    )
    target = None if options["target_size"] is None else parse_size(options["target_size"], "--target-size")
    if options["dry_run"]:
        return show(request, target)
    verbosity: Any = "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal"
    record = compress_model(request, verbosity) if target is None else compress_to_size(request, target, verbosity)
    if not record.bytes:
        # Of several processes only one writes the result, and says so.
        return 0
    sizes, numbers = record.bytes, record.parameters
    print(
        f"parameters  {numbers['parameters_before']:,} -> {numbers['parameters_after']:,}"
        f"  ({-numbers['reduction']:+.1%})"
    )
    print(
        f"bytes       {sizes['dense']:,} -> {sizes['compressed']:,}"
        f"  ({sizes['compressed'] / sizes['dense'] - 1:+.1%}, {record.dtype})"
    )
    fidelity = record.fidelity or {}
    if fidelity.get("perplexity_after") is not None:
        print(
            f"perplexity  {fidelity['perplexity_before']:.2f} -> {fidelity['perplexity_after']:.2f}"
            f"  ({before_rounding(record, ', ')}calibration rows that chose nothing, {fidelity['tokens']} tokens)"
        )
    memory = f", peak memory {record.peak_memory_bytes / 1e6:,.0f} MB" if record.peak_memory_bytes else ""
    print(f"time        {record.seconds['total']:.0f} s{memory}")
    if (Path(options["output"]) / "report.html").is_file():
        print(f"report      {Path(options['output']) / 'report.html'}")
    if record.evaluation is not None:
        from lillama_core.evaluation.comparison import show_comparison
        from lillama_core.output.evaluation_rows import evaluated_of

        print(f"\n{show_comparison(evaluated_of(record.evaluation))}")
    return 0


def show(request: Request, target: int | None) -> int:
    """Check all of a request that can be checked without weights, and print its plan.

    Raises UserError where a run would be refused, in the end also for what the plan takes.
    """
    from lillama_core.models.gguf_header import parsed_once
    from lillama_core.pipeline.dry_run import dry_run, show_plan
    from lillama_core.pipeline.pipeline import check
    from lillama_core.pipeline.to_size import check_sized, lowering

    with parsed_once(request.model):
        if target is None:
            check(request)
        else:
            way = check_sized(request, target)
            print(f"--target-size: weights in 8 and 4 bits, {way.reduction:.1%} of the parameters removed before")
            if not way.reduction:
                return 0
            request = lowering(request, way)
        found = dry_run(
            request.model,
            request.recipe,
            request.architecture,
            request.trust_remote_code,
            stream=request.stream,
            max_memory=request.max_memory,
            device=request.device,
            output=request.output,
            evaluate=request.evaluate,
        )
    print(show_plan(found))
    if found["estimate"]["refused"]:
        raise UserError(found["estimate"]["refused"])
    return 0
