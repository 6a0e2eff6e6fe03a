"""What to compress, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama_core.architecture.base import Architecture
from lillama_core.recipe.model import Recipe


@dataclass(frozen=True)
class Request:
    """What to compress and where to; how is the recipe's business."""

    model: str
    """A hub id, a directory, or a ``.gguf`` file."""
    output: Path
    recipe: Recipe
    architecture: str | Architecture | None = None
    """By name, or one that no plugin brings; None: the one that claims the model's type."""
    tokenizer: str | None = None
    data: Any = None
    """Calibration data as objects, see `lillama_core.data.objects.given_data`; None: what the recipe names."""
    device: str = "auto"
    stream: bool | None = None
    """Read the model's blocks from disk one at a time instead of holding all in memory; None: where they do not fit."""
    max_memory: int | None = None
    """Bytes of the host's memory that the run may take; None: what is available."""
    trust_remote_code: bool = False
    evaluate: bool = False
    """Whether the dense model and the result are measured at the end, for the record and the card."""
    track: str | None = None
    """The tracker, by the name that accelerate has for it, which gets the numbers of the run as it goes."""
    overwrite: bool = False
    resume: bool = False
