"""What is found out by running the model on some calibration rows before ranks are shared out for good."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.data.split import CalibrationSplit
from lillama_core.distillation.finished_blocks import factored_layers, narrowed
from lillama_core.initialization import Initializer
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel, Statistics
from lillama_core.runtime.activations import ActivationStore
from lillama_core.statistics.influence import block_influences
from lillama_core.statistics.loss_calibration import Ablation, Ranks, Variant
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.files import read_json, write_json
from lillama_core.system.memory import release_memory

ROWS_PER_BATCH = 2
"""Rows of a batch of the passes with gradients: the graph of a block is held for one. Measurements take as many."""


class UntrainedBlocks:
    """Dense blocks with the untrained factors of some of their maps in them, at the ranks and channels of one plan.

    All variants of a block are asked for one after the other: what one block needs is kept until the next one comes.
    """

    def __init__(self, plan: RankPlan, store: DecompositionStore, initializer: Initializer, seed: int) -> None:
        self._plan, self._store, self._initializer, self._seed = plan, store, initializer, seed
        self._built: dict[tuple[str, frozenset[str]], tuple[nn.Module, dict[str, nn.Module]]] = {}

    def __call__(self, block: Block, module: nn.Module, part: Ranks) -> nn.Module:
        """The block with those of the plan's maps and channels that ``part`` names; ``module`` stays as it is."""
        counts = {name: count for name, count in self._plan.channels_of(block).items() if name in part}
        key, ranks = (block.name, frozenset(counts)), self._plan.of(block)
        if key not in self._built:
            if not any(name == block.name for name, _ in self._built):
                self._built.clear()
            narrow = narrowed(block, module, counts, self._store)
            layers = factored_layers(block, module, narrow, ranks, counts, self._store, self._initializer, self._seed)
            self._built[key] = narrow, layers
        narrow, layers = self._built[key]
        return block.with_layers(narrow, {name: layer for name, layer in layers.items() if name in part})


def measured_rows(context: Context) -> ActivationStore:
    """The first rows that are fitted to, as many as ``--rescaling-tokens`` says: those of this process."""
    split = context.get(CalibrationSplit)
    rows = split.rows_for(context.recipe.rescaling_tokens, context.given_tokens)
    fitted = ActivationStore(context.recorder, [split.batches[i] for i in split.here(split.fit)])
    small, _ = fitted.first_rows(len(context.world.numbers(rows)), ROWS_PER_BATCH, context.device)
    return small


class ModelMeasurements:
    """The `Measurements` of a run. Each is kept in its directory: a resumed run comes to the same ranks by them.

    Every process of a job has to ask as often, in the same order; the plan that is measured is the main one's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._path = context.directory.store / "measured.json"

    def divergence(self, plan: RankPlan) -> float:
        """Twice the divergence of the model under ``plan``, see `Measurements`."""
        # A search may come to other plans where the last bits of its own numbers differ.
        text = self._context.world.from_main(
            lambda: json.dumps([plan.format, sorted(plan.ranks.items()), sorted(plan.channels.items())])
        )
        format_, ranks, channels = json.loads(text)
        plan = RankPlan(format_, dict(ranks), dict(channels))
        key = f"divergence {hashlib.sha256(text.encode()).hexdigest()}"
        found: float = self._kept(key, lambda: self._divergence(plan))
        return found

    def influences(self) -> dict[tuple[str, int], float]:
        """How much each block changes its stream, see `Measurements`."""
        found: list[tuple[str, int, float]] = self._kept("influences", self._influences)
        return {(stack, index): value for stack, index, value in found}

    def _kept(self, key: str, measure: Callable[[], Any]) -> Any:
        world = self._context.world
        known = world.from_main(lambda: read_json(self._path) if self._path.is_file() else {})
        if key not in known:
            value = measure()
            known[key] = world.from_main(lambda: value)
            if world.is_main:
                write_json(self._path, known)
            release_memory()
        return known[key]

    def _divergence(self, plan: RankPlan) -> float:
        context = self._context
        dense, store = context.get(DenseModel), context.get(Statistics).store
        compressed = UntrainedBlocks(plan, store, context.initializer, context.recipe.seed)
        total = 0.0
        for chain in context.get(CalibrationRows).chains:
            blocks = [block for h in chain if h.stack in dense.chosen for block in h.blocks]
            ranks = {b.name: r for b in blocks if (r := {**plan.of(b), **plan.channels_of(b)})}
            context.progress.phase("Measuring a plan", sum(len(h.blocks) for h in chain))
            ablation = Ablation(
                chain, dense.source, measured_rows(context), compressed, context.progress, context.world
            )
            total += ablation.costs([Variant("plan", ranks)])[0]
        return total

    def _influences(self) -> list[tuple[str, int, float]]:
        context, found = self._context, dict[tuple[str, int], float]()
        source = context.get(DenseModel).source
        for chain in context.get(CalibrationRows).chains:
            context.progress.phase("Measuring what each block changes", sum(len(h.blocks) for h in chain))
            found |= block_influences(chain, source, measured_rows(context), context.progress, context.world)
        return [(stack, index, value) for (stack, index), value in found.items()]
