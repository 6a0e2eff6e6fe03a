"""``lillama doctor``: what is installed, what works here, and what to install."""

from __future__ import annotations

from typing import Any

import click

import lillama_registry
from lillama_core.cli.options import LillamaCommand, debug_option


@click.command(
    cls=LillamaCommand,
    help="Say what lillama finds on this machine: versions, devices, arithmetic, plugins, caches, and what the extras"
    " lack. Exit status 1 says that something that is installed does not work.",
)
@debug_option
def doctor(**_: Any) -> int:
    """Print what was found, one topic a line."""
    from lillama_core.system.diagnosis import broken_requirements, extras, machine_lines

    faults = 0
    for topic, text in machine_lines():
        print(f"{topic:<10} {text}")
    for reason in broken_requirements():
        faults += 1
        print(f"{'missing':<10} {reason}: lillama needs it")
    found = lillama_registry.registry()
    print(f"{'plugins':<10} {', '.join(p.name for p in found.loaded)}")
    for failure in found.failures:
        faults += 1
        print(f"{'plugin':<10} {failure.name} ({failure.distribution}) cannot be loaded: {failure.reason}")
    for conflict in found.conflicts:
        faults += 1
        print(f"{'plugins':<10} {conflict}")
    for extra in extras():
        lacks = (
            f"lacks {', '.join(extra.missing)}: pip install 'lillama[{extra.name}]'" if extra.missing else "complete"
        )
        print(f"{'extra':<10} {extra.name}: {lacks}")
    return 1 if faults else 0
