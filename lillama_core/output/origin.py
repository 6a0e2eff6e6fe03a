"""Where a result comes from, as far as its card tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lillama_core.models.source import ModelSource

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture


class Origin(Protocol):
    """The model that a result was made of."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def config(self) -> Any: ...

    @property
    def architecture(self) -> Architecture: ...


@dataclass(frozen=True)
class Described:
    """What the card says of where a model comes from that is at hand by name alone."""

    source: ModelSource
    config: Any
    architecture: Architecture

    @classmethod
    def by_name(cls, model: str, config: Any, architecture: Architecture, trust_remote_code: bool = False) -> Described:
        """Of a ``model`` as a record names it; ``trust_remote_code``: whether it is loaded with the code it brings."""
        gguf = model if model.lower().endswith(".gguf") else None
        return cls(ModelSource(model, model, gguf, trust_remote_code), config, architecture)
