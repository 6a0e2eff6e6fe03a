"""``lillama export``: write a compressed model as something that runs without lillama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, exclusive, option
from lillama_core.cli.pushing import push_options, pushing
from lillama_core.cli.silence import silence_transformers
from lillama_core.cli.values import offered
from lillama_core.strategies import names


@click.command(
    cls=LillamaCommand,
    help="Write a compressed model as something that runs without lillama. MODEL is a directory that 'lillama compress'"
    " has made. A fresh process without lillama compares the result with it before DIR appears.",
)
@click.argument("model", metavar="MODEL", shell_complete=offered)
@option("--to", required=True, metavar="FORMAT", group="output", help=f"one of {', '.join(names('exporters'))}")
@option("-o", "--output", required=True, metavar="DIR", group="output", help="directory to make")
@option("--overwrite", is_flag=True, group="output", help="replace DIR")
@option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    metavar="float32|bfloat16|float16",
    group="output",
    help="dtype of the weights (default: that of MODEL, or what suits the format)",
)
@push_options
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@option("--architecture", metavar="NAME", group="model", help="use this architecture instead of the one found")
@option("--trust-remote-code", is_flag=True, group="model", help="run code that the model brings (off by default)")
@debug_option
@click.pass_context
def export(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with pushing(options), silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Export, and print what came of it on stdout."""
    from lillama_core.exporting.run import ExportRequest
    from lillama_core.exporting.run import export as write

    request = ExportRequest(
        model=options["model"],
        to=options["to"],
        output=Path(options["output"]),
        dtype=options["dtype"],
        architecture=options["architecture"],
        trust_remote_code=options["trust_remote_code"],
        overwrite=options["overwrite"],
    )
    made = write(request, "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal")
    print(f"format      {made.to}, {made.bytes / 1e6:,.1f} MB in {options['output']}")
    for found in made.agreements:
        print(f"checked     {found.what}: difference {found.difference:.2g} (allowed: {found.allowed:.2g})")
    return 0
