"""``lillama analyze``: what a model would lose, before anything of it is compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@click.command(
    cls=RecipeCommand,
    help="Predict what a model loses at several sizes, and by which of its maps: passes over the dense model as"
    f" 'lillama compress' begins with, and nothing is written. {MODEL}",
)
@model_options
@tokenizer_option
@option("--json", metavar="FILE", group="output", help="write the numbers of every map to a file as well")
@option("--plot", metavar="FILE.svg", group="output", help="draw losses by size, and by map and depth")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@recipe_options
@residency_options
@device_option
@debug_option
@click.pass_context
def analyze(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Analyse, and print tables on stdout."""
    recipe = recipe_of(options)
    from lillama_core.estimates.sizes import parse_size
    from lillama_core.pipeline.analyze import analyze as work
    from lillama_core.pipeline.request import Request
    from lillama_core.system.files import write_json
    from lillama_core.system.regular import check_new_file

    files = {name: None if options[name] is None else Path(options[name]) for name in ("json", "plot")}
    for name, file in files.items():
        if file is not None:
            check_new_file(file, f"--{name}")
    request = Request(
        model=options["model"],
        output=Path("analysis"),
        recipe=recipe,
        architecture=options["architecture"],
        tokenizer=options["tokenizer"],
        device=options["device"],
        stream=options["stream"],
        max_memory=None if options["max_memory"] is None else parse_size(options["max_memory"]),
        trust_remote_code=options["trust_remote_code"],
    )
    found = work(request, "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal")
    print(found)
    if files["json"] is not None:
        write_json(files["json"], found.to_dict())
    if files["plot"] is not None:
        from lillama_core.output.analysis_plot import draw

        files["plot"].write_text(draw(found.to_dict()), encoding="utf-8")
    return 0
