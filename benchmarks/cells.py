"""One cell of a suite: a model compressed by a method and measured, by the command line.

Each command runs in a process of its own, so that its failure ends that cell alone, and its memory is its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_benchmarks.arena import LABEL
from lillama_benchmarks.methods import Method
from lillama_benchmarks.results import DENSE, Result
from lillama_benchmarks.suites import Options, SuiteModel
from lillama_core.architecture.base import Architecture
from lillama_core.errors import LillamaError, one_line
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.reading import choose, unread_options

KEPT = ("lillama.json", "report.html", "README.md")
"""Files of a compressed model that stay in the folder of its cell."""


class CellFailed(LillamaError):  # noqa: N818  it reads as what happened
    """A command of a cell failed; the message is the last line that it wrote on stderr."""


@dataclass(frozen=True)
class SuiteRunner:
    """Where cells are worked on, and how."""

    folder: Path
    """Of the suite's results; a cell has ``cells/<model>/<method>-<reduction>`` in it."""
    device: str = "auto"
    keep_models: bool = False
    threads: int | None = None
    """Of each process; None: as many as it likes."""
    making: threading.Lock = field(default_factory=threading.Lock)
    """Held while a model is made or fetched: some are made with the process's random numbers."""

    stopped: threading.Event = field(default_factory=threading.Event)
    """Set when no more cells are wanted: commands that run are ended."""

    def fetch(self, model: SuiteModel) -> Path:
        """The model's directory."""
        with self.making:
            return model.fetch()

    def cell(self, model: str, name: str) -> Path:
        """The folder of a cell, made anew."""
        path = self.folder / "cells" / model / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def cell_name(method: str, reduction: float) -> str:
    return method if method == DENSE else f"{method}-{reduction:g}"


@dataclass(frozen=True)
class Cell:
    """What one row of the results is about."""

    model: SuiteModel
    method: Method | None = None
    """None: the model as it is."""
    reduction: float = 0.0

    @property
    def key(self) -> tuple[str, str, float]:
        """Of its result."""
        return self.model.name, DENSE if self.method is None else self.method.name, self.reduction

    @property
    def name(self) -> str:
        """``MODEL/dense`` or ``MODEL/METHOD-REDUCTION``: where its folder is, and what the user calls it."""
        model, method, reduction = self.key
        return f"{model}/{cell_name(method, reduction)}"

    def options(self) -> dict[str, Any]:
        """What its commands are told; a result that was made with other options is of another cell."""
        return planned_options(self.model, self.method, self.reduction)

    def run(self, runner: SuiteRunner) -> Result:
        """Work on it, here and now; what fails is in ``error``. Raises KeyboardInterrupt when it is given up."""
        if self.method is None:
            return run_dense(runner, self.model)
        return run_cell(runner, self.model, self.method, self.reduction)

    def failed(self, error: object) -> Result:
        """The result when it could not even be worked on."""
        return Result(self.key[0], "", *self.key[1:], self.options(), error=one_line(error))


def cells_of(models: list[SuiteModel], methods: list[Method], reductions: tuple[float, ...]) -> list[Cell]:
    """All cells of a suite, in the order in which one process works on them: of each model the dense one first."""
    return [
        cell
        for model in models
        for cell in (Cell(model), *(Cell(model, method, reduction) for reduction in reductions for method in methods))
    ]


def compress_options(model: SuiteModel, method: Method, reduction: float) -> dict[str, Any]:
    """What the cell says to ``lillama compress``: the method, and over it what the model needs."""
    return {
        "recipe": method.recipe,
        "reduction": reduction,
        **method.options,
        **({"calibration": [str(c) for c in model.calibration]} if model.calibration else {}),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in _over(model.compress, method).items()},
    }


def _over(options: Options, method: Method) -> Options:
    """Those of a model's options that the method reads; one that does not train stays one, whatever else is asked."""
    recipe = load_recipe(method.recipe).with_options(method.options, f"method {method.name}")
    unread = unread_options(recipe, choose(recipe))
    trains = method.options.get("steps") != 0
    return {k: v for k, v in options.items() if k not in unread and (trains or k != "steps")}


def planned_options(model: SuiteModel, method: Method | None, reduction: float) -> dict[str, Any]:
    """Everything that the commands of a cell are told, as it is written in its result."""
    evaluations = [{k: str(v) if isinstance(v, Path) else v for k, v in e.items()} for e in model.evaluations]
    compress = {} if method is None else compress_options(model, method, reduction)
    return {"compress": compress, "evaluate": evaluations, **({"model": known} if (known := model.identity()) else {})}


def run_cell(runner: SuiteRunner, model: SuiteModel, method: Method, reduction: float) -> Result:
    """Compress and measure, with the dense model's details, if there are any; what fails is in ``error``."""
    options = planned_options(model, method, reduction)
    folder = runner.cell(model.name, cell_name(method.name, reduction))
    values = dict(vars(Result(model.name, "", method.name, reduction, options)))
    try:
        source = runner.fetch(model)
        architecture = _architecture(source)
        values |= {"architecture": architecture.name}
        compressed = folder / "model"
        _command(
            runner,
            folder / "compress.log",
            *("compress", source, "-o", compressed, "--device", runner.device, "--quiet"),
            *command_line(options["compress"]),
        )
        record = json.loads((compressed / "lillama.json").read_text(encoding="utf-8"))
        values |= {
            "parameters": record["parameters"]["parameters_after"],
            "bytes": record["bytes"]["compressed"],
            "seconds": record["seconds"]["total"],
            "peak_memory_bytes": record["peak_memory_bytes"],
            "versions": {**record["versions"], **_measured_by()},
            "machine": record["machine"],
        }
        for name in KEPT:
            if (compressed / name).is_file():
                shutil.copy2(compressed / name, folder / name)
        beside = source if architecture.evaluation.needs_live_baseline else None
        values["metrics"] = _evaluate(runner, model, folder, compressed, options["evaluate"], beside)
    except Exception as error:  # whatever it is, it ends this cell alone
        values["error"] = one_line(error)
    finally:
        if not runner.keep_models:
            # A cell that failed is made anew: what it left unfinished is as large as a model, and of no use.
            for name in ("model", "model.partial"):
                shutil.rmtree(folder / name, ignore_errors=True)
    return Result(**values)


def run_dense(runner: SuiteRunner, model: SuiteModel) -> Result:
    """The model as it is, measured once: its details are what every cell is compared with, case by case."""
    from lillama_core.output.record import versions

    options = planned_options(model, None, 0.0)
    folder = runner.cell(model.name, DENSE)
    values = dict(vars(Result(model.name, "", DENSE, 0.0, options, versions={**versions(), **_measured_by()})))
    try:
        source = runner.fetch(model)
        values |= {"architecture": _architecture(source).name}
        values |= {"parameters": _parameters(source), "bytes": weight_bytes(source)}
        values["metrics"] = _evaluate(runner, model, folder, source, options["evaluate"], None)
    except Exception as error:  # whatever it is, it ends this cell alone
        values["error"] = one_line(error)
    return Result(**values)


def _measured_by() -> dict[str, str]:
    """Versions of what only evaluations depend on, where it is installed."""
    found = {}
    for name in ("lm-eval", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _architecture(source: Path) -> Architecture:
    from lillama_core.architecture.find import find_architecture
    from lillama_core.models.loading import load_config
    from lillama_core.models.source import locate

    return find_architecture(load_config(locate(str(source))))


def _parameters(source: Path) -> int:
    """All parameters of the model, by its config."""
    from lillama_core.models.loading import count_parameters, load_config, meta_model
    from lillama_core.models.source import locate

    return count_parameters(meta_model(load_config(locate(str(source))), _architecture(source)))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a model's directory."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _evaluate(
    runner: SuiteRunner,
    model: SuiteModel,
    folder: Path,
    measured: Path,
    evaluations: list[dict[str, Any]],
    beside: Path | None,
) -> list[dict[str, Any]]:
    """Measurements of the model in ``measured``, from all runs of ``evaluate`` together."""
    found: dict[str, Any] = {}
    for number, options in enumerate(evaluations, 1):
        file = folder / f"evaluation-{number}.json"
        known = runner.folder / "cells" / model.name / DENSE / f"details-{number}"
        # A folder in it for each model of the run; the dense one was alone.
        kept = sorted(known.iterdir()) if known.is_dir() else []
        baseline = ("--baseline", beside) if beside else ("--baseline-details", kept[0]) if kept else ()
        _command(
            runner,
            folder / f"evaluation-{number}.log",
            *("evaluate", measured, *baseline),
            *("--json", file, "--details", folder / f"details-{number}", "--device", runner.device, "--quiet"),
            *command_line({k: v for k, v in options.items() if k != LABEL}),
        )
        for metric in json.loads(file.read_text(encoding="utf-8")).get(str(measured), []):
            name = f"{metric['name']}/{options[LABEL]}" if LABEL in options else metric["name"]
            found.setdefault(name, {**metric, "name": name})
    return list(found.values())


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options by the names of their fields as words of a command."""
    words: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, Mapping):
            words += [option, str(value["name"])]
            words += command_line({f"{name}.{own}": v for own, v in value.items() if own != "name"})
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list | tuple):
            for item in value:
                words += [option, str(item)]
        elif value is not None:
            words += [option, str(value)]
    return words


def _command(runner: SuiteRunner, log: Path, *words: str | Path) -> None:
    """Run a command of lillama; what it writes goes to ``log``.

    Raises CellFailed when it fails, and KeyboardInterrupt when it was interrupted or no more cells are wanted.
    """
    command = [sys.executable, "-P", "-m", "lillama_core", *map(str, words)]
    env = {"HF_HUB_OFFLINE": "1", **os.environ}
    if runner.threads is not None:
        env["OMP_NUM_THREADS"] = str(runner.threads)
    with log.open("w", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=env)
        try:
            while (status := process.poll()) is None:
                if runner.stopped.wait(0.1):
                    raise KeyboardInterrupt
        except BaseException:
            process.terminate()
            process.wait()
            raise
        errors.seek(0)
        said = errors.read()
        out.write(said)
    if status != 0:
        lines = [line for line in said.splitlines() if line.strip()]
        last = lines[-1].removeprefix("lillama: error: ") if lines else f"ended with exit status {status}"
        # A terminal sends Ctrl-C to the command too, which may end before this process has taken note of it: what
        # was interrupted is no failure, whoever hears of it first. Python ends by the signal, or, when it was still
        # starting, with the name of the exception.
        if runner.stopped.is_set() or status == -signal.SIGINT or last.startswith(("interrupted", "KeyboardInterrupt")):
            raise KeyboardInterrupt
        raise CellFailed(f"{words[0]}: {last}")
