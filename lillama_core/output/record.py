"""The record of a run: the numbers that go into lillama.json, the card and the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from lillama_core.errors import UserError, one_line
from lillama_core.system.regular import check_regular


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, libraries included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not getrusage: its maximum survives exec, so that it may be that of the process which started this one.
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            # Not every kernel that says it is Linux has the field.
            if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
                return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kibibytes.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    names = ("lillama", "torch", "transformers", "safetensors", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@dataclass
class RunRecord:
    """Everything that lillama.json says."""

    model: str
    model_fingerprint: str
    architecture: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    base_model: str | None = None
    """Name of ``model`` on the Hub; None where it is not known."""
    license: dict[str, str] = field(default_factory=dict)
    """That of ``model`` as its card says: ``license``, ``license_name``, ``license_link``; empty where none is told."""
    tokenizer: str | None = None
    """What ``--tokenizer`` named, if anything."""
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(
        default_factory=lambda: {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": psutil.cpu_count(logical=True),
            # By these the order of sums differs, and with it how they are rounded.
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    )
    device: str = "cpu"
    compute: str = "float32"
    dtype: str = "float32"
    plan: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    """Path of a map -> the factor on its squared singular values when the ranks were allocated."""
    losses: dict[str, Any] = field(default_factory=dict)
    """What the plan is predicted to lose, other sizes would, and parts of the model were measured to, in ``unit``; of
    untrained maps, and empty where no losses are predicted."""
    rows_seen: dict[str, float] = field(default_factory=dict)
    """How many rows of the calibration data reached each expert's map."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """[out, in] of every map that could be compressed."""
    parameters: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    """What ``--evaluate`` measured of both models, see `lillama_core.pipeline.evaluate`; None: not asked for."""
    healing: list[dict[str, Any]] = field(default_factory=list)
    """How the whole model was trained at the end, each time that it was."""
    quantization: dict[str, Any] | None = None
    """In how many bits weights are held, and what that took; None: in the dtype."""
    bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    """Name of a weight file -> the SHA-256 of what is in it."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None
    """What torch had allocated on a CUDA device at the most; None on other devices."""
    residency: str = "resident"
    """Whether the dense model was held in memory, ``resident``, or read from disk by blocks, ``streamed``."""
    residency_reason: str = ""
    estimate: dict[str, Any] | None = None
    """What the run was expected to take, see `lillama_core.estimates`; None where it could not be told."""
    remarks: list[str] = field(default_factory=list)
    """What was found rather than declared about the architecture."""
    resumed: bool = False
    processes: int = 1
    """How many processes shared the work."""
    started: float = field(default_factory=time.monotonic, repr=False)

    def elapsed(self) -> float:
        """Seconds since the record was begun."""
        return round(time.monotonic() - self.started, 3)

    def stop(self) -> None:
        """Note the time that the run has taken and the memory that it has needed so far."""
        self.seconds["total"] = self.elapsed()
        self.peak_memory_bytes = peak_memory_bytes()
        if torch.device(self.device).type == "cuda":
            self.peak_device_memory_bytes = torch.cuda.max_memory_allocated(self.device)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[name]``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["started"]  # means nothing outside this process
        return found


def read_record(folder: Path) -> RunRecord:
    """The record of a finished directory, as it was published; raises UserError where it is missing or broken."""
    path = folder / "lillama.json"
    check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name: f for f in fields(RunRecord) if f.name != "started"}
        given = {name: value for name, value in found.items() if name in known}
        record = RunRecord(**given)
        wrong = [
            name
            for name, kind in (("model", str), ("recipe", dict), ("data", dict), ("plan", dict), ("parameters", dict))
            if not isinstance(getattr(record, name), kind)
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what it should be")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {one_line(error)}") from None
    return record
