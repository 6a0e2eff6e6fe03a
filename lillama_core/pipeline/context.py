"""What the stages of one compression share, and the results that they hand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lillama_core.data.modality import Samples
from lillama_core.distillation.finished_blocks import FinishedBlocks
from lillama_core.errors import LillamaError
from lillama_core.output.checkpoint import CompressedCheckpoint
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.states import StateStore
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.processes import ALONE, World

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.architecture.blocks import Block
    from lillama_core.data.modality import Modality
    from lillama_core.distillation.losses import Loss
    from lillama_core.initialization import Initializer
    from lillama_core.output.record import RunRecord
    from lillama_core.output.run_directory import RunDirectory
    from lillama_core.pipeline.request import Request
    from lillama_core.pipeline.spec import CompressionSpec
    from lillama_core.pipeline.stage import Stage
    from lillama_core.recipe.model import Recipe
    from lillama_core.runtime.recording import Recorder
    from lillama_core.system.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class DenseModel:
    """The model to compress, loaded, and the harness around each of its stacks."""

    model: nn.Module
    dtype: torch.dtype
    """Of the weights that will be written."""
    source: WeightSource
    stacks: tuple[StackHarness, ...]
    """All stacks, in the order of the forward pass."""
    chosen: dict[str, StackHarness]
    """Those of which maps are compressed."""


@dataclass(frozen=True)
class CalibrationRows:
    """The calibration data, and how it goes through the stacks."""

    data: Samples
    chains: tuple[tuple[StackHarness, ...], ...]
    """Stacks that are run one after the other, each on what the one before gave. One chain of all stacks where stacks
    hand on what their last blocks give and nothing else; else a chain for each stack of which maps are compressed."""


@dataclass(frozen=True)
class Statistics:
    """What the passes over the dense model found."""

    store: DecompositionStore
    states: StateStore
    """Of the dense model, of the batches that later stages need."""


@dataclass(frozen=True)
class CompressedStacks:
    """What leaves the last stack for the rows of the report, and the dense modules that were swapped for good."""

    harness: StackHarness
    """Of the last stack."""
    outputs: list[tuple[Samples, torch.Tensor, torch.Tensor]]
    """For each batch that reports: the batch, the dense output and the compressed one."""
    dense_embeddings: dict[str, nn.Module]
    """By path; empty when the embedding stays as it is."""


@dataclass(frozen=True)
class CompressedModel:
    """What the result is put together from, besides what is around the blocks."""

    checkpoint: CompressedCheckpoint
    finished: FinishedBlocks
    blocks: tuple[Block, ...]
    """All blocks of the model, in forward order; each has been written."""


@dataclass
class Context:
    """The services of one compression, fixed before the first stage, and the results of its stages, by type."""

    request: Request
    recipe: Recipe
    spec: CompressionSpec
    architecture: Architecture
    modality: Modality
    processor: Any
    device: torch.device
    streams: bool
    """Whether blocks are read from disk when they are needed, instead of being held in memory."""
    autocast: torch.dtype | None
    recorder: Recorder
    initializer: Initializer
    loss: Loss
    directory: RunDirectory
    record: RunRecord
    progress: Progress
    world: World = ALONE
    """The processes of this job, each of which runs all stages on its own rows."""
    _results: dict[type, Any] = field(default_factory=dict)
    _running: Stage | None = None

    def enter(self, stage: Stage) -> None:
        """Begin ``stage``: it may take what it declares, and nothing else."""
        self._running = stage

    def leave(self) -> None:
        """End the last stage: whoever ran the stages may take all that they gave."""
        self._running = None

    def get(self, of: type[T]) -> T:
        """The result of this type; raises LillamaError when the running stage does not say that it reads it."""
        if self._running is not None and of not in self._running.reads:
            raise LillamaError(
                f"stage {self._running.name!r} takes {of.__name__}, which it does not declare in 'reads'"
            )
        found = self._results[of]
        assert isinstance(found, of)
        return found

    def put(self, result: Any) -> None:
        """Hand ``result`` on; raises LillamaError when the running stage does not say that it gives it."""
        if self._running is not None and type(result) not in self._running.gives:
            kind = type(result).__name__
            raise LillamaError(f"stage {self._running.name!r} puts {kind}, which it does not declare in 'gives'")
        self._results[type(result)] = result

    def drop(self, of: type) -> None:
        """Forget a result that no later stage reads, and with it its memory."""
        self._results.pop(of, None)

    @property
    def corrects(self) -> bool:
        """Whether the last map of a block makes up in closed form for what was lost below."""
        return self.recipe.correction_tokens > 0 and self.initializer.corrects

    @property
    def chooses(self) -> bool:
        """Whether something is chosen by rows that serve nothing else."""
        return self.recipe.steps > 0 or self.corrects or self.recipe.healing_epochs > 0

    @property
    def follows_fit(self) -> bool:
        """Whether all rows that are fitted to go through the blocks as these are compressed."""
        return self.recipe.steps > 0 or self.initializer.adapts

    @property
    def state_dtype(self) -> torch.dtype:
        """In which hidden states are kept: that of matrix products, which read little else."""
        return self.autocast or torch.float32

    @property
    def given_tokens(self) -> int:
        """Tokens of the calibration data; it may be fewer than the recipe asks for."""
        return min(self.recipe.tokens, self.record.data["tokens"] or self.recipe.tokens)

    def fingerprint(self, data: Samples | None) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with; ``data`` None: not known yet."""
        return {
            "model": self.record.model_fingerprint,
            "architecture": self.architecture.name,
            **({} if data is None else {"data": data.sha256}),
            # The name of a recipe changes nothing.
            "recipe": {k: v for k, v in self.recipe.to_dict().items() if k != "name"},
            "versions": self.record.versions,
            "compute": self.record.compute,
            "device": self.device.type,
            # Sums are rounded otherwise, and each process keeps what is its own in files of its own.
            "processes": self.world.size,
        }
