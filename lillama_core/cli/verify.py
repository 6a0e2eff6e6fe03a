"""``lillama verify``: check a compressed directory."""

from __future__ import annotations

from typing import Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, option
from lillama_core.cli.silence import silence_transformers


@click.command(
    cls=LillamaCommand,
    help="Check a compressed directory without running it: config, shapes, orders, finite numbers, hashes of the files."
    " DIR is what 'lillama compress' or 'lillama finetune' has made. Exit status 1 says that something is wrong.",
)
@click.argument("model", metavar="DIR")
@option("--architecture", metavar="NAME", group="model", help="use this architecture instead of the one found")
@option("--trust-remote-code", is_flag=True, group="model", help="run code that the model brings (off by default)")
@option("-q", "--quiet", is_flag=True, group="output", help="print nothing but the result and errors")
@debug_option
def verify(**options: Any) -> int:
    """Check, and say what was found sound."""
    from lillama_core.pipeline.verify import verify as check

    with silence_transformers():
        found = check(options["model"], options["architecture"], options["trust_remote_code"], options["quiet"])
    hashes = (
        f"{found.hashed} as recorded" if found.hashed else "no hashes in the record, which an earlier version wrote"
    )
    print(f"weight files  {found.files}, {hashes}")
    print(f"blocks        {found.blocks}")
    print(f"tensors       {found.tensors}, all of the shape that the config asks for, and finite")
    return 0
