"""``--track``: numbers of a run as it goes, for TensorBoard, Weights & Biases and whatever else accelerate knows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from lillama_core.errors import UserError, nearest, one_line

FOLDER = "runs"
"""Where trackers that write files put them, below the working directory; TensorBoard looks there by default."""


def check_tracker(name: str) -> None:
    """Raise UserError unless numbers can be sent to the tracker of this name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name not in known:
        raise UserError(f"--track {name!r} is none of: {', '.join(known)}{nearest(name, known)}")
    if name not in map(str, get_available_trackers()):
        raise UserError(f"--track {name}: it is not installed; run 'pip install {name.replace('_', '-')}'")


class Tracker:
    """One run of a tracker. What cannot be sent is not worth ending hours of work for: that is said once, no more."""

    def __init__(self, name: str, run: str, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Begin the run ``run``, made by ``settings``; raises UserError where the tracker refuses."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        self._name, self._say = name, say
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        try:
            self._tracker: Any = kind(run, logging_dir=FOLDER) if kind.requires_logging_directory else kind(run)
            if hasattr(self._tracker, "start"):
                self._tracker.start()
            self._tracker.store_init_configuration(plain)
        # Of any library, in its own words: no account, no server.
        except Exception as error:
            raise UserError(f"--track {name}: {one_line(error)}") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(dict(values), step=step)
        except Exception as error:
            self._say(f"Nothing is sent to {self._name} any more: {one_line(error)}")
            self._tracker = None

    def finish(self) -> None:
        """End the run."""
        if self._tracker is not None:
            with contextlib.suppress(Exception):
                self._tracker.finish()
