"""``lillama plan``: ranks, parameters, memory, disk and time before anything is computed."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from lillama_core.cli.options import (
    MODEL,
    RecipeCommand,
    debug_option,
    model_options,
    option,
    recipe_of,
    recipe_options,
    residency_options,
)
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError


@click.command(
    cls=RecipeCommand,
    help=f"Ranks, parameters, multiply-adds, memory, disk and time, from the config and shapes alone. {MODEL}",
)
@model_options
@option("--json", is_flag=True, group="output", help="print JSON")
@option(
    "--machine",
    metavar="NAME|FILE.yaml",
    group="estimate",
    help="estimate for this machine instead of the one at hand, such as a100-80gb; a file gives its own rates",
)
@option("--no-estimate", is_flag=True, group="estimate", help="leave out memory, disk and time")
@recipe_options
@residency_options
@debug_option
def plan(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Plan, and print a table or JSON on stdout."""
    recipe = recipe_of(options)
    from lillama_core.estimates.sizes import parse_size
    from lillama_core.pipeline.dry_run import dry_run, show_plan

    for name in ("machine", "stream", "max_memory"):
        if options["no_estimate"] and options[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect with --no-estimate: leave out one of them")

    memory = options["max_memory"]
    found = dry_run(
        options["model"],
        recipe,
        options["architecture"],
        options["trust_remote_code"],
        machine=options["machine"],
        stream=options["stream"],
        max_memory=None if memory is None else parse_size(memory),
        with_estimate=not options["no_estimate"],
        say=say,
    )
    print(json.dumps(found, indent=1) if options["json"] else show_plan(found))
    return 0


def say(text: str) -> None:
    """Tell somebody who waits at a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
