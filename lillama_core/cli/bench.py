"""``lillama bench``: how fast a compressed model is beside the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, device_option, model_options, option
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError


@click.command(
    cls=LillamaCommand,
    help="Compare the speed of a compressed model with that of the dense one, in turns in one process: prompts and"
    " decoding for what writes text, the encoder and decoding for speech, forward passes for others. MODEL is a"
    " directory that 'lillama compress' has made, or any other model.",
)
@model_options
@option(
    "--baseline",
    metavar="MODEL",
    group="comparison",
    help="the dense model (default: one of the same config with random weights, which is as fast)",
)
@option(
    "--lengths",
    default="128,512",
    metavar="N,N",
    group="measurement",
    help="tokens of the prompts (default: 128,512)",
)
@option(
    "--new-tokens",
    type=int,
    default=32,
    metavar="N",
    group="measurement",
    help="tokens that are written to measure decoding (default: 32)",
)
@option(
    "--batch-sizes",
    default="1",
    metavar="N,N",
    group="measurement",
    help="rows that are worked on at once (default: 1)",
)
@option("--repeats", type=int, default=10, metavar="N", group="measurement", help="rounds of each work (default: 10)")
@option(
    "--dtype",
    default="auto",
    metavar="auto|float32|bfloat16|float16",
    group="measurement",
    help="what to compute in, both models (default: auto, what MODEL is stored in)",
)
@option("--threads", type=int, metavar="N", group="measurement", help="threads of torch (default: its own choice)")
@option("--json", metavar="FILE", group="output", help="write the numbers to a file as well")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@device_option
@debug_option
def bench(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run(options)


def run(options: dict[str, Any]) -> int:
    """Measure, and print a table and what it says on stdout."""
    from lillama_core.data.workload import WorkloadOptions
    from lillama_core.speed.bench import BenchRequest
    from lillama_core.speed.bench import bench as measure

    request = BenchRequest(
        model=options["model"],
        baseline=options["baseline"],
        work=WorkloadOptions(
            lengths=whole_numbers("--lengths", options["lengths"]),
            new_tokens=options["new_tokens"],
            batch_sizes=whole_numbers("--batch-sizes", options["batch_sizes"]),
        ),
        repeats=options["repeats"],
        dtype=options["dtype"],
        threads=options["threads"],
        architecture=options["architecture"],
        device=options["device"],
        trust_remote_code=options["trust_remote_code"],
        json_file=None if options["json"] is None else Path(options["json"]),
        quiet=options["quiet"],
    )
    print(measure(request))
    return 0


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers in ``1,2,3``; raises UserError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{name} must be whole numbers with commas between them, not {text!r}") from None
