"""``lillama plugin check NAME``: the conformance kit on the command line."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lillama_registry import hookimpl, registry


@hookimpl
def lillama_commands(subparsers: Any) -> None:
    plugin = subparsers.add_parser("plugin", help="check that a plugin's architectures do what they must")
    commands = plugin.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = commands.add_parser(
        "check",
        help="run the conformance kit",
        description="Try an architecture on a tiny random model of each of its model types, or on a model of yours.",
    )
    parser.add_argument("name", metavar="NAME", help="a plugin or an architecture; auto with --model")
    parser.add_argument("--model", metavar="DIR", help="check on this model instead of tiny ones")
    parser.add_argument(
        "--calibration", metavar="SRC", action="append", help="its calibration data (default: what the kit has)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run_plugin_check)


def run_plugin_check(options: argparse.Namespace) -> int:
    """One line a check on stdout; 0 when all passed, 1 otherwise. Raises UserError for an unknown name."""
    from lillama_core.architecture.auto import AUTO
    from lillama_core.errors import LillamaError, UserError, nearest, one_line
    from lillama_testing.checks import CHECKS, Outcome, run_check
    from lillama_testing.tiny import make_tiny_model, specimen_at

    found = registry()
    chosen = [a for a in found.architectures if options.name in (a.name, found.plugin_of(a).name)]
    if not chosen and not (options.name == AUTO and options.model is not None):
        failed = next((f for f in found.failures if f.name == options.name), None)
        if failed is not None:
            raise UserError(f"plugin {failed.name!r} could not be loaded: {failed.reason}")
        known = sorted({n for a in found.architectures for n in (a.name, found.plugin_of(a).name)})
        raise UserError(
            f"no plugin with architectures is named {options.name!r} (there are: {', '.join(known)})"
            f"{nearest(options.name, known)}"
        )
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        line = f"{'ok    ' if outcome.passed else 'FAILED'}  {outcome.model_type}  {outcome.check}"
        print(line if outcome.passed else f"{line}: {outcome.error}", flush=True)

    if options.model is not None:
        tiny = specimen_at(Path(options.model), options.name, tuple(options.calibration or ()))
        for name in CHECKS:
            tell(run_check(name, tiny))
    else:
        types = [(a, t) for a in chosen for t in a.model_types]
        if not types:
            raise UserError(f"architecture {options.name!r} claims no model type; name a model with --model")
        with tempfile.TemporaryDirectory() as scratch:
            for architecture, model_type in types:
                try:
                    made = make_tiny_model(architecture, model_type, Path(scratch) / model_type)
                except LillamaError as error:
                    tell(Outcome(architecture.name, model_type, "tiny model", one_line(error)))
                    continue
                for name in CHECKS:
                    tell(run_check(name, made))
    wrong = sum(not o.passed for o in outcomes)
    print(f"{len(outcomes) - wrong} of {len(outcomes)} checks passed")
    return 1 if wrong else 0
