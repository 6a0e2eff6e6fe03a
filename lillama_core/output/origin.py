"""Where a result comes from, as far as its card tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.models.source import ModelSource


class Origin(Protocol):
    """The model that a result was made of."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def config(self) -> Any: ...

    @property
    def architecture(self) -> Architecture: ...
