"""What an export format has to answer."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from lillama_core.strategies import Strategy
from lillama_core.system.progress import Progress

if TYPE_CHECKING:
    from lillama_core.exporting.model import CompressedModel


@dataclass(frozen=True)
class ExportJob:
    """Where an export goes to."""

    folder: Path
    """The directory to fill: empty, with another name until all is done."""
    scratch: Path
    """An empty directory for what is needed on the way; it is removed."""
    dtype: torch.dtype | None
    """What the user wants the weights to be; None: what suits the format, the model's own where it can."""
    progress: Progress


@dataclass(frozen=True)
class Agreement:
    """How well a fresh process found the result to agree with the compressed model."""

    what: str
    """What was compared: ``logits``."""
    difference: float
    """||y - y0|| / ||y0||, or another number that is 0 for equality."""
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the difference is a number that is small enough."""
        return self.difference <= self.allowed


class Exporter(Strategy, ABC):
    """A format that ``lillama export --to NAME`` writes.

    The result must run without lillama, and `verify` finds out, in a process that cannot import it, whether it does.
    """

    name: str
    needs: ClassVar[Mapping[str, str]] = {}
    """Modules that are imported when the format is written or checked -> how to install them (``pip install …``)."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """The dtypes of weights that it can write."""

    def missing(self) -> str | None:
        """Return which module is missing and how to install it, in words; None when all is there."""
        for module, how in self.needs.items():
            if importlib.util.find_spec(module) is None:
                return f"{module}: {how}"
        return None

    def cannot_hold(self, model: CompressedModel) -> str | None:
        """Return why the format cannot hold ``model``, as part of a sentence; None when it can. Reads no weights."""
        return None

    @abstractmethod
    def write(self, model: CompressedModel, job: ExportJob) -> None:
        """Write everything into ``job.folder`` that the result needs, but for README.md and lillama.json."""

    @abstractmethod
    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        """Load the result in a fresh process, see `lillama_core.exporting.fresh`, and compare it with ``model``."""

    @abstractmethod
    def usage(self, model: CompressedModel) -> str:
        """Return a few lines of Markdown for the card: what the directory holds, and code that runs it."""
