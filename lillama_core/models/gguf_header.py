"""The header of a GGUF file, parsed once: the library's reader takes seconds for the vocabulary in it.

transformers asks it for the config, the tokenizer and the weights in turn, and for a map of names in each submodule.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _LastReader:
    """Makes readers of GGUF files, and keeps the last one for whoever asks for the same file next."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: tuple[object, Any] | None = None

    def __call__(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            # For writing, perhaps.
            return self._make(path, *args, **kwargs)
        stat = Path(path).stat()
        wanted = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        kept = self._kept
        if kept is None or kept[0] != wanted:
            kept = self._kept = (wanted, self._make(path))
        return kept[1]

    def forget(self) -> None:
        """Let go of the reader, which needs tens of megabytes."""
        self._kept = None


_lock = threading.RLock()
_active: list[_LastReader] = []


@contextmanager
def parsed_once(*models: str) -> Iterator[None]:
    """Whoever asks for the reader of one GGUF file several times inside is given the same, in any thread.

    Nothing changes where none of the ``models`` is such a file.
    """
    if not any(model.lower().endswith(".gguf") for model in models):
        yield
        return
    import gguf

    with _lock:
        entered = not _active
        if entered:
            library: Any = gguf
            reader, names = library.GGUFReader, library.get_tensor_name_map
            _active.append(_LastReader(reader))
            library.GGUFReader, library.get_tensor_name_map = _active[0], functools.cache(names)
    try:
        yield
    finally:
        if entered:
            with _lock:
                _active.clear()
                library.GGUFReader, library.get_tensor_name_map = reader, names


def forget_header() -> None:
    """Let go of what `parsed_once` keeps, when the last that reads it is through."""
    for reader in list(_active):
        reader.forget()
