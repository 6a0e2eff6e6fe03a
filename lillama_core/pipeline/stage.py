"""What a stage of the pipeline is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from lillama_core.strategies import Strategy

if TYPE_CHECKING:
    from lillama_core.pipeline.context import Context


class Stage(Strategy, ABC):
    """One step of a compression.

    A stage takes the results of earlier stages from the context and puts its own there; both are declared by their
    types, and the pipeline checks before it starts that every result is given before it is read. A stage that is
    killed finds what it had finished in the run directory and goes on from there.

    A plugin adds a stage by the hook ``lillama_stages``; ``after`` names the stage that it follows. Options of a stage
    are written in a recipe as ``stages: {blocks: {correction_ridge: 0.05}}``.
    """

    name: str
    """Short and stable: key of the stage's seconds in the record."""
    reads: ClassVar[tuple[type, ...]] = ()
    """Types of the results that the stage takes."""
    gives: ClassVar[tuple[type, ...]] = ()
    """Types of the results that the stage puts into the context."""
    after: ClassVar[str | None] = None
    """Name of the stage behind which a plugin's stage runs; None for those of lillama, which have an order."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """Do the work. Raise UserError before anything durable is written, LillamaError afterwards."""

    def found(self, context: Context) -> str | None:
        """Say in a line what an interrupted run left of this stage; None: nothing, or the stage leaves nothing."""
        return None
