"""The processes of one job: which of them this one is, and what they tell each other.

``torchrun`` starts them and says so in the environment. Each holds some rows of the data; what is a sum over rows is
summed over the processes, and the first of them, the main one, decides and writes what is common. A process that was
started alone is a job of one: nothing here does anything then, nor is ``torch.distributed`` imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lillama_core.errors import LillamaError, UserError, is_out_of_memory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long one process waits for another that lives. The longest wait is that for text that the main process samples
from the model itself: half an hour where every token is read with all weights of a model of 47e9. Of a process that
has died its peers hear at once."""
BUCKET = 1 << 24
"""Elements that are packed into one message at the most, 64 MB of fp32: many small messages are slow."""
ENDED = (
    "another process of this job has ended, or the job was stopped; what was finished is kept, and --resume goes on"
    " from there"
)


@dataclass(frozen=True)
class World:
    """This process among those of its job. Every process must call the same methods in the same order."""

    rank: int = 0
    """Of this process, from 0."""
    size: int = 1
    """How many processes there are."""
    local_rank: int = 0
    """Of this process among those of its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process decides, speaks and writes for all."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process, where ``device`` was asked for: of several GPUs its own.

        Raises UserError where there is none.
        """
        import torch

        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"{self.size} processes cannot share device {str(device)!r}; pass --device cuda or cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(f"this machine has {count} GPUs, too few for a process on each; lower --nproc-per-node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def numbers(self, count: int) -> range:
        """Which of ``count`` things in a row are this process's: every ``size``-th, from its ``rank`` on."""
        return range(self.rank, count, self.size)

    def own(self, folder: Path) -> Path:
        """A folder in ``folder`` for what no other process reads; ``folder`` itself where there is no other."""
        if self.size == 1:
            return folder
        found = folder / f"process-{self.rank}"
        found.mkdir(exist_ok=True)
        return found

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sums([0.0])

    def sum_(self, tensors: Sequence[torch.Tensor], to: int | None = None) -> None:
        """Replace ``tensors`` by their sums over all processes; their shapes must agree.

        Where ``to`` names a process only that one gets the sums, and what the others are left with means nothing.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            packed = bucket[0] if len(bucket) == 1 else torch.cat([t.reshape(-1) for t in bucket])
            packed = packed.contiguous()
            with _talking():
                if to is None:
                    dist.all_reduce(packed)
                else:
                    dist.reduce(packed, to)
            for tensor, found in zip(bucket, packed.reshape(-1).split([t.numel() for t in bucket]), strict=True):
                if tensor.data_ptr() != found.data_ptr():
                    tensor.copy_(found.view_as(tensor))

    def copy_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace ``tensors`` by those of the main process; their shapes must agree."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            sent = tensor.contiguous()
            with _talking():
                dist.broadcast(sent, 0)
            if tensor.data_ptr() != sent.data_ptr():
                tensor.copy_(sent)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sums of ``numbers`` over all processes, one by one, in fp64."""
        return self._reduced(numbers, "SUM")

    def greatest(self, numbers: Sequence[float]) -> list[float]:
        """The greatest of ``numbers`` over all processes, one by one."""
        return self._reduced(numbers, "MAX")

    def all_true(self, flags: Sequence[bool]) -> list[bool]:
        """Which of ``flags`` are set in every process."""
        return [not unset for unset in self.greatest([not flag for flag in flags])]

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the main process, which alone calls it; it must be plain JSON."""
        if self.size == 1:
            return make()
        return self._gather(make() if self.is_main else None)[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by their ranks; plain JSON."""
        return [value] if self.size == 1 else self._gather(value)

    def _reduced(self, numbers: Sequence[float], how: str) -> list[float]:
        if self.size == 1 or not numbers:
            return [float(n) for n in numbers]
        import torch
        import torch.distributed as dist

        found = torch.tensor(numbers, dtype=torch.float64)
        with _talking():
            dist.all_reduce(found, getattr(dist.ReduceOp, how))
        return found.tolist()

    def _gather(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode()
        longest = int(self.greatest([len(text)])[0])
        mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _talking():
            dist.all_gather(found, mine)
        return [json.loads(of_rank.numpy().tobytes()) for of_rank in found]


ALONE = World()
"""The world of a process that was started alone."""


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """``tensors``, in their order, in lists of one dtype and device and not too many elements, unless of one tensor."""
    found: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        fits = bool(found) and size + tensor.numel() <= BUCKET
        if fits and (found[-1][0].dtype, found[-1][0].device) == (tensor.dtype, tensor.device):
            found[-1].append(tensor)
            size += tensor.numel()
        else:
            found.append([tensor])
            size = tensor.numel()
    return found


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Say in a line what the backends say when the other side has gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LillamaError(ENDED) from error


def world_of_environment() -> World:
    """The world that ``torchrun`` says this process is in."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # Others set RANK and WORLD_SIZE as well, some of them for machines instead of processes.
        return ALONE
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    return World(rank, size, local)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the other processes of the job: gloo for what is on CPUs, NCCL for what is on GPUs.

    Inside they end together. Once joined they stay connected until this process ends, which is when the others hear of
    an error: a second connection would find the addresses of the first. Raises UserError in a program that has set up
    ``torch.distributed`` for itself.
    """
    world = world_of_environment()
    if world.size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and not _connected:
        raise UserError("this program has set up torch.distributed already; lillama has to do that by itself")
    with _ending_together():
        if not _connected:
            with _talking():
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
            _connected.append(world)
            atexit.register(_disconnect)
        try:
            yield world
            world.barrier()
        except BaseException:
            # To take leave of processes that may have ended could take for ever.
            atexit.unregister(_disconnect)
            raise


_connected: list[World] = []
"""The world that this process has joined, if it has."""


def _disconnect() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """While open, torchrun's signal that another process has failed ends this one with a line."""

    def end(*_: object) -> None:
        raise LillamaError(ENDED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fails_first() -> bool:
    """Whether no other process of the job has failed before: then it is for this one to say why the job ends."""
    if world_of_environment().size == 1:
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        # That of torchrun itself, which outlives the processes.
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return int(store.add(f"lillama/failures/{attempt}", 1)) == 1
    except RuntimeError:
        return True
