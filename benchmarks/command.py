"""``lillama benchmark``: every model of a suite by every method, and pages of what came of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, device_option, option
from lillama_core.cli.silence import silence_transformers

if TYPE_CHECKING:
    from lillama_benchmarks.cells import Cell
    from lillama_benchmarks.engines import Engine
    from lillama_benchmarks.results import Result
    from lillama_benchmarks.suites import Suite

MOST_JOBS = 1000
"""Models at a time: each is a thread."""
OF_AN_ENGINE = ("engine", "jobs", "ray_address", "cpus_per_cell", "gpus_per_cell", "retries")
"""Options that a single cell does not read."""
NOT_READ = {
    "only": OF_AN_ENGINE,
    "list": (*OF_AN_ENGINE, "device", "keep_models"),
    "collect": (*OF_AN_ENGINE, "device", "keep_models", "resume"),
}
"""Options that ask for something else than a run, and those that do nothing beside them."""


@click.command(
    cls=LillamaCommand,
    help="Compress every model of a suite by every method and measure what comes out, and the dense model.",
)
@option(
    "--suite",
    default="cross-architecture",
    metavar="NAME",
    help="cross-architecture (default), arena, arena-local or smoke",
)
@option("--models", default="", metavar="A,B", help="models of the suite or directories (default: all)")
@option("--methods", default="", metavar="A,B", help="methods or recipes (default: those of the suite)")
@option(
    "--reductions", default="", metavar="X,Y", help="parts of the parameters to remove (default: 0.2; arenas: 0.2,0.4)"
)
@option("-o", "--output", metavar="DIR", help="where results go (default: benchmark-SUITE)")
@option("--resume", is_flag=True, help="go on in DIR with the cells that it lacks or that failed")
@option("--keep-models", is_flag=True, help="keep the compressed models in DIR/cells")
@device_option
@option("--engine", metavar="NAME", group="engine", help="who works on the cells: in-turns (default) or ray")
@option("--jobs", type=int, metavar="N", group="engine",
        help="in-turns: models at a time; spoils speeds (default: 1; smoke: 2)")  # fmt: skip
@option("--ray-address", metavar="HOST:PORT", group="engine",
        help="ray: a cluster that this machine is part of (default: a Ray of this machine alone)")  # fmt: skip
@option("--cpus-per-cell", type=int, metavar="N", group="engine", help="ray: CPUs and threads of a cell (default: 1)")
@option("--gpus-per-cell", type=float, metavar="X", group="engine",
        help="ray: GPUs of a cell, or a part of one (default: 0)")  # fmt: skip
@option("--retries", type=int, metavar="N", group="engine",
        help="ray: times that a cell is begun again whose worker died (default: 3)")  # fmt: skip
@option("--list", is_flag=True, group="single cells", help="print the cells that there are to run, and run none")
@option("--only", metavar="CELL", group="single cells",
        help="run this cell alone, as --list names it; many such runs may share DIR")  # fmt: skip
@option("--collect", is_flag=True, group="single cells",
        help="run nothing: make the pages of what single cells left in DIR")  # fmt: skip
@debug_option
def benchmark(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run_benchmark(options)


def run_benchmark(options: dict[str, Any]) -> int:
    """A line a cell on stdout; 0 when every cell succeeded, 1 otherwise. Raises UserError before the first cell."""
    from lillama_benchmarks.cells import cells_of
    from lillama_benchmarks.methods import find_methods
    from lillama_benchmarks.results import collect, read
    from lillama_benchmarks.suites import SUITES, choose_models
    from lillama_core.errors import UserError
    from lillama_core.system.cache import default_cache_dir
    from lillama_core.system.devices import choose_device

    suite = SUITES[_known(options["suite"], list(SUITES), "suite")]
    _check_options_are_read(options)
    methods = find_methods(_names(options["methods"], "--methods") or suite.methods)
    reductions = _reductions(options["reductions"]) or suite.reductions
    models = choose_models(suite, _names(options["models"], "--models"), default_cache_dir() / "benchmark")
    folder = Path(options["output"] or f"benchmark-{suite.name}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, not a directory")
    if options["collect"]:
        if not read(folder):
            raise UserError(f"{str(folder)!r} holds no results to collect")
    elif folder.is_dir() and any(folder.iterdir()) and not options["resume"]:
        raise UserError(f"{str(folder)!r} exists already; go on there with --resume, or choose another --output")
    known = read(folder)
    cells = cells_of(models, methods, reductions)
    missing = [] if options["collect"] else [cell for cell in cells if _is_missing(cell, known)]
    if options["list"]:
        print("".join(f"{cell.name}\n" for cell in missing), end="")
        return 0
    if not options["collect"] and options["engine"] != "ray":
        # Ray's nodes may have what this machine lacks.
        choose_device(options["device"])
    if options["only"]:
        cell = {c.name: c for c in cells}[_known(options["only"], [c.name for c in cells], "cell")]
        return _run_alone(cell, missing, folder, options)
    engine = None if options["collect"] else _engine(suite, folder, options)
    folder.mkdir(parents=True, exist_ok=True)
    collect(folder, [cell.key for cell in cells])
    if engine is not None and missing:
        _run(engine, missing, folder, suite.name)
    else:
        _write_pages(folder, suite.name)
    asked = {cell.key for cell in cells}
    results = [r for r in read(folder).values() if r.key in asked]
    failed = sum(r.error is not None for r in results)
    print(f"{len(results) - failed} of {len(results)} cells succeeded: {folder / 'results.html'}")
    return 1 if failed else 0


def _is_missing(cell: Cell, known: dict[tuple[str, str, float], Result]) -> bool:
    """Whether there is no result of the cell as it is asked for now."""
    found = known.get(cell.key)
    return found is None or found.error is not None or found.options != cell.options()


def _run(engine: Engine, cells: list[Cell], folder: Path, suite: str) -> None:
    """Append each result as it ends, and write the pages whenever a model is done."""
    from lillama_benchmarks.results import append

    left = Counter(cell.model.name for cell in cells)

    def keep(result: Result) -> None:
        append(folder, result)
        _show(result)
        left[result.model] -= 1
        if not left[result.model]:
            _write_pages(folder, suite)

    engine.run(cells, keep)


def _run_alone(cell: Cell, missing: list[Cell], folder: Path, options: dict[str, Any]) -> int:
    """Run one cell if it is missing, and leave its result in its own folder: others may be at work beside it."""
    from lillama_benchmarks.cells import Cell, SuiteRunner
    from lillama_benchmarks.results import read, write_alone
    from lillama_core.errors import UserError

    if cell.key not in {c.key for c in missing}:
        print(f"{cell.name}  is there already")
        return 0
    if cell.method is not None:
        dense = Cell(cell.model)
        known = read(folder).get(dense.key)
        if known is None or known.options != dense.options():
            raise UserError(f"cell {cell.name!r} is compared with {dense.name!r}: run that first, with --only")
    result = cell.run(SuiteRunner(folder, options["device"], options["keep_models"]))
    write_alone(folder / "cells" / cell.name, result)
    _show(result)
    return 0 if result.error is None else 1


def _show(result: Result) -> None:
    name = f"{result.model}  {result.method}" + (f"  {100 * result.reduction:g} %" if result.reduction else "")
    first = "" if not result.metrics else f"{result.metrics[0]['name']} {result.metrics[0]['value']:.4g}"
    print(f"{name}  {first if result.error is None else 'FAILED: ' + result.error}", flush=True)


def _write_pages(folder: Path, suite: str) -> None:
    from lillama_benchmarks.pages import write_pages
    from lillama_benchmarks.results import read

    write_pages(folder, suite, list(read(folder).values()))


def _engine(suite: Suite, folder: Path, options: dict[str, Any]) -> Engine:
    """The engine that the options ask for. Raises UserError for values that it does not take."""
    import os

    from lillama_benchmarks.cells import SuiteRunner
    from lillama_benchmarks.engines.in_turns import InTurns
    from lillama_benchmarks.engines.on_ray import OnRay
    from lillama_core.errors import UserError
    from lillama_core.strategies.validation import shown

    device, keep_models = options["device"], options["keep_models"]
    if options["engine"] == "ray":
        names = {"address": "ray_address", "cpus": "cpus_per_cell", "gpus": "gpus_per_cell", "retries": "retries"}
        given = {name: options[field] for name, field in names.items() if options[field] is not None}
        engine = OnRay(suite.name, folder, device, keep_models, **given)
        engine.check()
        return engine
    jobs = suite.jobs if options["jobs"] is None else options["jobs"]
    if not 1 <= jobs <= MOST_JOBS:
        raise UserError(f"--jobs must be from 1 to {MOST_JOBS:,}, not {shown(jobs)}")
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    return InTurns(SuiteRunner(folder, device, keep_models, threads), jobs)


def _check_options_are_read(options: dict[str, Any]) -> None:
    """Raise UserError for an engine that there is not, and for options that nothing would read."""
    from lillama_benchmarks.engines import OPTIONS
    from lillama_core.errors import UserError

    def given(fields: tuple[str, ...]) -> list[str]:
        # Not by ==, for which 0 retries are False.
        return ["--" + field.replace("_", "-") for field in fields
                if not any(options[field] is untouched for untouched in (None, False))
                and (field, options[field]) != ("device", "auto")]  # fmt: skip

    for mode in (mode for mode in NOT_READ if options[mode]):
        for name in given((*(other for other in NOT_READ if other != mode), *NOT_READ[mode])):
            raise UserError(f"{name} does nothing with --{mode}; leave one of them out")
    engine = _known(options["engine"] or "in-turns", list(OPTIONS), "engine")
    for other in (other for other in OPTIONS if other != engine):
        for name in given(OPTIONS[other]):
            raise UserError(f"{name} does nothing with the engine {engine}: it is for --engine {other}")


def _known(name: str, there: list[str], what: str) -> str:
    """``name``, if it is one of ``there``; raises UserError otherwise."""
    from lillama_core.errors import UserError, nearest

    if name not in there:
        raise UserError(f"no {what} named {name!r} (there are: {', '.join(there)}){nearest(name, there)}")
    return name


def _names(text: str, option: str) -> tuple[str, ...]:
    from lillama_core.errors import UserError

    if not text:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in names:
        raise UserError(f"{option} {text!r} has an empty name")
    return names


def _reductions(text: str) -> tuple[float, ...]:
    from lillama_core.errors import UserError

    found = []
    for part in _names(text, "--reductions"):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise UserError(f"--reductions takes numbers between 0 and 1, such as 0.1,0.2; not {part!r}")
        found.append(value)
    return tuple(dict.fromkeys(found))
