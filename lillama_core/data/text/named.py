"""Rows of tokens from data that the user named: a file or a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lillama_core.data.documents import Document, document_of
from lillama_core.data.hub import dataset_rows
from lillama_core.data.objects import DATA, TextData
from lillama_core.data.sources import HubDataset, LocalFile, OwnText, Purpose, Row, Source, locate
from lillama_core.data.text.files import ROW_BYTES, TEXT_BYTES, json_rows, parquet_rows, read_text
from lillama_core.data.text.windows import chunk, encode, join, parts, with_bos
from lillama_core.errors import UserError
from lillama_core.system.seeds import permutation

# Generous, so that reading stops early only when there is enough: no script needs more bytes for a token.
_TEXT_BYTES_PER_TOKEN = 16
_ROW_BYTES_PER_TOKEN = 64
_ENCODED_PER_WANTED = 8
"""Tokens of a long text that are encoded for each that is wanted at random: rows come from all over its parts."""


@dataclass(frozen=True)
class NamedWindows:
    """Rows from one named source."""

    rows: torch.Tensor
    """int64 ``[rows, sequence_length]``: as many as were wanted, or all that there are."""
    tokens: int
    """Tokens that were read; all that there are when ``rows`` are fewer than wanted."""
    description: dict[str, Any]


@dataclass(frozen=True)
class Demand:
    """How many rows of which length, and in which order."""

    sequence_length: int
    rows: int | None
    """None: all that the data gives."""
    seed: int | None
    """None: from the beginning, in order."""

    @property
    def tokens(self) -> int | None:
        return None if self.rows is None else self.rows * self.sequence_length

    def bytes(self, least: int, per_token: int) -> int | None:
        """How much of a file to read at most."""
        return None if self.tokens is None else max(least, per_token * self.tokens)


def named_windows(source: Source, tokenizer: Any, demand: Demand, purpose: Purpose) -> NamedWindows:
    """Rows from ``source``.

    Running text is encoded as a whole, or in parts where it is long, and the rows are windows of it; documents (rows of
    JSON, Parquet or a dataset) are joined by the end-of-text token. A token that begins every text begins every row.
    Raises UserError when the data cannot be read or has no text.
    """
    found = _windows(source, tokenizer, demand, purpose)
    return replace(found, rows=with_bos(found.rows, tokenizer))


def given_windows(given: TextData, tokenizer: Any, demand: Demand) -> NamedWindows:
    """Rows of the texts and conversations that were handed over, joined in their order like the rows of a file."""
    found = _from_rows(DATA, given.rows, tokenizer, demand, {"kind": "texts"})
    return replace(found, rows=with_bos(found.rows, tokenizer))


def _windows(source: Source, tokenizer: Any, demand: Demand, purpose: Purpose) -> NamedWindows:
    location = locate(source.name, purpose)
    if isinstance(location, OwnText):
        raise UserError(f"{source.name!r} is text that the model writes; name a file or a dataset here")
    description: dict[str, Any]
    if isinstance(location, LocalFile):
        description = {"kind": location.format, "path": str(location.path.resolve())}
    else:
        description = {
            "kind": "dataset",
            "dataset": location.repo,
            "config": location.config,
            "split": location.split,
        }
    if isinstance(location, HubDataset) and location.joined:
        text = _joined_text(location, demand)
        return _from_text(source.name, text, tokenizer, demand, description)
    if isinstance(location, LocalFile) and location.format == "text":
        text, complete = read_text(location.path, demand.bytes(TEXT_BYTES, _TEXT_BYTES_PER_TOKEN))
        description |= {"characters_read": len(text), "whole_file": complete}
        return _from_text(source.name, text, tokenizer, demand, description)
    return _from_rows(source.name, _rows(location, demand), tokenizer, demand, description)


def _rows(location: LocalFile | HubDataset, demand: Demand) -> Iterator[Row]:
    if isinstance(location, HubDataset):
        return dataset_rows(location, demand.seed)
    if location.format == "parquet":
        return parquet_rows(location.path, demand.seed)
    return json_rows(location.path, demand.seed, demand.bytes(ROW_BYTES, _ROW_BYTES_PER_TOKEN))


def _joined_text(dataset: HubDataset, demand: Demand) -> str:
    limit = demand.bytes(TEXT_BYTES, _TEXT_BYTES_PER_TOKEN)
    pieces: list[str] = []
    length = 0
    # In order: shuffled lines would not be running text.
    for where, row in dataset_rows(dataset, None):
        if not isinstance(row.get("text"), str):
            raise UserError(f"{where}: expected a column 'text' with text")
        pieces.append(row["text"])
        length += len(row["text"]) + 2
        if limit is not None and length >= limit:
            break
    return "\n\n".join(pieces)


def _from_text(name: str, text: str, tokenizer: Any, demand: Demand, description: dict[str, Any]) -> NamedWindows:
    pieces = parts(text)
    if len(pieces) > 1 and demand.seed is not None:
        pieces = [pieces[i] for i in permutation(len(pieces), demand.seed, "parts")]
    wanted = None if demand.tokens is None else demand.tokens * (1 if demand.seed is None else _ENCODED_PER_WANTED)
    tokens, found = 0, list[torch.Tensor]()
    rest: list[int] = []
    for piece in pieces:
        ids = encode(tokenizer, piece)
        tokens += len(ids)
        if demand.seed is None:
            # In order: what is left of a part begins the next row.
            ids = rest + ids
            rest = ids[len(ids) // demand.sequence_length * demand.sequence_length :]
        found.append(chunk(ids, demand.sequence_length))
        if wanted is not None and tokens >= wanted:
            break
    if not tokens:
        raise UserError(f"{name}: the tokenizer makes no tokens of this text; is it the model's own tokenizer?")
    if len(pieces) > 1:
        description |= {"parts": len(pieces), "parts_encoded": len(found)}
    rows = torch.cat(found)
    if demand.seed is not None:
        rows = rows[permutation(len(rows), demand.seed, "windows")]
    return NamedWindows(rows[: demand.rows].clone(), tokens, description)


def _from_rows(
    name: str,
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    demand: Demand,
    description: dict[str, Any],
) -> NamedWindows:
    documents: Iterator[Document] = (
        document for where, row in rows if (document := document_of(row, where)) is not None
    )
    joined = join(tokenizer, documents, demand.tokens)
    if not joined.ids:
        if joined.skipped:
            raise UserError(f"{name}: the chat template refuses every conversation ({joined.refusal})")
        raise UserError(f"{name}: the tokenizer makes no tokens of these rows; do they hold any text?")
    description |= {"documents": joined.documents, "refused_by_chat_template": joined.skipped}
    return NamedWindows(chunk(joined.ids, demand.sequence_length)[: demand.rows].clone(), len(joined.ids), description)
