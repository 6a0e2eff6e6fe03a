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
)
from lillama_core.cli.silence import silence_transformers

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
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Compress, and print the result's sizes and place on stdout."""
    recipe = recipe_of(options)
    from lillama_core.estimates.sizes import parse_size
    from lillama_core.pipeline import Request
    from lillama_core.pipeline import compress as compress_model

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
        overwrite=options["overwrite"],
        resume=options["resume"],
    )
    if options["dry_run"]:
        return show(request)
    record = compress_model(request, "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal")
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
            f"  (calibration rows that chose nothing, {fidelity['tokens']} tokens)"
        )
    print(f"time        {record.seconds['total']:.0f} s, peak memory {record.peak_memory_bytes / 1e6:,.0f} MB")
    print(f"report      {Path(options['output']) / 'report.html'}")
    return 0


def show(request: Request) -> int:
    """Check all of a request that can be checked without weights, and print its plan."""
    from lillama_core.models.gguf_header import parsed_once
    from lillama_core.pipeline.dry_run import dry_run, show_plan
    from lillama_core.pipeline.pipeline import check

    with parsed_once(request.model):
        check(request)
        found = dry_run(
            request.model,
            request.recipe,
            request.architecture,
            request.trust_remote_code,
            stream=request.stream,
            max_memory=request.max_memory,
        )
    print(show_plan(found))
    return 0
