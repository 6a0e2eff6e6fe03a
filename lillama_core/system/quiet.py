"""Keep what libraries log away from the user, who is told what matters by lillama itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """While open, let the loggers of ``libraries`` (by default transformers) pass errors only.

    The progress bars of transformers are off meanwhile if it is among them. Afterwards all is as it was before.
    """
    names = libraries or ("transformers",)
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        if "transformers" in names:
            stack.enter_context(_no_bars())
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(logging.ERROR)
            stack.callback(logger.setLevel, level)
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()
