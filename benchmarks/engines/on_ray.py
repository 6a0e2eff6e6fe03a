"""Cells given to Ray, which finds processors and GPUs for them: on this machine, or on the nodes of a cluster.

A task of Ray is one cell: its worker is told names, paths and numbers, makes the model and the method of them anew, and
gives the result back as a dict. Ray pickles these between processes of the user's own; nothing else is sent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lillama_benchmarks.cells import Cell, SuiteRunner
from lillama_benchmarks.methods import find_methods
from lillama_benchmarks.results import Result
from lillama_benchmarks.suites import SUITES, choose_models, made_here
from lillama_core.errors import LillamaError, UserError
from lillama_core.system.cache import default_cache_dir

RETRIES = 3
"""As Ray does it by itself (``ray.remote``, ``max_retries``)."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local Ray. Results are smaller than what Ray keeps there at all; it wants 75 MiB at least."""
CONNECT_SECONDS = 10.0
"""For a look whether anything answers: Ray itself tries for minutes."""
STOP_SECONDS = 30.0
"""For interrupted cells to end their commands."""
TOLD = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
"""What the nodes of a cluster are told of this environment, besides LILLAMA_*; no tokens."""
ON_THIS_MACHINE = {
    # What memory runs out for is the command of a cell, which the kernel ends: Ray would end a worker.
    "RAY_memory_monitor_refresh_ms": "0",
    # Its ports can be reached from other machines; whoever does not know this run's token is refused.
    "RAY_AUTH_MODE": "token",
    # Cells are timed: they are not to come after everything else that runs here.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class OnRay:
    """Every cell as a task of Ray."""

    suite: str
    folder: Path
    """Of the suite's results; in a cluster, a folder that all nodes share."""
    device: str = "auto"
    keep_models: bool = False
    address: str | None = None
    """``HOST:PORT`` of a cluster that this machine is part of; None: a Ray of our own, on this machine alone."""
    cpus: int = 1
    """Of each cell, which computes with as many threads."""
    gpus: float = 0.0
    retries: int = RETRIES
    """Of a cell whose worker died; one that failed is not tried again."""

    def check(self) -> None:
        """Raise UserError for what cannot work, before anything is started."""
        if importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs ray, which is not installed: pip install 'lillama[ray]'")
        if self.cpus < 1:
            raise UserError(f"--cpus-per-cell must be at least 1, not {self.cpus}")
        if not self.gpus >= 0 or (self.gpus > 1 and self.gpus % 1):
            raise UserError(f"--gpus-per-cell takes a part of one GPU or a whole number of them, not {self.gpus:g}")
        if self.retries < 0:
            raise UserError(f"--retries must be at least 0, not {self.retries}")
        if self.device.startswith("cuda:"):
            raise UserError(f"--device {self.device} is for Ray to choose; say --device cuda and --gpus-per-cell")
        if self.device == "cuda" and not self.gpus:
            raise UserError("--device cuda with --engine ray needs --gpus-per-cell, or Ray gives the cells no GPU")
        if self.gpus and self.device not in ("auto", "cuda"):
            raise UserError(f"--gpus-per-cell asks for GPUs that --device {self.device} does not use")
        if self.address is not None:
            _check_answers(self.address)

    def run(self, cells: Sequence[Cell], keep: Callable[[Result], None]) -> None:
        """Work on ``cells``, as many at a time as there is room for."""
        if not cells:
            return
        with _connected(self.address) as ray:
            self._check_room(ray)
            # A cell's own failure is in its result; what a worker raises besides is no reason to try again.
            options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries}
            task = ray.remote(work).options(**options, retry_exceptions=False)
            dense = {cell.model.name for cell in cells if cell.method is None}
            waiting = [cell for cell in cells if cell.method is not None and cell.model.name in dense]
            running = {task.remote(self.order(cell)): cell for cell in cells if cell not in waiting}
            try:
                while running:
                    (done, *_), _ = ray.wait(list(running))
                    cell = running.pop(done)
                    keep(_result(ray, done, cell))
                    if cell.method is None:
                        # Not before it has ended, well or not: they are compared with what it leaves.
                        for other in [c for c in waiting if c.model.name == cell.model.name]:
                            running[task.remote(self.order(other))] = other
            except BaseException:
                for reference in running:
                    ray.cancel(reference)
                # So that they end their commands and clean up.
                ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)
                raise

    def order(self, cell: Cell) -> dict[str, Any]:
        """What the worker of a cell is told: JSON, and nothing else."""
        told = {k: v for k, v in os.environ.items() if k.startswith("LILLAMA_") or k in TOLD}
        return {
            "suite": self.suite,
            "model": str(cell.model.directory or cell.model.name),
            "method": None if cell.method is None else cell.method.name,
            "reduction": cell.reduction,
            "folder": str(self.folder.resolve()),
            # Where no GPU was asked for, there may be one nevertheless, which is not for this cell.
            "device": "cpu" if self.device == "auto" and not self.gpus else self.device,
            "keep_models": self.keep_models,
            "threads": self.cpus,
            "environment": told,
        }

    def _check_room(self, ray: Any) -> None:
        """Raise UserError when no node is large enough for a cell: Ray would wait for one for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self.cpus and n.get("GPU", 0) >= self.gpus for n in nodes):
            there = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
            asked = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
            raise UserError(f"no node of Ray has {asked} for a cell (there are: {there}); ask for less")


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Work on one cell, in a worker of Ray; the fields of its result."""
    os.environ.update(order["environment"])
    # Ray ends a worker without a word: what would be removed at the process's end would stay.
    with made_here:
        models = choose_models(SUITES[order["suite"]], (order["model"],), default_cache_dir() / "benchmark")
        method = None if order["method"] is None else find_methods((order["method"],))[0]
        runner = SuiteRunner(Path(order["folder"]), order["device"], order["keep_models"], order["threads"])
        return asdict(Cell(models[0], method, order["reduction"]).run(runner))


def _result(ray: Any, done: Any, cell: Cell) -> Result:
    """The result of a task that has ended; a worker that died, or could not even begin, is an error of the cell."""
    try:
        return Result(**ray.get(done))
    except ray.exceptions.TaskCancelledError:
        raise KeyboardInterrupt from None
    except ray.exceptions.RayTaskError as error:
        return cell.failed(error.cause)
    except ray.exceptions.RayError as error:
        return cell.failed(f"Ray lost the cell's worker: {error}")


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module ``ray``, connected while open. Raises LillamaError when that fails."""
    with contextlib.ExitStack() as stack:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if address is None:
            os.environ |= ON_THIS_MACHINE
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            # Not where $TMPDIR says: the paths of its sockets may have 107 characters.
            place = "/tmp" if os.path.isdir("/tmp") else None
            folder = tempfile.TemporaryDirectory(prefix="lillama-ray-", dir=place, ignore_cleanup_errors=True)
            settings |= {"_temp_dir": stack.enter_context(folder), "include_dashboard": False}
            settings["object_store_memory"] = OBJECT_STORE_BYTES
        # Not earlier: it reads the environment.
        import ray

        stack.callback(ray.shutdown)
        try:
            ray.init(address=address or "local", **settings)
        except Exception as error:
            raise LillamaError(f"Ray does not start: {error}") from error
        yield ray


def _check_answers(address: str) -> None:
    """Raise UserError unless something answers at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--ray-address takes HOST:PORT, such as 10.0.0.1:6379; not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray answers at --ray-address {address!r}: {error}") from None
