"""``lillama quantize``: hold the weights of a model in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import (
    RECIPE,
    LillamaCommand,
    data_options,
    debug_option,
    device_option,
    exclusive,
    model_options,
    option,
    sources_of,
    tokenizer_option,
)
from lillama_core.cli.pushing import push_options, pushing
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError
from lillama_core.quantization.options import DATA_FIELDS, TOKENS
from lillama_core.recipe.model import dashed


@click.command(
    cls=LillamaCommand,
    help="Hold the weights of linear layers, low-rank factors and token tables in 8 or 4 bits. MODEL is a directory"
    " that 'lillama compress' has made, or a dense model: a Hub id, a directory with safetensors, or a .gguf file.",
)
@model_options
@tokenizer_option
@option("-o", "--output", required=True, metavar="DIR", group="output", help="directory to make")
@option("--overwrite", is_flag=True, group="output", help="replace DIR")
@push_options
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@option("--bits", type=int, default=None, metavar="8|4", group="rounding", help="bits of a weight (default: 8)")
@option(
    "--target-size",
    metavar="SIZE",
    group="rounding",
    help="what the files of weights may take, such as 100MB: of the matrices as few as need be are held in 4 bits, the"
    " others in 8, so that outputs change least",
)
@option(
    "--embedding-bits",
    type=int,
    default=None,
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
@option(
    "--calibration",
    multiple=True,
    metavar="SRC",
    group="data",
    help="what weights in 4 bits are rounded for: a text, JSONL or Parquet file, a dataset name, or 'self'; SRC@WEIGHT"
    " to mix several; without it they are rounded by themselves",
)
@data_options(DATA_FIELDS, {"tokens": TOKENS, "self_share": 0.0})
@device_option
@debug_option
@click.pass_context
def quantize(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    exclusive(context, "target-size", "bits")
    exclusive(context, "target-size", "embedding-bits")
    with pushing(options), silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Quantise, and print what came of it on stdout."""
    given = {name: options[f"{RECIPE}{name}"] for name in DATA_FIELDS if options[f"{RECIPE}{name}"] is not None}
    sources = sources_of(options["calibration"])
    if not sources and (given or options["device"] != "auto"):
        name = dashed(next(iter(given), "device"))
        raise UserError(f"{name} does nothing without --calibration, the data that weights are rounded for")
    from lillama_core.estimates.sizes import parse_size
    from lillama_core.pipeline.quantize import QuantizeRequest, calibration_recipe
    from lillama_core.pipeline.quantize import quantize as work

    found = work(
        QuantizeRequest(
            model=options["model"],
            output=Path(options["output"]),
            bits=8 if options["bits"] is None else options["bits"],
            table_bits=8 if options["embedding_bits"] is None else options["embedding_bits"],
            target_size=None if options["target_size"] is None else parse_size(options["target_size"], "--target-size"),
            exclude=options["exclude"],
            architecture=options["architecture"],
            tokenizer=options["tokenizer"],
            trust_remote_code=options["trust_remote_code"],
            overwrite=options["overwrite"],
            calibration=calibration_recipe({**given, "calibration": sources}) if sources else None,
            device=options["device"],
        ),
        "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal",
    )
    held = ", ".join(f"{count} in {bits} bits" for bits, count in found.matrices.items())
    print(f"matrices    {held}{f', {found.with_feedback} with feedback' if found.with_feedback else ''}")
    print(f"weights     {found.bytes_before / 1e6:,.1f} MB -> {found.bytes_after / 1e6:,.1f} MB")
    print(f"time        {found.seconds:.0f} s")
    return 0
