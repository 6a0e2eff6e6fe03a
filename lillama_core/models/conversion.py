"""Which tensors of a checkpoint make which tensor of a model, found from shapes alone, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lillama_core.errors import UserError, one_line
from lillama_core.models.integrity import StoredTensor, check_safetensors
from lillama_core.models.transformers_adapter import Names, adjusted, dtypes_kept, tied_weights

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes of safetensors that torch has too. https://github.com/huggingface/safetensors, ``Dtype``"""

Read = Callable[[str], torch.Tensor]
"""Gives the tensor of a name on disk."""


@dataclass
class Step:
    """What is made of some tensors on disk at once: one tensor under another name, or whatever a converter makes."""

    name: str
    """In memory; with a converter that makes several tensors the name of the first."""
    dtype: torch.dtype
    """To which all sources are cast before they are converted, as transformers does it."""
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    """(name on disk, pattern of the converter), in the order in which they are joined."""

    @property
    def converts(self) -> bool:
        return self.sources[0][1] is not None


class Conversion:
    """How the tensors ``files`` (name on disk -> safetensors file) become those of ``model``, on the meta device.

    Everything goes through once as shapes, so that the constructor raises UserError for tensors whose shape or kind of
    number is not that of the model: shards of another model, or of another revision.
    """

    def __init__(self, model: Any, files: Mapping[str, Path], dtype: torch.dtype, names: Names | None = None) -> None:
        """``names`` are those of ``model``, where they are known already: to find them takes a look at all of it."""
        self._model, self._files = model, files
        self.names = names or Names(model)
        known = self.names.known
        kept = {re.compile(pattern): kept for pattern, kept in dtypes_kept(model, dtype).items()}
        steps: dict[str, Step] = {}
        left: set[str] = set()
        for key in sorted(files, key=Names.natural):
            name, pattern = self.names.in_memory(key)
            if name not in known:
                left.update(self.names.unmatched(name, pattern))
                continue
            if name not in steps:
                own = next((d for regex, d in kept.items() if regex.search(name)), known[name].dtype)
                steps[name] = Step(name, own)
            steps[name].sources.append((key, pattern))
        self.steps = self._check(steps.values(), known)
        """Steps with the names in memory of what each makes."""
        made = {name for _, names in self.steps for name in names}
        missing = _without_tied(set(known) - made, tied_weights(model))
        self.missing, self.unexpected = adjusted(model, missing, left)
        """Names in memory that nothing is made for, and those that the model does not have."""

    def _check(self, steps: Iterable[Step], known: Mapping[str, torch.Tensor]) -> list[tuple[Step, tuple[str, ...]]]:
        """Take every step with shapes, and return what it makes."""
        stored: dict[str, StoredTensor] = {}
        for file in sorted(set(self._files.values())):
            stored.update({k: v for k, v in check_safetensors(file).items() if self._files.get(k) == file})

        def shape_of(key: str) -> torch.Tensor:
            if key not in stored:
                raise UserError(f"weight file {str(self._files[key])!r} does not hold {key}")
            if stored[key].dtype not in DTYPES:
                raise UserError(f"{key} in {self._files[key].name} is of a type that is not known: {stored[key].dtype}")
            return torch.empty(stored[key].shape, dtype=DTYPES[stored[key].dtype], device="meta")

        found = []
        for step in steps:
            key, _ = step.sources[0]
            for source, _ in step.sources:
                if shape_of(source).is_floating_point() != step.dtype.is_floating_point:
                    raise UserError(
                        f"{source} in {self._files[source].name} is of type {stored[source].dtype}, which"
                        f" {step.name} of the model cannot be made of"
                    )
            made = self.run(step, shape_of)
            for name, tensor in made.items():
                if name not in known:
                    raise UserError(f"{key} in {self._files[key].name} is converted to {name}, which the model lacks")
                if tensor.shape != known[name].shape:
                    of = ", ".join(sorted({self._files[k].name for k, _ in step.sources}))
                    raise UserError(
                        f"{name} is {list(tensor.shape)} in {of} where the model's config asks for"
                        f" {list(known[name].shape)}: config and all weight files must be of one revision of the model"
                    )
            found.append((step, tuple(made)))
        return found

    def run(self, step: Step, read: Read) -> dict[str, torch.Tensor]:
        """Return what ``step`` makes, by name in memory; raises UserError where the converter fails.

        Every source is read when it is needed. What is made shares no memory with what ``read`` returns.
        """
        if not step.converts:
            # Of several names on disk for one tensor transformers takes the first.
            key, _ = step.sources[0]
            return {step.name: _own(read(key), step.dtype)}
        sources = [
            (key, pattern, lambda key=key: read(key).to(step.dtype))
            for key, pattern in step.sources
            if pattern is not None
        ]
        try:
            made = self.names.convert(self._model, step.name, sources)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            key = step.sources[0][0]
            where = self._files[key].name
            raise UserError(
                f"{step.name} cannot be made of {key} in {where}, and its like: {one_line(error)}"
            ) from None
        # Several sources are joined by copying; of one, what is made may be parts.
        return {k: v.clone() for k, v in made.items()} if len(sources) == 1 else made


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.clone() if tensor.dtype == dtype else tensor.to(dtype)


def _without_tied(missing: set[str], ties: list[tuple[str, str]]) -> set[str]:
    """``missing`` without the names of weights that are one parameter with another that is there."""
    found = set(missing)
    for _ in ties:
        for pair in ties:
            if found & set(pair) and not found.issuperset(pair):
                found -= set(pair)
    return found
