"""CTranslate2's ``model.bin``: named tensors, one after the other, behind a short header.

Little endian: u32 version, string specification, u32 revision, u32 number of variables; each variable a string name, u8
rank, u32 per dimension, u8 type, u32 bytes, data; then u32 number of aliases, each two strings. A string is a
u16 length that counts the final NUL, and the bytes (CTranslate2, ``python/ctranslate2/specs/model_spec.py``).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lillama_core.errors import UserError

VERSION = 6
"""The layout that CTranslate2 3 and 4 write."""
TYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}


@dataclass(frozen=True)
class ModelFile:
    """What the file holds; the tensors are copies in memory, in the file's types."""

    specification: str
    """The kind of model, such as ``WhisperSpec``."""
    variables: dict[str, Tensor]
    aliases: dict[str, str]
    """Other name -> name in ``variables``."""


def read_model_file(path: Path, specification: str | None = None) -> ModelFile:
    """The contents of ``path``.

    Every size is compared with the file's own before memory is taken for it. Raises UserError when the file is missing,
    not of this format, truncated, or, where ``specification`` is given, of another kind of model (found before any
    tensor is read).
    """
    try:
        size = path.stat().st_size
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _Reader(path, raw).model(specification)


class _Reader:
    """A position in the bytes of a file, which only moves within them."""

    def __init__(self, path: Path, raw: Tensor) -> None:
        self._path = path
        self._raw = raw
        self._position = 0

    def model(self, specification: str | None) -> ModelFile:
        version = self._number("I", "its version")
        if version != VERSION:
            raise UserError(
                f"{self._path}: version {version} of CTranslate2's format (or another format) is not supported, only "
                f"version {VERSION}; convert the model again with a current ct2-transformers-converter"
            )
        found = self._string("its specification")
        if specification is not None and found != specification:
            raise UserError(
                f"{self._path} holds a model of kind {found!r}; of CTranslate2's models only Whisper ({specification}) "
                "is supported"
            )
        self._number("I", "its revision")
        variables: dict[str, Tensor] = {}
        for _ in range(self._number("I", "the number of variables")):
            name = self._string("the name of a variable")
            if name in variables:
                raise self._corrupt(f"it holds {name} twice")
            variables[name] = self._tensor(name)
        aliases = {}
        for _ in range(self._number("I", "the number of aliases")):
            alias, name = self._string("an alias"), self._string("an alias")
            if name not in variables:
                raise self._corrupt(f"{alias} stands for {name}, which it does not hold")
            aliases[alias] = name
        if self._position != len(self._raw):
            raise self._corrupt(f"{len(self._raw) - self._position} bytes follow after the last entry")
        return ModelFile(found, variables, aliases)

    def _bytes(self, count: int, what: str) -> Tensor:
        """The next ``count`` bytes, not copied."""
        left = len(self._raw) - self._position
        if count > left:
            raise UserError(
                f"{self._path} ends within {what} ({count} bytes needed, {left} left): it is truncated; "
                "copy or download it again"
            )
        self._position += count
        return self._raw[self._position - count : self._position]

    def _number(self, form: str, what: str) -> int:
        data = self._bytes(struct.calcsize("<" + form), what)
        return int(struct.unpack("<" + form, bytes(data.tolist()))[0])

    def _string(self, what: str) -> str:
        data = bytes(self._bytes(self._number("H", what), what).tolist())
        try:
            return data.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"{what} is not text") from error

    def _tensor(self, name: str) -> Tensor:
        shape = [self._number("I", name) for _ in range(self._number("B", name))]
        code = self._number("B", name)
        if code not in TYPES:
            raise self._corrupt(f"{name} has the unknown type {code}")
        size = self._number("I", name)
        needed = math.prod(shape) * TYPES[code].itemsize
        if size != needed:
            raise self._corrupt(f"{name} of shape {shape} needs {needed} bytes and states {size}")
        # The copy starts at an address that suits every type; the file aligns nothing.
        data = self._bytes(size, name).clone().view(TYPES[code])
        try:
            return data.reshape(shape)
        except RuntimeError as error:  # nothing, in a shape that beside its 0 is too large to count
            raise self._corrupt(f"{name} has the impossible shape {shape}") from error

    def _corrupt(self, what: str) -> UserError:
        return UserError(f"{self._path} is damaged: {what}; copy or download it again")
