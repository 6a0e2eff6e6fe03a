"""Calibration data that is handed over as Python objects instead of being named: texts, data sets, batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lillama_core.data.documents import has_document, unknown_columns
from lillama_core.errors import UserError

DATA = "data="
"""The name of such data in messages and in the record, where other data has that of its file or dataset."""
MAIN = ""
"""The name in a batch of a tensor that came without one: the model's main input."""

ACCEPTED = (
    "a list of texts, a datasets.Dataset with a column of texts or of messages, or an iterable of batches"
    " (dictionaries of the model's inputs, such as input_ids [rows, length])"
)


@dataclass(frozen=True)
class TextData:
    """Texts and conversations."""

    rows: Iterator[tuple[str, Mapping[str, Any]]]
    """Where each is, for messages, and its columns as `document_of` reads them; can be read once."""


@dataclass(frozen=True)
class BatchData:
    """Inputs of the model."""

    batches: Iterator[Mapping[str, Any]]
    """Name of an input -> tensor, array or nested list of numbers; `MAIN` where there was no name. Can be read once."""


GivenData = TextData | BatchData


def given_data(data: Any) -> GivenData:
    """Find out what ``data`` holds by its first item; raises UserError that says what is accepted."""
    if isinstance(data, TextData | BatchData):
        return data
    if isinstance(data, str | bytes):
        raise UserError(
            "data= takes objects, not one string: give a list of texts, or name a file or dataset in calibration="
        )
    if isinstance(data, Mapping):
        splits = [str(name) for name, value in data.items() if hasattr(value, "column_names")]
        if splits:
            raise UserError(f"data= has the splits {', '.join(splits)}; give one of them, such as data[{splits[0]!r}]")
    if isinstance(data, Mapping | torch.Tensor | np.ndarray):
        # One batch.
        data = [data]
    try:
        items = iter(data)
    except TypeError:
        raise UserError(f"data= takes {ACCEPTED}, not {_a(data)}") from None
    try:
        first = next(items)
    except StopIteration:
        raise UserError(f"data= is empty; it takes {ACCEPTED}") from None
    items = itertools.chain((first,), items)
    if _row(first, 0) is not None:
        return TextData(_texts(items))
    # Raises for what is neither before anything has been done.
    next(_batches([first]))
    return BatchData(_batches(items))


def _a(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"


def _row(item: Any, number: int) -> Mapping[str, Any] | None:
    """``item`` as a row of columns with a text or a conversation, None when it is a batch."""
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, list | tuple) and item and all(isinstance(turn, Mapping) for turn in item):
        return {"messages": list(item)}
    if isinstance(item, Mapping) and "input_ids" not in item:
        if has_document(item):
            return item
        if not any(_is_numbers(value) for value in item.values()):
            raise unknown_columns(f"data= item {number}", item)
    return None


def _is_numbers(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float | torch.Tensor | np.ndarray | np.number) and not isinstance(value, bool)


def _texts(items: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, item in enumerate(items):
        row = _row(item, number)
        if row is None:
            raise UserError(f"data= item {number} is {_a(item)}, but those before are texts")
        yield f"data= item {number}", row


def _batches(items: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            yield item
        elif isinstance(item, tuple | list) and len(item) == 1 and isinstance(item[0], torch.Tensor):
            # A DataLoader over a TensorDataset.
            yield {MAIN: item[0]}
        elif isinstance(item, torch.Tensor | np.ndarray) or (isinstance(item, list | tuple) and _is_numbers(item)):
            yield {MAIN: item}
        else:
            raise UserError(f"data= item {number} is {_a(item)}; data= takes {ACCEPTED}")


def stack_batches(
    data: BatchData, like: Mapping[str, torch.Tensor], limit: int | None = None, optional: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """The first ``limit`` rows of all batches (None: all of them), by the name of the input [rows, ...].

    ``like`` has tensors of the same names, of which the first is the main one, and numbers of dimensions; those in
    ``optional`` may be missing. A tensor with one dimension less is one row. Other entries of a batch are left out.
    Raises UserError for inputs that are missing, of another shape than those before, or padded.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    main, rows = next(iter(like)), 0
    for number, batch in enumerate(data.batches):
        where = f"data= batch {number}"
        named = {main if name == MAIN else str(name): value for name, value in batch.items()}
        absent = [name for name in like if name not in named and name not in optional]
        if absent:
            raise UserError(
                f"{where} has no {absent[0]!r} (it has {', '.join(sorted(named)) or 'nothing'}); this model takes"
                f" {', '.join(name for name in like if name not in optional)}"
            )
        if "attention_mask" not in like and not _tensor(named.get("attention_mask", 1), where, "attention_mask").all():
            raise UserError(
                f"{where} has padded rows (zeros in its attention_mask); give rows without padding, or the texts"
                " themselves, which are put together to rows of equal length"
            )
        found = {}
        for name in like:
            if name not in named:
                continue
            tensor = _tensor(named[name], where, name)
            if tensor.dim() == like[name].dim() - 1:
                tensor = tensor[None]
            earlier = parts.get(name)
            shape = like[name].shape if earlier is None else earlier[0].shape
            if tensor.dim() != like[name].dim() or (earlier is not None and tensor.shape[1:] != shape[1:]):
                wanted = ", ".join("…" if earlier is None else str(n) for n in shape[1:])
                raise UserError(
                    f"{where}: {name} has the shape {list(tensor.shape)}; [rows, {wanted}] is expected, the same for"
                    " all rows"
                )
            found[name] = tensor
        if parts and set(found) != set(parts):
            raise UserError(f"{where} has {', '.join(found)}, the first has {', '.join(parts)}")
        if len({len(tensor) for tensor in found.values()}) > 1:
            raise UserError(f"{where}: its inputs have different numbers of rows")
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
        rows += len(found[main])
        if limit is not None and rows >= limit:
            break
    return {name: torch.cat(tensors)[:limit].contiguous() for name, tensors in parts.items()}


def _tensor(value: Any, where: str, name: str) -> torch.Tensor:
    """``value`` on the CPU, as int64 or float32, and not the caller's own memory."""
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{where}: {name} is no tensor, and cannot be made one (are its rows of equal length?)"
        ) from None
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def inputs_sha256(inputs: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
