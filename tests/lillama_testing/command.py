"""``lillama plugin new`` and ``lillama plugin check``: the beginning of a plugin, and the conformance kit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

import lillama_registry
from lillama_core.cli.options import LillamaCommand, option
from lillama_core.cli.silence import silence_transformers


@click.group(help="Begin a plugin, and check that its architectures do what they must.", no_args_is_help=False)
def plugin() -> None:
    """The group of what can be done with a plugin."""


@plugin.command(
    cls=LillamaCommand,
    short_help="run the conformance kit",
    help="Try an architecture on a tiny random model of each of its model types, or on a model of yours."
    " NAME is a plugin or an architecture; auto with --model.",
)
@click.argument("name", metavar="NAME")
@option("--model", metavar="DIR", help="check on this model instead of tiny ones")
@option("--calibration", metavar="SRC", multiple=True, help="its calibration data (default: what the kit has)")
@option("--debug", is_flag=True, help="show tracebacks")
def check(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run_plugin_check(options)


@plugin.command(
    cls=LillamaCommand,
    short_help="write a plugin's repository",
    help="Write the repository of a plugin for a family of causal language models: the architecture, the entry point, a"
    " test by the conformance kit, CI. NAME is the plugin's name, and the model type if transformers knows it by that.",
)
@click.argument("name", metavar="NAME")
@option("--model-type", metavar="TYPE", help="transformers' name of the family, as in config.json")
@option("-o", "--output", metavar="DIR", help="folder to make (default: lillama-NAME)")
@option("--debug", is_flag=True, help="show tracebacks")
def new(**options: Any) -> int:
    """Write the repository, and say what to do with it."""
    from lillama_testing.new import new_plugin

    name = options["name"]
    folder = Path(options["output"] or f"lillama-{name}")
    with silence_transformers():
        described = new_plugin(name, options["model_type"], folder)
    (model_type,) = described.model_types
    stacks = ", ".join(f"{stack} at {path}" for stack, path in described.stacks.items())
    print(f"wrote {folder}: {model_type}, {stacks}")
    print(f"next  pip install '{folder}[test]' && pytest {folder}")
    return 0


def run_plugin_check(options: dict[str, Any]) -> int:
    """One line a check on stdout; 0 when all passed, 1 otherwise. Raises UserError for an unknown name."""
    from lillama_core.architecture.auto import AUTO
    from lillama_core.errors import LillamaError, UserError, nearest, one_line
    from lillama_testing.checks import CHECKS, Outcome, run_check
    from lillama_testing.tiny import make_tiny_model, specimen_at

    if options["model"] == "":
        # Path("") is the current directory.
        raise UserError("--model names nothing; give a directory")
    if options["calibration"] and options["model"] is None:
        raise UserError("--calibration does nothing without --model: tiny models take data of the kit")
    found = lillama_registry.registry()
    chosen = [a for a in found.architectures if options["name"] in (a.name, found.plugin_of(a).name)]
    if not chosen and not (options["name"] == AUTO and options["model"] is not None):
        failed = next((f for f in found.failures if f.name == options["name"]), None)
        if failed is not None:
            raise UserError(f"plugin {failed.name!r} could not be loaded: {failed.reason}")
        known = sorted({n for a in found.architectures for n in (a.name, found.plugin_of(a).name)})
        raise UserError(
            f"no plugin with architectures is named {options['name']!r} (there are: {', '.join(known)})"
            f"{nearest(options['name'], known)}"
        )
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        line = f"{'ok    ' if outcome.passed else 'FAILED'}  {outcome.model_type}  {outcome.check}"
        print(line if outcome.passed else f"{line}: {outcome.error}", flush=True)

    if options["model"] is not None:
        tiny = specimen_at(Path(options["model"]), options["name"], options["calibration"])
        for name in CHECKS:
            tell(run_check(name, tiny, options["debug"]))
    else:
        # A table of many model types is tried where it is made.
        chosen = [a for a in chosen if not a.fallback] or chosen
        types = [(a, t) for a in chosen for t in a.model_types]
        if not types:
            raise UserError(f"architecture {options['name']!r} claims no model type; name a model with --model")
        with tempfile.TemporaryDirectory() as scratch:
            for architecture, model_type in types:
                try:
                    made = make_tiny_model(architecture, model_type, Path(scratch) / model_type)
                except LillamaError as error:
                    tell(Outcome(architecture.name, model_type, "tiny model", one_line(error)))
                    continue
                for name in CHECKS:
                    tell(run_check(name, made, options["debug"]))
    wrong = sum(not o.passed for o in outcomes)
    print(f"{len(outcomes) - wrong} of {len(outcomes)} checks passed")
    return 1 if wrong else 0
