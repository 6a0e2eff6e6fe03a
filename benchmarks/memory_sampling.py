"""Runs a command and looks at its memory and its disk meanwhile, within a limit of memory where the system sets one.

What is sampled is anonymous resident memory, ``RssAnon`` of /proc/PID/status, of a process and all that it has
started: what the program itself holds. Pages of files that are mapped, such as weights, are the system's to drop, and
are not in it. Linux alone has the number.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.2
"""Seconds between two looks at the memory; what lives for less may be missed."""
DISK_INTERVAL = 1.0
"""Seconds between two walks through the folder whose size is watched."""
CGROUPS = Path("/sys/fs/cgroup")
BEGINNINGS = ("Loading", "Checking")
"""Words that begin a part of a run of which the run says no length."""


@dataclass
class Watched:
    """What a command took."""

    status: int = 0
    """Exit status; negative: the signal that ended it."""
    seconds: float = 0.0
    peak: int = 0
    """Bytes of anonymous resident memory at the most, over all processes of the command at one time."""
    peak_by_phase: dict[str, int] = field(default_factory=dict)
    """The same by what the run said that it was doing, in that order."""
    disk_peak: int = 0
    """Bytes that the watched folder took at the most."""
    output: str = ""
    """What the command wrote to standard output."""
    last_line: str = ""
    """Of standard error."""


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process and all its descendants; 0 when it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{member.pid}/status").read_text(encoding="utf-8", errors="replace")
            # Of a process that has ended and was not waited for there is no such line.
            if found := re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes on the disk of all files below ``folder``, those with several names once."""
    seen: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(place, name))
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of memory, and whether the system holds a process to it."""

    bytes: int
    group: Path | None
    """The cgroup that has the limit; None: nothing enforces it."""
    how: str

    @property
    def enforced(self) -> bool:
        return self.group is not None

    def peak(self) -> int | None:
        """The most that the group was charged, the system's cache of its files included; None where it is not told."""
        if self.group is None:
            return None
        try:
            return int((self.group / "memory.peak").read_text())
        except (OSError, ValueError):
            return None


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[MemoryLimit]:
    """A cgroup v2 with ``memory.max`` and no swap, where this process may make one; removed at the end.

    Only a group whose own settings hand memory on to its children can have such a child: nothing is changed outside of
    the new group.
    """
    group, why = _make_group(limit)
    if group is None:
        yield MemoryLimit(limit, None, f"not enforced, only sampled: {why}")
        return
    try:
        yield MemoryLimit(limit, group, f"cgroup v2, memory.max of {group}, no swap")
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def _make_group(limit: int) -> tuple[Path | None, str]:
    """A new cgroup with the limit, or why there is none."""
    root = next((r for r in (CGROUPS, CGROUPS / "unified") if (r / "cgroup.controllers").is_file()), None)
    if root is None:
        return None, "this system has no cgroup v2"
    try:
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            return None, "the memory controller is not one of cgroup v2 here"
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        here = root / own.strip("/")
        # A group with processes of its own hands nothing on, except for the root: the one above may.
        parents = [p for p in (here, here.parent) if p.is_relative_to(root)]
        able = [p for p in parents if "memory" in (p / "cgroup.subtree_control").read_text().split()]
    except (OSError, StopIteration) as error:
        return None, f"cgroup v2 cannot be read ({error})"
    if not able:
        return None, "no cgroup above this process hands memory on to new ones"
    group = able[0] / f"lillama-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return None, f"no cgroup can be made ({error.strerror})"
    try:
        (group / "memory.max").write_text(str(limit))
        with contextlib.suppress(FileNotFoundError):
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        group.rmdir()
        return None, f"the limit of a cgroup cannot be set ({error.strerror})"
    return group, ""


def watch(command: Sequence[str], folder: Path | None = None, limit: MemoryLimit | None = None) -> Watched:
    """Run ``command`` to its end, passing on what it says on standard error, and watch it and the size of ``folder``.

    A line that ends in "…", or starts with one of `BEGINNINGS`, begins a phase. The command runs inside the
    group of ``limit``, if that has one.
    """
    if not sys.platform.startswith("linux"):
        raise SystemExit("anonymous memory can be sampled on Linux alone")
    found = Watched()
    if limit is not None and limit.group is not None:
        # A shell, so that the program is in the group before it has any memory.
        enter = f'echo $$ > "{limit.group}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    phase = ["start"]

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            found.last_line = line.strip() or found.last_line
            if line.rstrip().endswith("…"):
                phase[0] = line.strip().removesuffix("…").strip()
            elif line.startswith(BEGINNINGS):
                phase[0] = line.split()[0]

    def collect() -> None:
        assert process.stdout is not None
        found.output = process.stdout.read()

    readers = [threading.Thread(target=read, daemon=True) for read in (follow, collect)]
    for reader in readers:
        reader.start()
    looked = 0.0
    while process.poll() is None:
        now, held = phase[0], anonymous_bytes(process.pid)
        found.peak = max(found.peak, held)
        found.peak_by_phase[now] = max(found.peak_by_phase.get(now, 0), held)
        if folder is not None and time.monotonic() - looked >= DISK_INTERVAL:
            found.disk_peak = max(found.disk_peak, folder_bytes(folder))
            looked = time.monotonic()
        time.sleep(INTERVAL)
    found.status = process.wait()
    found.seconds = round(time.monotonic() - started, 1)
    for reader in readers:
        reader.join()
    return found
