"""Remarks of libraries, kept off stderr: what matters to the user is said by lillama."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No log lines and no warnings while open; imports nothing."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), silence_transformers() if "transformers" in sys.modules else _nothing():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """No progress bars and remarks of transformers, which it may import, unless ``--debug`` lets libraries speak."""
    if logging.root.manager.disable < logging.ERROR:
        yield
        return
    import transformers

    logging_of = transformers.utils.logging
    verbosity, bars = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(verbosity)
        if bars:
            logging_of.enable_progress_bar()


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield
