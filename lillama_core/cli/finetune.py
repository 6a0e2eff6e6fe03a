"""``lillama finetune``: train a compressed model as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import (
    RECIPE,
    LillamaCommand,
    choice_options,
    data_options,
    debug_option,
    device_option,
    exclusive,
    option,
    sources_of,
    tokenizer_option,
    track_option,
)
from lillama_core.cli.pushing import push_options, pushing
from lillama_core.cli.silence import silence_transformers
from lillama_core.cli.values import offered
from lillama_core.healing.options import DATA_FIELDS, EPOCHS, TOKENS, HealingOptions
from lillama_core.recipe.model import dashed
from lillama_core.strategies.options import StrategyChoice, validated_options


@click.command(
    cls=LillamaCommand,
    help="Train a compressed model as a whole, by what the dense model says. MODEL is a directory that"
    " 'lillama compress' has made; the trained one is written beside it.",
)
@click.argument("model", metavar="MODEL", shell_complete=offered)
@option("--teacher", metavar="DENSE", group="model", help="the dense model: a hub id, a directory or a .gguf file")
@option("--architecture", metavar="NAME", group="model", help="use this architecture instead of the one found")
@option("--trust-remote-code", is_flag=True, group="model", help="run code that the model brings (off by default)")
@tokenizer_option
@option("-o", "--output", required=True, metavar="DIR", group="output", help="directory to make")
@option("--overwrite", is_flag=True, group="output", help="replace DIR, and forget an unfinished run")
@option("--resume", is_flag=True, group="output", help="go on from the last evaluation")
@push_options
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@option("-v", "--verbose", is_flag=True, group="output", help="print more")
@option(
    "--data",
    multiple=True,
    metavar="SRC",
    group="data",
    help="what to train on: a text, JSONL or Parquet file, a dataset name, or 'self'; SRC@WEIGHT to mix several",
)
@data_options(DATA_FIELDS, {"tokens": TOKENS})
@option(
    "--epochs",
    type=click.FloatRange(0, 1000, min_open=True),
    default=EPOCHS,
    metavar="X",
    group="training",
    help=f"how often the training goes through the data (default: {EPOCHS:g})",
)
@track_option
@choice_options(HealingOptions, "training")
@device_option
@debug_option
@click.pass_context
def finetune(context: click.Context, **options: Any) -> int:
    """Parse the options and run."""
    exclusive(context, "quiet", "verbose")
    with pushing(options), silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Train, and print what came of it on stdout."""
    own = {name: options[name] for name in HealingOptions.model_fields if options[name] is not None}
    choice = StrategyChoice(name="finetune", options=own)
    healing = validated_options(HealingOptions, choice, {name: dashed(name) for name in own}, {})
    assert isinstance(healing, HealingOptions)
    from lillama_core.pipeline.finetune import FinetuneRequest, data_recipe
    from lillama_core.pipeline.finetune import finetune as train

    given = {name: options[f"{RECIPE}{name}"] for name in DATA_FIELDS if options[f"{RECIPE}{name}"] is not None}
    recipe = data_recipe(healing.objective, {**given, "calibration": sources_of(options["data"])})
    request = FinetuneRequest(
        model=options["model"],
        output=Path(options["output"]),
        teacher=options["teacher"],
        recipe=recipe,
        options=healing,
        epochs=options["epochs"],
        architecture=options["architecture"],
        tokenizer=options["tokenizer"],
        device=options["device"],
        trust_remote_code=options["trust_remote_code"],
        track=options["track"],
        overwrite=options["overwrite"],
        resume=options["resume"],
    )
    record = train(request, "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal")
    told = record.healing[-1]
    first, best = told["curve"][0], min(told["curve"], key=lambda point: point["loss"])
    print(f"loss        {first['loss']:.4f} -> {best['loss']:.4f}  (rows that chose the weights, step {best['step']})")
    before, after = told["fidelity_before"] or {}, record.fidelity or {}
    if after.get("perplexity_after") is not None:
        print(
            f"perplexity  {before['perplexity_after']:.2f} -> {after['perplexity_after']:.2f}, dense"
            f" {after['perplexity_before']:.2f}  (rows that chose nothing, {after['tokens']} tokens)"
        )
    if told["ended"]:
        print(f"ended early {told['ended']}")
    print(f"time        {told['seconds']:.0f} s, peak memory {record.peak_memory_bytes / 1e6:,.0f} MB")
    print(f"report      {Path(options['output']) / 'report.html'}")
    return 0
