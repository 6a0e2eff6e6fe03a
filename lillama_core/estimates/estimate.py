"""The estimate of a run: seconds by phase, peaks of memory, and disk, with the model in memory or read by blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lillama_core.estimates.machine import Machine
from lillama_core.estimates.memory import Memory
from lillama_core.estimates.phases import Phases
from lillama_core.estimates.shapes import Job, ModelShape
from lillama_core.estimates.sizes import show_seconds, show_size


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take."""

    streamed: bool
    seconds: dict[str, float]
    """By the names of phases in the record; empty where the machine's rates are not known."""
    host: float
    """Peak bytes of the run's process on the host."""
    checking: float
    """Bytes on the host with the process that loads the result beside it."""
    device: float | None
    """Peak bytes on one device; None where tensors are on the host."""
    disk: float
    """Bytes of the run's directory at the most, the result included."""

    @property
    def needed_host(self) -> float:
        return max(self.host, self.checking)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: seconds to hundredths, bytes whole."""
        seconds = {k: round(v, 2) for k, v in self.seconds.items()}
        if seconds:
            seconds["profile"] = round(self.seconds["forward"] + self.seconds["backward"], 2)
            seconds["total"] = round(self.total, 2)
        return {
            "residency": "streamed" if self.streamed else "resident",
            "seconds": seconds,
            "peak_memory_bytes": round(self.host),
            "memory_bytes_while_checking": round(self.checking),
            "peak_device_memory_bytes": None if self.device is None else round(self.device),
            "disk_bytes": round(self.disk),
        }


def estimate(model: ModelShape, job: Job, machine: Machine, streamed: bool) -> Estimate:
    """What a run of ``job`` on ``machine`` takes.

    On several devices rows and decompositions are spread evenly, as a data-parallel run would do; each holds what one
    device holds.
    """
    phases = Phases(model, job, streamed, machine.accelerator).all()
    spread = ("calibration data", "forward", "backward", "ranks", "blocks", "report")
    half = job.half and machine.bfloat16 is not None
    seconds = {}
    for name, work in phases.items():
        parts = machine.devices if name in spread else 1
        # A step of training has rows for so many devices and no more.
        parts = min(parts, job.batch) if name == "blocks" and job.steps else parts
        # Weights are read, and files written, by all together.
        through_disk = replace(work * 0, read=work.read, written=work.written)
        computed = replace(work, read=0.0, written=0.0)
        seconds[name] = machine.seconds(computed, half) / parts + machine.seconds(through_disk, half)
    memory = Memory(model, job, streamed, machine.accelerator, machine.libraries)
    peak = memory.peak()
    host = peak.host + (machine.devices - 1) * machine.libraries
    return Estimate(
        streamed,
        seconds,
        host,
        memory.checking() + (machine.devices - 1) * machine.libraries,
        peak.device if machine.accelerator else None,
        memory.disk(),
    )


def show_estimate(found: dict[str, Any]) -> list[str]:
    """Lines that say what `Estimate.to_dict` holds, for which ``machine``, and why it would be ``refused``."""
    seconds, residency = found["seconds"], found["residency"]
    how = "the model in memory" if residency == "resident" else "blocks read from disk one at a time"
    names = [name for name in seconds if name not in ("profile", "total") and seconds[name] >= 0.05]
    width = max(map(len, names), default=0)
    lines = [f"estimate for {found['machine']}, {how}"]
    lines += [f"  {name:<{width}}  {show_seconds(seconds[name]):>8}" for name in names]
    lines.append(f"  {'total':<{width}}  {show_seconds(seconds['total']):>8}")
    host, checking = found["peak_memory_bytes"], found["memory_bytes_while_checking"]
    beside = f" ({show_size(checking)} while the result is loaded again)" if checking > host else ""
    lines.append(f"host memory    {show_size(host)}{beside}")
    if found["peak_device_memory_bytes"] is not None:
        lines.append(f"device memory  {show_size(found['peak_device_memory_bytes'])}")
    lines.append(f"disk           {show_size(found['disk_bytes'])}")
    if found["refused"]:
        lines.append(f"refused: {found['refused']}")
    return lines
