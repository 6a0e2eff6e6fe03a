"""``lillama strategies``: what can be chosen by name, with the options that each choice brings."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option
from lillama_core.cli.silence import silence_transformers
from lillama_core.errors import UserError, nearest
from lillama_core.recipe.model import SLOTS, STAGES
from lillama_core.strategies import get, names, options_of


@click.command(
    cls=LillamaCommand,
    help="List the strategies that --init, --allocation, --loss and --format choose from, with their options.",
)
@click.argument("which", metavar="[SLOT|KIND|NAME]", required=False)
@debug_option
def strategies(which: str | None) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run({"which": which})


def run(options: dict[str, Any]) -> int:
    """Print all strategies on stdout, or those of one slot (``init``), kind (``initializers``) or name."""
    which = options["which"]
    slots = {**SLOTS, STAGES: "stages"}
    all_of = {slot: names(kind) for slot, kind in slots.items()}
    chosen = {
        slot: [name for name in found if which in (None, slot, slots[slot], name)] for slot, found in all_of.items()
    }
    if not any(chosen.values()):
        known = [*slots, *slots.values(), *(name for found in all_of.values() for name in found)]
        raise UserError(f"no strategy or kind of strategy is named {which!r}{nearest(which, known)}")
    print("\n\n".join("\n".join(_section(slot, slots[slot], found)) for slot, found in chosen.items() if found))
    return 0


def _section(slot: str, kind: str, found: list[str]) -> Iterator[str]:
    yield "stages" if slot == STAGES else f"--{slot} ({kind})"
    for name in found:
        try:
            strategy = get(kind, name)
        except UserError as error:
            yield f"  {name}  cannot be used: {error}"
            continue
        of = strategy if isinstance(strategy, type) else type(strategy)
        summary = (inspect.getdoc(of) or "").split("\n\n")[0]
        yield from _wrapped(f"{name}  ", " ".join(summary.split()), "  ")
        for option, field in options_of(strategy).model_fields.items():
            default = "" if field.default is None else f" (default: {field.default})"
            text = f"{field.description or ''}{default}"
            owner = f"{slot}.{name}" if slot == STAGES else slot
            yield from _wrapped(f"--{owner}.{option.replace('_', '-')}  ", text, "      ")


def _wrapped(head: str, text: str, indent: str) -> list[str]:
    return textwrap.wrap(head + text, width=110, initial_indent=indent, subsequent_indent=indent + "    ")
