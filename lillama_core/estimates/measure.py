"""The rates of this machine: measured once, within seconds, and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from lillama_core.errors import LillamaError, UserError
from lillama_core.estimates.machine import Machine
from lillama_core.system.cache import default_cache_dir
from lillama_core.system.control_groups import memory_left
from lillama_core.system.devices import exact_device, has_fast_bfloat16
from lillama_core.system.files import write_json

ROUNDS = 2
"""Times that everything is measured, one after the other: what disturbs one round may spare the next."""
RUNS, LONGEST = 5, 0.6
"""Least number of runs of what is measured, and the seconds after which there are no more of them."""
VERSION = 1
"""Raised when something else is measured."""
SPARE = 0.95
"""Part of the free memory that is counted on: torch's allocator and other programs take some."""
_SELF = """
import sys, time
begun = time.perf_counter()
import torch, transformers, datasets, scipy.linalg
import lillama_core.pipeline
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from lillama_core.output.record import peak_memory_bytes
a = torch.rand(64, 64)
torch.linalg.eigh(a @ a.T), scipy.linalg.qr(a.numpy(), pivoting=True)
print(peak_memory_bytes())
"""


def this_machine(device: torch.device, say: Callable[[str], None] = lambda text: None) -> Machine:
    """Rates of this machine for runs on ``device``, with the memory that is free now.

    Measured at the first call, which ``say`` tells; kept in the cache for the same processor, device, torch and number
    of threads.
    """
    path = _path(device)
    rates = _read(path)
    if rates is None:
        say("Measuring the speed of this machine, once (a few seconds)")
        rates = measure(device)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, rates)
    return _machine(device, rates)


def this_machine_unmeasured(device: torch.device) -> tuple[Machine, bool]:
    """This machine without a measurement, and whether its rates are known from an earlier one.

    Where they are not, all that is said of time is meaningless; memory and disk are known.
    """
    rates = _read(_path(device))
    if rates is not None:
        return _machine(device, rates), True
    # This process has loaded all that a run loads.
    libraries = float(psutil.Process().memory_info().rss)
    names = ("float32", "float64", "pivoting", "bandwidth", "kernel", "draw", "disk_write", "disk_read", "start")
    unknown = {**dict.fromkeys(names, 1.0), "eigh": {1: 1.0}, "libraries": libraries}
    return _machine(device, unknown | ({"link": 1.0} if device.type != "cpu" else {})), False


def _machine(device: torch.device, rates: dict[str, Any]) -> Machine:
    return Machine(
        **{
            **rates,
            "name": "this machine",
            "accelerator": device.type != "cpu",
            "host_memory": free_host(),
            "device_memory": free_device(device),
        }
    )


def _path(device: torch.device) -> Path:
    return default_cache_dir() / "machines" / f"{_key(device)}.json"


def free_host() -> float:
    """Bytes of the host's memory that are available, with what this process holds already."""
    available, limit = psutil.virtual_memory().available, memory_left()
    room = available if limit is None else min(available, limit)
    return SPARE * (room + psutil.Process().memory_info().rss)


def free_device(device: torch.device) -> float | None:
    """Bytes that are free on a device with memory of its own, with what this process has there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return SPARE * (free + torch.cuda.memory_reserved(device))
    # Apple's GPUs share the host's memory.
    return SPARE * psutil.virtual_memory().available if device.type != "cpu" else None


def _key(device: torch.device) -> str:
    what = [
        VERSION,
        platform.processor(),
        platform.machine(),
        _model_of_processor(),
        torch.__version__,
        torch.get_num_threads(),
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "",
    ]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def _model_of_processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    """Rates from the cache, or None where there are none that are sound: anybody may have put the file there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["eigh"] = {int(n): s for n, s in found["eigh"].items()}
        Machine(**{**found, "name": "", "host_memory": 1.0})
        return dict(found)
    return None


def measure(device: torch.device) -> dict[str, Any]:
    """The rates, by the names that `Machine` has for them."""
    rounds = [_round(device) for _ in range(ROUNDS)]
    found = rounds[0]
    for other in rounds[1:]:
        for name, seconds in other.items():
            found[name] = min(found[name], seconds)
    sizes = [int(name.removeprefix("eigh ")) for name in found if name.startswith("eigh ")]
    write, read = _disk()
    libraries, start = _start()
    return {
        "libraries": libraries,
        "start": start,
        "disk_write": write,
        "disk_read": read,
        "eigh": {n: found[f"eigh {n}"] for n in sizes},
        "bfloat16": 1 / found["bfloat16"] if "bfloat16" in found else None,
        "link": 1 / found["link"] if "link" in found else None,
        **{name: 1 / found[name] for name in ("float32", "float64", "pivoting", "bandwidth")},
        **{name: found[name] for name in ("kernel", "draw")},
    }


def _round(device: torch.device) -> dict[str, float]:
    """Seconds for an operation, a byte or a decomposition of everything that is measured in this process."""
    generator = torch.Generator().manual_seed(0)
    host, exact = torch.device("cpu"), exact_device(device)

    def matrix(n: int, m: int, dtype: torch.dtype, where: torch.device) -> torch.Tensor:
        return torch.rand(n, m, generator=generator).to(where, dtype)

    def product(dtype: torch.dtype, where: torch.device) -> float:
        # Short enough on a CPU for a time in which nobody else is at work.
        n = 512 if where.type == "cpu" else 4096
        a, b = matrix(n, n, dtype, where), matrix(n, n, dtype, where)
        return _best(lambda: a @ b, where) / (2.0 * n**3)

    found = {"float32": product(torch.float32, device), "float64": product(torch.float64, exact)}
    if has_fast_bfloat16(device):
        found["bfloat16"] = product(torch.bfloat16, device)
    for n in (64, 128, 256, 512) if exact.type == "cpu" else (512, 1024, 2048, 4096):
        a = matrix(n, n, torch.float64, exact)
        gram = a @ a.T
        found[f"eigh {n}"] = _best(lambda gram=gram: torch.linalg.eigh(gram), exact)  # type: ignore[misc]
    x, y = (matrix(4096, 1408, torch.float32, device) for _ in range(2))
    # Of what is between products, some with a function to compute and some without; more than caches hold.
    found["bandwidth"] = _best(lambda: torch.nn.functional.silu(x) * y, device) / (4 * x.numel() * 5.0)
    if device.type != "cpu":
        found["link"] = _best(lambda: x.cpu(), device) / (4 * x.numel())
    small = torch.zeros(16, device=device)
    found["kernel"] = _best(lambda: [small + 1 for _ in range(100)], device) / 100
    probabilities = torch.softmax(matrix(64, 8192, torch.float32, host), -1)
    found["draw"] = _best(lambda: torch.multinomial(probabilities, 1), host) / probabilities.numel()
    found["pivoting"] = _pivoting(generator)
    return found


def _start() -> tuple[float, float]:
    """Bytes and seconds of a fresh process that loads all libraries."""
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-P", "-c", _SELF], capture_output=True, text=True, check=False)
    taken, after = time.perf_counter() - begun, os.times()
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LillamaError(f"a fresh process does not load the libraries: {reason}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    # Processor time where others use the machine as well; Windows tells none of other processes.
    return float(done.stdout.split()[-1]), min(taken, spent) if spent > 0 else taken


def _pivoting(generator: torch.Generator) -> float:
    """Seconds for an operation of QR with column pivoting."""
    import scipy.linalg

    rows, columns = 256, 512
    a = torch.rand(rows, columns, generator=generator).numpy()
    seconds = _best(lambda: scipy.linalg.qr(a, mode="r", pivoting=True), torch.device("cpu"))
    return seconds / (2.0 * columns * rows * rows - 2.0 / 3 * rows**3)


def _best(work: Callable[[], Any], device: torch.device, seconds: float = 0.05) -> float:
    """The shortest of some runs of ``work``: others use the machine as well."""
    best, begun, runs = float("inf"), time.perf_counter(), 0
    while True:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        runs, spent = runs + 1, time.perf_counter() - begun
        if spent > LONGEST or (spent > seconds and runs >= RUNS):
            return max(best, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _disk(size: int = 2**26) -> tuple[float, float]:
    """Bytes a second that are written to the disk of the cache, and read from it.

    Of temporary files where the cache cannot be written. Raises UserError where they cannot either.
    """
    folder = default_cache_dir()
    data = os.urandom(2**20) * (size >> 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _disk_of(folder, data)
    except OSError as error:
        unwritable = error
    try:
        return _disk_of(None, data)
    except OSError as error:
        raise UserError(
            f"neither the cache {str(folder)!r} can be written ({unwritable.strerror or unwritable}) nor temporary"
            f" files ({error.strerror or error}): make room, or name another cache with LILLAMA_CACHE"
        ) from None


def _disk_of(folder: Path | None, data: bytes) -> tuple[float, float]:
    """Bytes a second of a file with ``data`` in ``folder``, None: where temporary files are."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begun
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        file.read()
        return len(data) / written, len(data) / (time.perf_counter() - begun)
