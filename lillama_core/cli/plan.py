"""``lillama plan``: ranks, parameters and memory before anything is computed."""

from __future__ import annotations

import json
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
)
from lillama_core.cli.silence import silence_transformers


@click.command(
    cls=RecipeCommand, help=f"Ranks, parameters, multiply-adds and memory, from the config and shapes alone. {MODEL}"
)
@model_options
@option("--json", is_flag=True, group="output", help="print JSON")
@recipe_options
@debug_option
def plan(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Plan, and print a table or JSON on stdout."""
    recipe = recipe_of(options)
    from lillama_core.pipeline.dry_run import dry_run, show_plan

    found = dry_run(options["model"], recipe, options["architecture"], options["trust_remote_code"])
    print(json.dumps(found, indent=1) if options["json"] else show_plan(found))
    return 0
