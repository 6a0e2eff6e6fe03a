"""Check untrusted weight files: what their headers claim is compared with the file before anything is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lillama_core.errors import UserError, one_line

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's numbers, by its number of their type."""


class StoredTensor(NamedTuple):
    """Where a tensor lies in its safetensors file, and as what."""

    dtype: str
    """As the format calls it: ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the file."""
    end: int


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds, by its header; no weight is read.

    Raises UserError unless the header is sound and its tensors lie within the file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            # The header of even the largest models is a few megabytes; a wild length is not worth the memory.
            if length > min(size - 8, 100_000_000):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
        found = {k: _stored(t, 8 + length) for k, t in header.items() if k != "__metadata__"}
        if not found:
            raise ValueError("it has no tensors")
        end = max(t.end for t in found.values())
        if end != size:
            raise ValueError(f"it has {size} bytes where its header promises {end}")
    except (
        *(ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error),
    ) as error:
        raise UserError(f"weight file {str(path)!r} is corrupt or truncated: {one_line(error)}") from None
    return found


def _stored(entry: dict[str, Any], begin: int) -> StoredTensor:
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError(f"its header claims a tensor from byte {start} to {end}")
    return StoredTensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), begin + start, begin + end)


def check_gguf(path: Path) -> None:
    """Raise UserError unless a GGUF file can be parsed and its tensors lie within the file."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{str(path)!r} is not a GGUF file (its first four bytes are not 'GGUF')")
    from gguf import GGUFReader

    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            _Fields(stream, size).check()
        reader = GGUFReader(str(path))
        if not reader.tensors:
            raise ValueError("it has no tensors")
        end = max(int(t.data_offset + t.n_bytes) for t in reader.tensors)
        if end > size:
            raise ValueError(f"it has {size} bytes where its tensors need {end}")
        blocks = [int(f.contents()) for name, f in reader.fields.items() if name.endswith(".block_count")]
        if blocks and not 0 <= max(blocks) <= len(reader.tensors):
            raise ValueError(f"it claims {max(blocks):,} blocks and has {len(reader.tensors):,} tensors")
    # The reader indexes into a memory map with whatever numbers the file holds.
    except Exception as error:
        raise UserError(f"GGUF file {str(path)!r} is corrupt or truncated: {one_line(error)}") from None


class _Fields:
    """The key-value pairs of a GGUF file, passed over: no length that they claim reaches beyond the file.

    The library's reader believes these lengths, and would go through elements that are not there for as long as it is
    told to. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self._order = stream, size, "<"

    def check(self) -> None:
        """Raise ValueError for a length that cannot be."""
        self._skip(4)
        if not self._number("I") & 0xFFFF:
            # The version is a small number: this one has been written by a machine of the other byte order.
            self._order = ">"
        self._number("Q")
        for _ in range(self._claimed(self._number("Q"), 12)):
            self._value(_STRING)
            self._value(self._number("I"))

    def _number(self, code: str) -> int:
        data = self._stream.read(struct.calcsize(code))
        value: int = struct.unpack(self._order + code, data)[0]
        return value

    def _claimed(self, count: int, size: int) -> int:
        """``count``, of which each needs at least ``size`` bytes."""
        left = self._size - self._stream.tell()
        if count * size > left:
            raise ValueError(f"its header claims {count} values where {left} bytes are left")
        return count

    def _skip(self, count: int) -> None:
        self._stream.seek(self._claimed(count, 1), 1)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            elif inner == _STRING:
                for _ in range(self._claimed(count, 8)):
                    self._value(inner)
            else:
                raise ValueError(f"it holds an array of type {inner}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"it holds a value of unknown type {kind}")
