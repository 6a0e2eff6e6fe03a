"""``lillama completion``: the script by which a shell completes lillama's commands, options and values."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import get_completion_class

from lillama_core.cli.main import COMPLETION
from lillama_core.cli.options import LillamaCommand, debug_option

SHELLS = ("bash", "zsh", "fish")


@click.command(
    cls=LillamaCommand,
    help="Print a script that makes a shell complete lillama's commands, options and values: eval it in ~/.bashrc or"
    " ~/.zshrc, or write it to ~/.config/fish/completions/lillama.fish.",
)
@click.argument("shell", metavar="|".join(SHELLS), type=click.Choice(SHELLS))
@debug_option
@click.pass_context
def completion(context: click.Context, shell: str, **_: Any) -> int:
    """Print click's script for one shell."""
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, "lillama", COMPLETION).source())
    return 0
