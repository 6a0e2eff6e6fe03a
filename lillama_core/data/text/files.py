"""Reading text, JSON lines and Parquet from disk, without reading more than is needed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from lillama_core.data.sources import Row
from lillama_core.data.text.documents import COLUMNS, has_document, unknown_columns
from lillama_core.errors import UserError
from lillama_core.system.seeds import permutation

TEXT_BYTES = 16 << 20
"""Of a larger text file only the beginning is read: tokenizers need some fifty times the memory of a text."""
LIST_BYTES = 1 << 30
"""Of the largest JSON list that is read; lines can be read one by one, a list cannot."""
ROW_BYTES = 256 << 20
"""Of a larger file of JSON lines only the beginning is read."""
_PEEK_BYTES = 1 << 16
_CHECKED_ROWS = 1000


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0] if str(error) else repr(error)
    return UserError(f"{path} cannot be read: {reason}")


def read_text(path: Path, limit: int | None) -> tuple[str, bool]:
    """The text of a UTF-8 file, and whether this is all of it.

    ``limit`` is the number of bytes to read at most (None: no limit). A byte order mark is dropped and line
    ends become ``\\n``. Raises UserError when the file is empty or is not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read() if limit is None else stream.read(limit)
            complete = limit is None or not stream.read(1)
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decode(path, raw, complete)
    if not text.strip():
        raise UserError(f"{path} is empty; calibration needs text")
    return text.replace("\r\n", "\n").replace("\r", "\n"), complete


def _decode(path: Path, raw: bytes, complete: bool) -> str:
    if b"\0" in raw:
        raise UserError(
            f"{path} is not a text file (it holds binary data or UTF-16); "
            "give UTF-8 text, .jsonl, .jsonl.gz or .parquet"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A cut in the middle of a character is ours, not the file's.
        if not complete and error.start >= len(raw) - 3:
            return raw[: error.start].decode("utf-8-sig")
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{raw[error.start]:02x} at position {error.start}); "
            "convert it to UTF-8, or give .jsonl or .parquet"
        ) from error


def check_text(path: Path) -> None:
    """Raise UserError when the beginning of ``path`` is empty or not UTF-8 text."""
    read_text(path, _PEEK_BYTES)


def json_rows(path: Path, seed: int | None, limit: int | None) -> Iterator[Row]:
    """The rows of a file of JSON lines, or of one JSON list, plain or gzipped.

    In random order by ``seed``, in file order for None. ``limit`` is the number of (uncompressed) bytes of
    lines to consider at most. Raises UserError naming the line when a line is not a JSON object.
    """
    items: Iterable[tuple[str, Any]] = _json_items(path, limit)
    if seed is not None:
        kept = list(items)
        items = (kept[index] for index in permutation(len(kept), seed, "rows"))
    for number, item in items:
        yield f"{path}, {number}", _json_object(path, number, item)


def _json_items(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    """Line numbers with raw lines, or item numbers with the items of a JSON list."""
    left = -1 if limit is None else limit
    number = found = 0
    try:
        with _opened(path) as stream:
            while line := stream.readline(left):
                number += 1
                if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    raw = line + stream.read(LIST_BYTES)
                    if stream.read(1):
                        raise UserError(
                            f"{path} is a JSON list of more than {LIST_BYTES >> 20} MiB, which has to be read whole;"
                            " write one object a line"
                        )
                    yield from _json_list(path, raw)
                    return
                if limit is not None:
                    left -= len(line)
                    if not left and found and not line.endswith(b"\n"):
                        return  # cut by the limit, not by the file
                if line.strip():
                    found += 1
                    yield f"line {number}", line
                if not left:
                    return
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if not found:
        raise UserError(f"{path} is empty; calibration needs rows of text")


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _json_list(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    try:
        items = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} starts like a JSON list but is not one ({error}); check it, or write one object a line"
        ) from error
    if not items:
        raise UserError(f"{path} is an empty list; calibration needs rows of text")
    return [(f"item {number}", item) for number, item in enumerate(items, start=1)]


def _json_object(path: Path, number: str, line: Any) -> dict[str, Any]:
    value = line
    if isinstance(line, bytes):
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, {number} is not valid JSON ({error}); every line must hold one object") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, {number} holds a {type(value).__name__}, not an object with named fields")
    return value


def check_json(path: Path) -> None:
    """Raise UserError when one of the first rows cannot be read or holds no document."""
    for count, (where, row) in enumerate(json_rows(path, None, ROW_BYTES)):
        if count == _CHECKED_ROWS:
            break
        if not has_document(row):
            raise unknown_columns(where, row)


def parquet_rows(path: Path, seed: int | None) -> Iterator[Row]:
    """The rows of a Parquet file, one row group in memory at a time.

    In random order by ``seed`` (of row groups, and of rows within each), in file order for None.
    """
    import pyarrow  # type: ignore[import-untyped]

    opened = _parquet(path)
    columns = [name for name in opened.schema_arrow.names if name in COLUMNS]
    groups = opened.num_row_groups
    try:
        for group in range(groups) if seed is None else permutation(groups, seed, "row groups"):
            table = opened.read_row_group(group, columns=columns)
            rows = range(table.num_rows)
            for index in rows if seed is None else permutation(len(rows), seed, "rows", group):
                yield f"{path}, row {index + 1} of group {group + 1}", table.slice(index, 1).to_pylist()[0]
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    if not has_document(opened.schema_arrow.names):
        raise unknown_columns(str(path), opened.schema_arrow.names)
    if not opened.metadata.num_rows:
        raise UserError(f"{path} is empty; calibration needs rows of text")
    return opened


def check_parquet(path: Path) -> None:
    """Raise UserError when ``path`` is no Parquet file, has no rows, or no column with text."""
    _parquet(path)
