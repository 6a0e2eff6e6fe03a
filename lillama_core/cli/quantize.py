"""``lillama quantize``: hold the weights of a model in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import (
    LillamaCommand,
    debug_option,
    exclusive,
    model_options,
    option,
    tokenizer_option,
)
from lillama_core.cli.silence import silence_transformers


@click.command(
    cls=LillamaCommand,
    help="Hold the weights of linear layers, low-rank factors and token tables in 8 or 4 bits. MODEL is a directory"
    " that 'lillama compress' has made, or a dense model: a Hub id, a directory with safetensors, or a .gguf file.",
)
@model_options
@tokenizer_option
@option("-o", "--output", required=True, metavar="DIR", group="output", help="directory to make")
@option("--overwrite", is_flag=True, group="output", help="replace DIR")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@option("--bits", type=int, default=8, metavar="8|4", group="rounding", help="bits of a weight (default: 8)")
@option(
    "--embedding-bits",
    type=int,
    default=8,
    metavar="8|4",
    group="rounding",
    help="bits of token embeddings and output heads (default: 8)",
)
@option(
    "--exclude",
    multiple=True,
    metavar="PATH",
    group="rounding",
    help="module whose weights stay as they are; may be given several times",
)
@debug_option
@click.pass_context
def quantize(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Quantise, and print what came of it on stdout."""
    from lillama_core.pipeline.quantize import QuantizeRequest
    from lillama_core.pipeline.quantize import quantize as work

    found = work(
        QuantizeRequest(
            model=options["model"],
            output=Path(options["output"]),
            bits=options["bits"],
            table_bits=options["embedding_bits"],
            exclude=options["exclude"],
            architecture=options["architecture"],
            tokenizer=options["tokenizer"],
            trust_remote_code=options["trust_remote_code"],
            overwrite=options["overwrite"],
        ),
        "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal",
    )
    held = ", ".join(f"{count} in {bits} bits" for bits, count in found.matrices.items())
    print(f"matrices    {held}")
    print(f"weights     {found.bytes_before / 1e6:,.1f} MB -> {found.bytes_after / 1e6:,.1f} MB")
    print(f"time        {found.seconds:.0f} s")
    return 0
