"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations


class LillamaError(Exception):
    """Something failed after work had begun; the message is one line that says what, and what to do.

    The command line prints the message and ends with exit status 1.
    """

    exit_status = 1


class UserError(LillamaError):
    """The request cannot be carried out as it stands: a wrong path, value or combination.

    Raised before any work is done or any file is touched; exit status 2.
    """

    exit_status = 2


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """A suggestion such as ``; did you mean 'fast'?`` for a misspelt ``word``, or an empty string."""
    import difflib

    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
