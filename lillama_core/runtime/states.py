"""Hidden states of the dense model at the entry of every block: in files of the run, since they grow with its depth."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lillama_core.errors import LillamaError
from lillama_core.system.files import write_tensors
from lillama_core.system.names import safe_file_stem


def rows_of(hidden: torch.Tensor, rows: slice, of: int) -> torch.Tensor:
    """The hidden states of some rows of a batch that has ``of``: a view.

    A model that takes the things of all rows in one has a stream [of n, width], with n positions for each.
    """
    each = len(hidden) // of
    return hidden[rows.start * each : rows.stop * each]


@dataclass(frozen=True)
class StateStore:
    """The hidden states [rows, length, width] that enter the blocks of stacks, one file a block, batch by batch.

    Position i of a stack is the entry of its block i; the position behind the last block is what leaves the stack.
    """

    folder: Path
    dtype: torch.dtype
    """In which states are kept: that of matrix products, so that products of them lose nothing."""

    def _file(self, stack: str, position: int) -> Path:
        return self.folder / f"{safe_file_stem(f'{stack}.{position}')}.safetensors"

    def has(self, stack: str, position: int) -> bool:
        return self._file(stack, position).is_file()

    def write(self, stack: str, position: int, hidden: Mapping[int, torch.Tensor]) -> None:
        """Keep the states of some batches, by the numbers of the batches."""
        # Not forced to the disk: whoever loses the machine's power computes them again.
        write_tensors(self._file(stack, position), {str(i): h.to(self.dtype) for i, h in hidden.items()}, durable=False)

    def read(self, stack: str, position: int, batches: Sequence[int]) -> States:
        """The states of ``batches``, in their order, read from the file when they are asked for."""
        return States(self._file(stack, position), tuple(batches))

    def has_all(self, stack: str, position: int, batches: Collection[int]) -> bool:
        """Whether the states of all ``batches`` are there."""
        if not self.has(stack, position):
            return False
        with safe_open(self._file(stack, position), framework="pt") as file:
            return {str(i) for i in batches} <= set(file.keys())


class States(Sequence[torch.Tensor]):
    """States of several batches, each [rows, length, width] in fp32 on the CPU, in memory only while they are used."""

    def __init__(self, path: Path, batches: tuple[int, ...]) -> None:
        self._path = path
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]  # no slices
        try:
            with safe_open(self._path, framework="pt") as file:
                # Of fp32 a view of the mapped file: the system may drop its pages.
                found: torch.Tensor = file.get_tensor(str(self._batches[index]))
        except (SafetensorError, OSError) as error:
            raise LillamaError(f"{str(self._path)!r} is damaged ({error}); start anew with --overwrite") from None
        return found.float()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))
