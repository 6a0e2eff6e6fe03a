"""Compressions on the pretend device, each in a process of its own: torch is changed throughout there."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretend_cuda.build import build_guard


class PretendRunError(Exception):
    """A run on the pretend device failed; the text is its traceback."""


@dataclass(frozen=True)
class SeededBug:
    """A mistake to make in a function of lillama, to see that the pretend device notices."""

    function: str
    """``module:qualified.name``"""
    right: str
    """A part of its source, that occurs once."""
    wrong: str
    """What stands in its place."""


@dataclass(frozen=True)
class DeviceReport:
    """What a compression did with the device. A phase is one of the record's, and counts what is inside of it too."""

    synchronisations: dict[str, int]
    """``lillama_core/...py:line what`` -> how often the CPU waited there, most frequent first."""
    synchronisations_by_phase: dict[str, int]
    copied_to_device: int
    """Bytes."""
    copied_to_host: int
    """Bytes."""
    copies: dict[str, int]
    """``to host lillama_core/...py:line`` -> bytes, most first."""
    peak_bytes: int
    """Of all tensors on the device at once."""
    peak_by_phase: dict[str, int]
    seconds: float
    record: dict[str, Any]
    """The run's record, as in lillama.json."""

    @property
    def waits(self) -> int:
        """All synchronisations."""
        return sum(self.synchronisations.values())

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class PerBlock:
    """What a model's block costs, all of its batches together."""

    synchronisations: float
    by_line: dict[str, float]
    """Most frequent first; the lines of which the number of blocks changes nothing are left out."""
    copied_to_device: float
    """Bytes."""
    copied_to_host: float
    """Bytes."""


def per_block(fewer: DeviceReport, more: DeviceReport, blocks: int) -> PerBlock:
    """Compare two models of one kind, of which the second has ``blocks`` more: what each of these costs."""
    lines = more.synchronisations
    each = {line: (lines[line] - fewer.synchronisations.get(line, 0)) / blocks for line in lines}
    return PerBlock(
        (more.waits - fewer.waits) / blocks,
        {line: n for line, n in sorted(each.items(), key=lambda item: -item[1]) if n},
        (more.copied_to_device - fewer.copied_to_device) / blocks,
        (more.copied_to_host - fewer.copied_to_host) / blocks,
    )


def run_on_pretend_device(
    model: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    output: str | os.PathLike[str] | None = None,
    device: str = "cuda:0",
    resume: bool = False,
    stream: bool = False,
    bug: SeededBug | None = None,
) -> DeviceReport:
    """Compress the model in directory ``model`` on the pretend device, with one thread, and report what it did.

    ``options`` are those of a recipe; the key ``recipe`` names the one they go over. The result goes to ``output``,
    which may exist; None: it is thrown away. With ``device`` "cpu" the same process runs without the pretend device.
    ``stream`` reads the blocks from disk one at a time. ``bug`` is put into lillama for this run alone. The result has
    no report and is not loaded by a fresh process.
    Raises PretendRunError with the traceback of a run that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": os.fspath(model),
            "output": os.fspath(output or Path(folder) / "output"),
            "options": dict(options),
            "device": device,
            "resume": resume,
            "stream": stream,
            "bug": None if bug is None else asdict(bug),
        }
        return DeviceReport(**_do(job))


def execute_on_pretend_device(source: str) -> Any:
    """Execute Python ``source`` in a process that has the pretend device, and return what it leaves in ``found``.

    That must be plain values. Raises PretendRunError with the traceback of what fails.
    """
    return _do({"source": source})["found"]


def _do(job: dict[str, Any]) -> dict[str, Any]:
    """Have the worker do a job."""
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        worker.stdin.write(json.dumps({**job, "report": str(path)}) + "\n")
        worker.stdin.flush()
        if not (answer := worker.stdout.readline()):
            raise PretendRunError(f"the worker ended with status {worker.wait()}")
        if answer.strip() != "0":
            raise PretendRunError(f"the run was ended with status {answer.strip()}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "error" in found:
        raise PretendRunError(found["error"])
    return found


@functools.cache
def _worker() -> subprocess.Popen[str]:
    """Start the process that has imported all, and forks for every run."""
    folder = tempfile.TemporaryDirectory()
    guard = build_guard(Path(folder.name))
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    worker = subprocess.Popen(
        [sys.executable, "-m", "pretend_cuda.worker", str(guard)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
    )

    @atexit.register
    def end() -> None:
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        worker.wait(timeout=60)
        folder.cleanup()

    return worker
