"""What there is on this machine that a run depends on, as lines for people and for reports of bugs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from lillama_core.system.cache import default_cache_dir

PACKAGE = "lillama"
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "datasets", "numpy", "scipy")


@dataclass(frozen=True)
class Extra:
    """An optional part of the package, and what it lacks here."""

    name: str
    missing: tuple[str, ...]
    """Requirements that are not met, with the version that is there, if any."""


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(requirement: Requirement) -> str | None:
    """Why a requirement is not met: ``jiwer>=4.0``, or with the version that is there; None if it is."""
    version = installed(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return wanted
    return None if requirement.specifier.contains(version, prereleases=True) else f"{wanted} (there is {version})"


def extras() -> list[Extra]:
    """The package's extras but ``dev``, as this installation declares them."""
    found: dict[str, list[str]] = {}
    for text in _requirements():
        requirement = Requirement(text)
        for extra in importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []:
            marker = requirement.marker
            # One that a plain installation takes as well is of no extra.
            if extra == "dev" or marker is None or marker.evaluate({"extra": ""}):
                continue
            lacking = found.setdefault(extra, [])
            if marker.evaluate({"extra": extra}) and (reason := unmet(requirement)):
                lacking.append(reason)
    return [Extra(name, tuple(missing)) for name, missing in sorted(found.items())]


def broken_requirements() -> list[str]:
    """What the package itself needs and does not have."""
    needed = [Requirement(text) for text in _requirements()]
    plain = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [reason for r in plain if (reason := unmet(r))]


def _requirements() -> list[str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return importlib.metadata.requires(PACKAGE) or []
    return []


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; those that go meanwhile count nothing."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found = file.lstat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def machine_lines() -> Iterator[tuple[str, str]]:
    """Topic and what is to be said of it: versions, processor, memory, devices, arithmetic, folders."""
    import torch

    from lillama_core.system.devices import choose_autocast, choose_device

    yield PACKAGE, f"{installed(PACKAGE) or 'not installed'}, Python {platform.python_version()}, {platform.platform()}"
    yield "libraries", ", ".join(f"{name} {installed(name) or 'missing'}" for name in LIBRARIES)
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    yield (
        "processor",
        f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads,"
        f" {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free",
    )
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    device = choose_device("auto")
    arithmetic = choose_autocast("auto", device)
    name = "float32" if arithmetic is None else str(arithmetic).removeprefix("torch.")
    yield "default", f"--device auto is {device} here, --compute auto is {name}"
    folder = default_cache_dir()
    there = folder if folder.exists() else next(parent for parent in folder.parents if parent.exists())
    yield (
        "cache",
        f"{folder}: {size_of(folder) / 1e9:.2f} GB, {shutil.disk_usage(there).free / 1e9:.1f} GB of the disk free",
    )
