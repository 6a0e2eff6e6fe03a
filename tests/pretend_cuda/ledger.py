"""What a real device would have had to do: synchronisations, copies and live bytes, by the line that asked for it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

ROOT = Path(__file__).parents[2]
OWN = tuple(str(ROOT / name) + "/" for name in ("lillama_core", "plugins"))
"""Folders whose lines are counted; what the libraries do counts for the line that called them."""


class Ledger:
    """Counts since the start of the process; one thread at a time changes it, since torch's own wait for each other."""

    def __init__(self) -> None:
        self.synchronisations: Counter[str] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        """(``to device`` or ``to host``, line) -> bytes."""
        self.by_phase: Counter[str] = Counter()
        """Phase -> synchronisations; those of a phase within another count for both."""
        self.peak_by_phase: dict[str, int] = {}
        self.live = 0
        """Bytes of all storages on the device that some tensor holds."""
        self.peak = 0
        self._phases: list[str] = []
        self._storages: dict[int, list[int]] = {}
        """Address of a storage -> [tensors that hold it, its bytes]."""

    def synchronise(self, what: str) -> None:
        """Count one wait of the CPU for the device."""
        self.synchronisations[f"{line()} {what}"] += 1
        for phase in set(self._phases):
            self.by_phase[phase] += 1

    def copy(self, tensor: torch.Tensor, to_device: bool, waits: bool) -> None:
        """Count the bytes of a copy between host and device, and whether the CPU waits until all before it is done."""
        way = "to device" if to_device else "to host"
        self.copies[way, line()] += tensor.numel() * tensor.element_size()
        if waits:
            self.synchronise(f"copy {way}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what happens inside to ``name``, and to the phases around it."""
        self._phases.append(name)
        self._note_peak()
        try:
            yield
        finally:
            self._phases.pop()

    def hold(self, inner: torch.Tensor) -> None:
        """Count the storage of ``inner`` as long as this tensor, or another that was held, refers to it."""
        storage = inner.untyped_storage()
        address = storage.data_ptr()
        if not address or hasattr(inner, "held"):
            return
        entry = self._storages.setdefault(address, [0, storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            self.live += entry[1]
            self._note_peak()
        # Gone when the tensor is.
        vars(inner)["held"] = _Held(self, address)

    def release(self, address: int) -> None:
        entry = self._storages[address]
        entry[0] -= 1
        if not entry[0]:
            self.live -= entry[1]
            del self._storages[address]

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.live)
        for phase in self._phases:
            self.peak_by_phase[phase] = max(self.peak_by_phase.get(phase, 0), self.live)


class _Held:
    """Releases a storage when it is collected."""

    __slots__ = ("address", "ledger")

    def __init__(self, ledger: Ledger, address: int) -> None:
        self.ledger, self.address = ledger, address

    def __del__(self) -> None:
        self.ledger.release(self.address)


def line() -> str:
    """Return ``file:line`` of the innermost line of lillama that is being executed, else that of a library."""
    frame = sys._getframe(2)
    found = _own(frame)
    if found is None:
        # A backward pass runs in a thread of torch's; the one that started it waits.
        waiting = sys._current_frames().get(threading.main_thread().ident or 0)
        found = _own(waiting)
    if found is not None:
        return found
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == Path(__file__).parent:
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"


def _own(frame: FrameType | None) -> str | None:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OWN):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return None
