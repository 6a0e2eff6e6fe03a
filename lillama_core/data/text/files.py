"""Reading text, JSON lines and Parquet from disk, without reading more than is needed."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from lillama_core.data.documents import COLUMNS, has_document, unknown_columns
from lillama_core.data.sources import Row
from lillama_core.errors import UserError
from lillama_core.system.seeds import permutation

TEXT_BYTES = 16 << 20
"""Of a larger text file only the beginning is read."""
LIST_BYTES = 256 << 20
"""Of the largest JSON list that is read; lines can be read one by one, a list cannot."""
ROW_BYTES = 256 << 20
"""Of a larger file of JSON lines only the beginning is read."""
LINE_BYTES = 16 << 20
"""Of the longest row: one that is longer is refused. War and Peace has 3 MiB."""
MOST_ROWS = 4_000_000
"""Of more JSON lines or items only the first are read: each takes more memory than its characters."""
MOST_BYTES = 1 << 30
"""Of all that is read of a file of which everything is asked for; a larger one is refused."""
GROUP_BYTES = 1 << 30
"""Of the largest row group of a Parquet file, unpacked."""
BOM = b"\xef\xbb\xbf"
_PEEK_BYTES = 1 << 16
_CHECKED_ROWS = 1000


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0] if str(error) else repr(error)
    return UserError(f"{path} cannot be read: {reason}")


def too_large(path: Path) -> UserError:
    """The error for a file of which everything is asked for."""
    return UserError(
        f"{path} has more than {MOST_BYTES >> 20} MiB of text; ask for a part of it, or give a smaller file"
    )


def read_text(path: Path, limit: int | None) -> tuple[str, bool]:
    """The text of a UTF-8 file, and whether this is all of it.

    ``limit`` is the number of bytes to read at most (None: no limit). A byte order mark is dropped and line
    ends become ``\\n``. Raises UserError when the file is empty or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if limit is None and size > MOST_BYTES:
            raise too_large(path)
        with path.open("rb") as stream:
            # Python sets aside as much as it is asked to read.
            raw = stream.read(size if limit is None else min(limit, size))
            complete = not stream.read(1)
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
    lines to consider at most. Raises UserError naming the line when a line is not a JSON object or too long.
    """
    # Bytes alone are kept, not what they stand for, which takes many times the memory.
    items: Iterable[tuple[int, bytes]] = _json_lines(path, limit)
    what = "line"
    if _is_list(path):
        items, what = _json_items(path), "item"
    if seed is not None:
        kept = list(items)
        items = (kept[index] for index in permutation(len(kept), seed, "rows"))
    for number, raw in items:
        yield f"{path}, {what} {number}", _json_object(path, f"{what} {number}", raw)


def _is_list(path: Path) -> bool:
    """Whether the first line of a file begins like a JSON list."""
    with _reading(path) as stream:
        return stream.readline(_PEEK_BYTES).removeprefix(BOM).lstrip().startswith(b"[")


def _json_lines(path: Path, limit: int | None) -> Iterator[tuple[int, bytes]]:
    """Numbers of lines with what stands there, the empty ones left out."""
    left = MOST_BYTES if limit is None else limit
    number = found = 0
    with _reading(path) as stream:
        while line := stream.readline(min(left, LINE_BYTES)):
            number += 1
            left -= len(line)
            if not line.endswith(b"\n"):
                if not left and limit is None and stream.read(1):
                    raise too_large(path)
                if not left and found and limit is not None:
                    return  # cut by the limit, not by the file
                if len(line) == LINE_BYTES and stream.read(1):
                    raise UserError(
                        f"{path}, line {number} is longer than {LINE_BYTES >> 20} MiB; write one document a line"
                    )
            if line.strip():
                found += 1
                yield number, line
            if found == MOST_ROWS or (not left and limit is not None):
                return
            if not left and stream.read(1):
                raise too_large(path)
    if not found:
        raise UserError(f"{path} is empty; calibration needs rows of text")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked if it is gzipped; what cannot be read is a UserError."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _json_items(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers of the items of a JSON list with how each is written."""
    with _reading(path) as stream:
        raw = stream.read(LIST_BYTES)
        if stream.read(1):
            raise UserError(
                f"{path} is a JSON list of more than {LIST_BYTES >> 20} MiB, which has to be read whole;"
                " write one object a line"
            )
    try:
        text = raw.decode("utf-8-sig")
        del raw
        decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
        at, number = space.match(text, text.index("[") + 1).end(), 0  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            raise UserError(f"{path} is an empty list; calibration needs rows of text")
        while number < MOST_ROWS:
            # Parsed twice, now and when it is used: kept as it is written it takes the least memory.
            _, end = decoder.raw_decode(text, at)
            number += 1
            yield number, text[at:end].encode()
            end = space.match(text, end).end()  # type: ignore[union-attr]
            if text[end : end + 1] == "]":
                if text[end + 1 :].strip():
                    raise ValueError("there is more behind its end")
                return
            if text[end : end + 1] != ",":
                raise ValueError(f"a comma or its end is missing behind item {number}")
            at = space.match(text, end + 1).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} starts like a JSON list but is not one ({error}); check it, or write one object a line"
        ) from error


def _json_object(path: Path, number: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
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
            size = sum(_column_bytes(opened, group, columns))
            if size > GROUP_BYTES or opened.metadata.row_group(group).num_rows > MOST_ROWS:
                raise UserError(
                    f"{path}, group {group + 1} of rows has more than {GROUP_BYTES >> 20} MiB or {MOST_ROWS:,} rows;"
                    " write it in smaller groups"
                )
            table = opened.read_row_group(group, columns=columns)
            rows = range(table.num_rows)
            for index in rows if seed is None else permutation(len(rows), seed, "rows", group):
                where = f"{path}, row {index + 1} of group {group + 1}"
                try:
                    row = table.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    raise UserError(f"{where} is not UTF-8 text; write the file anew from sound text") from None
                yield where, row
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _column_bytes(opened: Any, group: int, columns: list[str]) -> Iterator[int]:
    """How much each of the ``columns`` takes of a row group, unpacked."""
    found = opened.metadata.row_group(group)
    for index in range(found.num_columns):
        column = found.column(index)
        if column.path_in_schema.partition(".")[0] in columns:
            yield column.total_uncompressed_size


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
