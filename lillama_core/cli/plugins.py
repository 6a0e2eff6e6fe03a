"""``lillama plugins``: who provides what, and what could not be loaded."""

from __future__ import annotations

import json
from typing import Any

import click

import lillama_registry
from lillama_core.cli.options import LillamaCommand, debug_option, option


@click.command(cls=LillamaCommand, help="List plugins, what each provides and where it comes from.")
@option("--json", is_flag=True, help="print JSON")
@debug_option
def plugins(**options: Any) -> int:
    """Parse the options and run."""
    return run(options)


def run(options: dict[str, Any]) -> int:
    """Print a listing or JSON on stdout."""
    found = lillama_registry.registry()
    if options["json"]:
        listed = [
            {"plugin": p.name, "distribution": p.distribution, "version": p.version, "provides": found.provides(p)}
            for p in found.loaded
        ]
        failed = [{"plugin": f.name, "distribution": f.distribution, "error": f.reason} for f in found.failures]
        conflicts = [
            {"kind": c.kind, "name": c.name, "plugins": [f"{p.name} ({p.distribution})" for p in c.plugins]}
            for c in found.conflicts
        ]
        print(json.dumps({"plugins": listed, "failed": failed, "conflicts": conflicts}, indent=1))
        return 0
    for plugin in found.loaded:
        print(f"{plugin.name}  ({plugin.distribution} {plugin.version})")
        for kind, names in found.provides(plugin).items():
            print(f"  {kind}: {', '.join(names)}")
    for failure in found.failures:
        print(f"{failure.name}  ({failure.distribution})  not loaded: {failure.reason}")
    for conflict in found.conflicts:
        print(f"conflict: {conflict}")
    return 0
