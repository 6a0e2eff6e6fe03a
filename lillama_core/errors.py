"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

LONGEST = 2000
"""Characters of an error's message; of a longer one the middle is left out."""


class LillamaError(Exception):
    """Something failed after work had begun; the message is one line that says what, and what to do.

    The command line prints the message and ends with exit status 1.
    """

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        # It may name what stands in a file from outside, however long that is.
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - 500]} … {message[-400:]}")


class UserError(LillamaError):
    """The request cannot be carried out as it stands: a wrong path, value or combination.

    Raised before any work is done or any file is touched; exit status 2.
    """

    exit_status = 2


OUT_OF_MEMORY = "out of memory; lower --batch-size, --sequence-length or --tokens, or free some memory"


def nearest(word: str, known: list[str] | tuple[str, ...], cutoff: float = 0.5) -> str:
    """A suggestion such as ``; did you mean 'fast'?`` for a misspelt ``word``, or an empty string.

    ``cutoff`` is how alike they must be, 1 being equal.
    """
    import difflib

    match = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {match[0]!r}?" if match else ""


def one_line(text: object, most: int | None = 300) -> str:
    """Return ``text``, or an error's message, as one line of at most ``most`` characters (None: however many).

    White space and control characters become single spaces. An error without a message gives the name of its class.
    """
    line = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(text)).strip()
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, the operating system, torch's allocators and C++ each say so their own way."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch says "can't allocate memory" on the CPU and "out of memory" on CUDA; libraries in C++ and Rust pass on
    # their own words and the system's.
    said = str(error).lower()
    return any(
        words in said
        for words in (
            "out of memory",
            "allocate memory",
            "bad_alloc",
            "bad allocation",
            "memory allocation",
            "os error 12",
            "alloc_failed",  # cuBLAS
        )
    )


@contextlib.contextmanager
def in_one_line(advice: str) -> Iterator[None]:
    """Turn what memory, disks and libraries raise into a LillamaError of one line that ends with ``advice``."""
    from safetensors import SafetensorError

    try:
        yield
    except LillamaError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise LillamaError(f"{OUT_OF_MEMORY}; {advice}") from error
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            raise LillamaError(f"cannot read or write: {error.strerror or one_line(error)}{where}; {advice}") from error
        if isinstance(error, SafetensorError):
            # It has no errno: the message holds the system's words.
            raise LillamaError(f"cannot read or write weights: {one_line(error)}; {advice}") from error
        raise
