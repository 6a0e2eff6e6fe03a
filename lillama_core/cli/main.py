"""The command line: ``lillama compress | plan | evaluate | plugins``, and what plugins add.

Every field of the recipe is an option of ``compress`` under the same name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lillama_core.errors import OUT_OF_MEMORY, LillamaError, UserError, is_out_of_memory, nearest
from lillama_core.recipe.loading import load_recipe, recipe_names
from lillama_core.recipe.model import Recipe, dashed
from lillama_core.system.interrupt import noting_interrupts
from lillama_registry import registry


class _Parser(argparse.ArgumentParser):
    """argparse that reports a wrong command in the one line that every error of lillama has."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today is ambiguous when an option is added.
        super().__init__(**{"allow_abbrev": False, **options})
        self.set_defaults(command_parser=self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for a user's mistake, 1 for any other failure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    options = argparse.Namespace()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows no "→" gets a question mark instead of a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        with noting_interrupts(), contextlib.nullcontext() if debug else _silence():
            options = _parse(arguments)
            status: int = options.run(options)
            # Now, so that a closed pipe is noticed here.
            sys.stdout.flush()
        return status
    except LillamaError as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        kept = "; what was finished is kept, --resume goes on from there" if hasattr(options, "resume") else ""
        return _complain(f"interrupted{kept}", 1)
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`): nothing to say, and nobody to say it to. The interpreter would
        # try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            # Only a compression has all the options that may help.
            shorter = ", or lower --sequence-length" if hasattr(options, "sequence_length") else ""
            other = f"out of memory; free some memory{shorter}"
            return _complain(OUT_OF_MEMORY if hasattr(options, "resume") else other, 1)
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            return _complain(f"{error.strerror or error}{where}", 1)
        return _complain(f"{type(error).__name__}: {error} (--debug shows where)", 1)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the remarks of libraries off stderr: what matters to the user is said by lillama."""
    import transformers

    logging_of = transformers.utils.logging
    verbosity, bars = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    previous = logging.root.manager.disable
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        logging_of.set_verbosity(verbosity)
        if bars:
            logging_of.enable_progress_bar()


def _complain(message: str, status: int) -> int:
    print(f"lillama: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    options, extra = parser.parse_known_args(arguments)
    if extra:
        command = options.command_parser if hasattr(options, "command_parser") else parser
        known = [name for action in command._actions for name in action.option_strings]
        word = extra[0].partition("=")[0]
        what = "option" if word.startswith("-") else "argument"
        raise UserError(f"unknown {what} {word!r}{nearest(word, known)} (see '{command.prog} --help')")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands, those of plugins included."""
    parser = _Parser(
        prog="lillama",
        description="Make pretrained models smaller: low-rank linear maps, distilled block by block.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_compress(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    plugins = commands.add_parser("plugins", help="list plugins, what each provides and where it comes from")
    plugins.add_argument("--debug", action="store_true", help="show tracebacks")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=run_plugins)
    registry().add_commands(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from lillama_core.output.record import versions

        print(f"lillama {versions()['lillama']}")
        parser.exit(0)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local directory, or .gguf file")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="use this architecture instead of the one found by model type; 'auto' finds the blocks in the model",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings (off by default)"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe", "each option overrides the recipe; a YAML file takes the same names")
    group.add_argument(
        "--recipe",
        default="default",
        metavar="NAME|FILE.yaml",
        help=f"one of {', '.join(recipe_names())}, or a file (default: default)",
    )
    hints = typing.get_type_hints(Recipe)
    for spec in dataclasses.fields(Recipe):
        if spec.name == "name":
            continue
        shown = "" if spec.default in (None, ()) else f" (default: {spec.default})"
        arguments: dict[str, Any] = {
            "help": spec.metadata["help"] + shown,
            "default": None,
            "dest": f"recipe.{spec.name}",
        }
        hint = hints[spec.name]
        kind = next((t for t in typing.get_args(hint) if t is not type(None)), hint)
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            arguments |= {"action": "append", "metavar": "SRC" if spec.name == "calibration" else "NAME"}
        else:
            arguments |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}
            if spec.metadata["choices"]:
                arguments["metavar"] = "|".join(spec.metadata["choices"])
        group.add_argument(dashed(spec.name), **arguments)


def _recipe(options: argparse.Namespace) -> Recipe:
    given = {
        key.removeprefix("recipe."): value
        for key, value in vars(options).items()
        if key.startswith("recipe.") and value is not None
    }
    for name in ("calibration", "stacks", "include", "exclude"):
        if name in given:
            given[name] = [part for item in given[name] for part in _parts(item)]
    return load_recipe(options.recipe).with_options(given, "command line")


def _parts(item: str) -> list[str]:
    """The names in ``a,b,c``, unless there is a file of just that name."""
    # Not by pathlib: a list may be longer than any name of a file.
    if os.path.exists(item.rpartition("@")[0] or item) or os.path.exists(item):
        return [item]
    # Empty parts are for whoever reads the names to refuse.
    return item.split(",")


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser("compress", help="make a model smaller", description="Make a model smaller.")
    _add_model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--tokenizer", metavar="SRC", help="tokenizer, if the model does not bring one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR, and forget an unfinished run")
    parser.add_argument("--resume", action="store_true", help="go on from the last finished block")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print nothing but the result and errors")
    loudness.add_argument("-v", "--verbose", action="store_true", help="print more")
    _add_recipe(parser)
    parser.set_defaults(run=run_compress)


def run_compress(options: argparse.Namespace) -> int:
    """``lillama compress``: the result's sizes and place on stdout."""
    recipe = _recipe(options)
    from lillama_core.pipeline import Request, compress

    request = Request(
        model=options.model,
        output=Path(options.output),
        recipe=recipe,
        architecture=options.architecture,
        tokenizer=options.tokenizer,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        overwrite=options.overwrite,
        resume=options.resume,
    )
    record = compress(request, "quiet" if options.quiet else "verbose" if options.verbose else "normal")
    sizes, numbers = record.bytes, record.parameters
    print(
        f"parameters  {numbers['parameters_before']:,} -> {numbers['parameters_after']:,}"
        f"  ({-numbers['reduction']:+.1%})"
    )
    print(
        f"bytes       {sizes['dense']:,} -> {sizes['compressed']:,}"
        f"  ({sizes['compressed'] / sizes['dense'] - 1:+.1%}, {record.dtype})"
    )
    fidelity = record.fidelity or {}
    if fidelity.get("perplexity_after") is not None:
        print(
            f"perplexity  {fidelity['perplexity_before']:.2f} -> {fidelity['perplexity_after']:.2f}"
            f"  (held-out calibration rows, {fidelity['tokens']} tokens)"
        )
    print(f"time        {record.seconds['total']:.0f} s, peak memory {record.peak_memory_bytes / 1e6:,.0f} MB")
    print(f"report      {Path(options.output) / 'report.html'}")
    return 0


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="ranks, parameters and memory before anything is computed",
        description="Ranks, parameters, multiply-adds and memory, from the config and shapes alone.",
    )
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_recipe(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """``lillama plan``: a table or JSON on stdout."""
    from lillama_core.pipeline.dry_run import dry_run, show_plan

    found = dry_run(options.model, _recipe(options), options.architecture, options.trust_remote_code)
    print(json.dumps(found, indent=1) if options.json else show_plan(found))
    return 0


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a model, beside another one",
        description="Measure a model with the metrics of its architecture's plugin, dense or compressed.",
    )
    _add_model(parser)
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--baseline", metavar="MODEL", help="measure this model as well, side by side")
    beside.add_argument(
        "--baseline-details", metavar="DIR", help="compare with a model measured before: what --details kept of it"
    )
    parser.add_argument("--data", metavar="SRC", help="text for perplexity (default: the offline set)")
    parser.add_argument(
        "--tasks",
        default="",
        metavar="A,B",
        help="lm-eval tasks, 'paper' for the paper's (default: the offline set)",
    )
    parser.add_argument(
        "--sequence-length", type=int, default=512, metavar="N", help="tokens in a window (default: 512)"
    )
    parser.add_argument("--windows", type=int, default=40, metavar="N", help="windows of text, 0 for all (default: 40)")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    parser.add_argument("--tokenizer", metavar="SRC", help="tokenizer, if the model does not bring one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file as well")
    parser.add_argument("--details", metavar="DIR", help="keep what is compared case by case (transcripts, routing)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but the result and errors")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> int:
    """``lillama evaluate``: a table on stdout, and JSON in a file when asked."""
    from lillama_core.evaluation.base import EvaluationOptions
    from lillama_core.evaluation.comparison import show_comparison
    from lillama_core.pipeline.evaluate import EvaluationRequest, compare

    request = EvaluationRequest(
        models=tuple(m for m in (options.baseline, options.model) if m is not None),
        options=EvaluationOptions(
            data=options.data,
            tasks=tuple(t for t in options.tasks.split(",") if t),
            sequence_length=options.sequence_length,
            windows=options.windows,
            limit=options.limit,
            seed=options.seed,
            details=None if options.details is None else Path(options.details),
        ),
        baseline_details=None if options.baseline_details is None else Path(options.baseline_details),
        architecture=options.architecture,
        tokenizer=options.tokenizer,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        json_file=None if options.json is None else Path(options.json),
        quiet=options.quiet,
    )
    print(show_comparison(compare(request)))
    return 0


def run_plugins(options: argparse.Namespace) -> int:
    """``lillama plugins``: who provides what, and what could not be loaded."""
    found = registry()
    listed = [
        {"plugin": p.name, "distribution": p.distribution, "version": p.version, "provides": found.provides(p)}
        for p in found.loaded
    ]
    failed = [{"plugin": f.name, "distribution": f.distribution, "error": f.reason} for f in found.failures]
    conflicts = [
        {"kind": c.kind, "name": c.name, "plugins": [f"{p.name} ({p.distribution})" for p in c.plugins]}
        for c in found.conflicts
    ]
    if options.json:
        print(json.dumps({"plugins": listed, "failed": failed, "conflicts": conflicts}, indent=1))
        return 0
    for entry in listed:
        print(f"{entry['plugin']}  ({entry['distribution']} {entry['version']})")
        for kind, names in entry["provides"].items():  # type: ignore[attr-defined]
            print(f"  {kind}: {', '.join(names)}")
    for failure in failed:
        print(f"{failure['plugin']}  ({failure['distribution']})  not loaded: {failure['error']}")
    for conflict in found.conflicts:
        print(f"conflict: {conflict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
