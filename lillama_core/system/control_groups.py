"""What memory Linux still gives to this process, by the limits of the control groups that it is in.

A container, a batch system or a unit of systemd may bound a group of processes below what the machine has. Of every
group from the process's own up to the root, what is left is the limit less what its processes hold; pages of files that
nobody has used lately are given up when memory is asked for, and count as free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
"""Lines ``hierarchy:controllers:path``; version 2 has one hierarchy, 0, without names of controllers."""
VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and 1: the controller, files of the limit and of what is used, key of idle file pages in memory.stat."""


def memory_left(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that the process may still take; None where no group has a limit, and where there are no groups."""
    left = [room for version in VERSIONS for room in _rooms(root, own, *version)]
    return min(left, default=None)


def _rooms(root: Path, own: Path, controller: str, limit: str, used: str, idle: str) -> Iterator[int]:
    for folder in _groups(root / controller, own, controller):
        # "max" is no number, and there is no limit then. What cannot be read does not count.
        with contextlib.suppress(OSError, ValueError):
            bound = int((folder / limit).read_text(encoding="ascii"))
            taken = int((folder / used).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            cached = {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}
            yield max(0, bound - max(0, taken - cached.get(idle, 0)))


def _groups(root: Path, own: Path, controller: str) -> list[Path]:
    """The folder of the process's group, those of the groups around it, and the root's."""
    found = [root]
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            # In a container the path may be one of the host, of which there is no folder, or lead out of the root.
            parts = Path(path.lstrip("/")).parts
            if controller in controllers.split(",") and ".." not in parts:
                found += [root.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    return found
