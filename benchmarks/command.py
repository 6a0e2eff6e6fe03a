"""``lillama benchmark``: every model of a suite by every method, and pages of what came of it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import click

from lillama_core.cli.options import LillamaCommand, debug_option, device_option, option
from lillama_core.cli.silence import silence_transformers

if TYPE_CHECKING:
    from lillama_benchmarks.cells import SuiteRunner
    from lillama_benchmarks.methods import Method
    from lillama_benchmarks.suites import SuiteModel


@click.command(
    cls=LillamaCommand,
    help="Compress every model of a suite by every method and measure what comes out, and the dense model.",
)
@option("--suite", default="cross-architecture", metavar="NAME", help="cross-architecture (default) or smoke")
@option("--models", default="", metavar="A,B", help="models of the suite or directories (default: all)")
@option("--methods", default="", metavar="A,B", help="methods or recipes (default: those of the suite)")
@option("--reductions", default="", metavar="X,Y", help="parts of the parameters to remove (default: 0.2)")
@option("-o", "--output", metavar="DIR", help="where results go (default: benchmark-SUITE)")
@option("--resume", is_flag=True, help="go on in DIR with the cells that it lacks or that failed")
@option("--keep-models", is_flag=True, help="keep the compressed models in DIR/cells")
@option("--jobs", type=int, metavar="N", help="models at a time; spoils speeds (default: 1; smoke: 2)")
@device_option
@debug_option
def benchmark(**options: Any) -> int:
    """Parse the options and run."""
    with silence_transformers():
        return run_benchmark(options)


def run_benchmark(options: dict[str, Any]) -> int:
    """A line a cell on stdout; 0 when every cell succeeded, 1 otherwise. Raises UserError before the first cell."""
    from lillama_benchmarks.cells import SuiteRunner
    from lillama_benchmarks.methods import find_methods
    from lillama_benchmarks.pages import write_pages
    from lillama_benchmarks.results import DENSE, read
    from lillama_benchmarks.suites import SUITES, choose_models
    from lillama_core.errors import UserError, nearest
    from lillama_core.system.cache import default_cache_dir

    if options["suite"] not in SUITES:
        known = list(SUITES)
        raise UserError(
            f"no suite named {options['suite']!r} (there are: {', '.join(known)}){nearest(options['suite'], known)}"
        )
    suite = SUITES[options["suite"]]
    methods = find_methods(_names(options["methods"], "--methods") or suite.methods)
    reductions = _reductions(options["reductions"]) or suite.reductions
    models = choose_models(suite, _names(options["models"], "--models"), default_cache_dir() / "benchmark")
    jobs = suite.jobs if options["jobs"] is None else options["jobs"]
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}")
    folder = Path(options["output"] or f"benchmark-{suite.name}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, not a directory")
    if folder.is_dir() and any(folder.iterdir()) and not options["resume"]:
        raise UserError(f"{str(folder)!r} exists already; go on there with --resume, or choose another --output")
    read(folder)
    folder.mkdir(parents=True, exist_ok=True)
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    runner = SuiteRunner(folder, options["device"], options["keep_models"], threads)
    writing = Lock()

    def run(model: SuiteModel) -> None:
        _run_model(runner, model, methods, reductions, writing)
        with writing:
            write_pages(folder, suite.name, list(read(folder).values()))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            # Asked for, so that what a thread raises is raised here.
            list(pool.map(run, models))
        except BaseException:
            runner.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    asked = {(m.name, method.name, reduction) for m in models for method in methods for reduction in reductions}
    asked |= {(m.name, DENSE, 0.0) for m in models}
    results = [r for r in read(folder).values() if r.key in asked]
    failed = sum(r.error is not None for r in results)
    print(f"{len(results) - failed} of {len(results)} cells succeeded: {folder / 'results.html'}")
    return 1 if failed else 0


def _run_model(
    runner: SuiteRunner, model: SuiteModel, methods: list[Method], reductions: tuple[float, ...], writing: Lock
) -> None:
    """Run the cells of one model that are missing, and append each to the results as it ends, holding ``writing``."""
    from lillama_benchmarks.cells import planned_options, run_cell, run_dense
    from lillama_benchmarks.results import DENSE, Result, append, read

    def missing(key: tuple[str, str, float], method: Method | None) -> bool:
        with writing:
            found = read(runner.folder).get(key)
        return found is None or found.error is not None or found.options != planned_options(model, method, key[2])

    def keep(result: Result) -> None:
        with writing:
            append(runner.folder, result)
        name = f"{model.name}  {result.method}" + (f"  {100 * result.reduction:g} %" if result.reduction else "")
        first = "" if not result.metrics else f"{result.metrics[0]['name']} {result.metrics[0]['value']:.4g}"
        print(f"{name}  {first if result.error is None else 'FAILED: ' + result.error}", flush=True)

    if missing((model.name, DENSE, 0.0), None):
        keep(run_dense(runner, model))
    for reduction in reductions:
        for method in methods:
            if missing((model.name, method.name, reduction), method):
                keep(run_cell(runner, model, method, reduction))


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
