"""``lillama reproduce``: does a run give the same bytes again?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, exclusive, option, sources_of
from lillama_core.cli.silence import silence_transformers
from lillama_core.cli.values import offered

DIFFERENT = 3
"""Exit status when the run was repeated and gave something else."""


@click.command(
    cls=LillamaCommand,
    help="Repeat a compression from its record, and compare plan and files. DIR is a directory that 'lillama compress'"
    " has made. Models and files that the record names without their folders are looked for in the current directory."
    " Exit status 0 says the same bytes, 3 others, 2 that the run cannot be repeated so, and 1 that it failed.",
)
@click.argument("folder", metavar="DIR", shell_complete=offered)
@option("-o", "--output", metavar="DIR", group="output", help="keep the result here (default: compare and remove it)")
@option("--overwrite", is_flag=True, group="output", help="replace the directory of --output")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@option("--model", metavar="MODEL", group="what it was made of", help="where the dense model is now")
@option(
    "--calibration",
    multiple=True,
    metavar="SRC",
    group="what it was made of",
    help="where the calibration data is now: all sources, in their order, with their weights",
)
@option("--tokenizer", metavar="SRC", group="what it was made of", help="where the tokenizer is now, if one was named")
@option(
    "--trust-remote-code",
    is_flag=True,
    group="what it was made of",
    help="run code that the model brings (off by default)",
)
@option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: that of the record)")
@debug_option
@click.pass_context
def reproduce(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Repeat the run, and print on stdout what is not as it was."""
    from lillama_core.pipeline.reproduce import ReproduceRequest
    from lillama_core.pipeline.reproduce import reproduce as repeat

    request = ReproduceRequest(
        folder=Path(options["folder"]),
        output=None if options["output"] is None else Path(options["output"]),
        model=options["model"],
        calibration=tuple(sources_of(options["calibration"])),
        tokenizer=options["tokenizer"],
        device=options["device"],
        trust_remote_code=options["trust_remote_code"],
        overwrite=options["overwrite"],
    )
    found = repeat(request, "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal")
    for line in found.conditions:
        print(f"conditions  {line}")
    for line in found.differences:
        print(f"result      {line}")
    if found.differences:
        return DIFFERENT
    if found.files:
        print(f"same bytes  {found.files} files")
    return 0
