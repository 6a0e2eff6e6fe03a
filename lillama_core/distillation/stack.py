"""One stack of blocks compressed from the bottom up: each block factored, corrected, trained and written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.distillation.adaptation import adapt
from lillama_core.distillation.correction import LastMap, correct
from lillama_core.distillation.finished_blocks import (
    FinishedBlocks,
    factored_layers,
    generator_of,
    narrowed,
)
from lillama_core.distillation.losses import MSE
from lillama_core.distillation.training import BlockData, RoutingReplay, TrainingOptions, distill_block
from lillama_core.initialization import Initializer, root
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.states import StateStore
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class BatchRoles:
    """What the batches that are followed through the blocks serve, by their positions in this process."""

    correct: list[int]
    """The correction is fitted on them."""
    choose: list[int]
    """Checkpoints and the size of the correction are chosen on them; empty where nothing is chosen."""
    report: list[int]
    """Losses are reported on them, and nothing else."""
    train: list[int | None]
    """The factors are trained on them, or fitted again; None for one of which only other processes have rows."""
    followed: list[int | None]
    """All that the processes of the job follow, likewise."""

    def shares(self, masks: Sequence[torch.Tensor | None], hidden: Sequence[torch.Tensor], world: World) -> list[float]:
        """Which part of the tokens of each batch that is here, of stream ``hidden``, this process has."""
        if world.size == 1:
            return [1.0] * len(hidden)
        tokens = [0.0] * len(self.followed)
        for i, place in enumerate(self.followed):
            if place is not None:
                mask = masks[place]
                tokens[i] = float(hidden[place][..., 0].numel() if mask is None else mask.sum().item())
        return [
            own / max(of_all, 1.0)
            for own, of_all, place in zip(tokens, world.sums(tokens), self.followed, strict=True)
            if place is not None
        ]


@dataclass(frozen=True)
class StackCompressor:
    """Compresses the blocks of stacks as a plan and training options say."""

    plan: RankPlan
    training: TrainingOptions
    corrects: bool
    """Whether the last map of a block makes up in closed form for what was lost below."""
    correction_ridge: float
    """Ridge of that regression, relative to the mean diagonal of the second moment of its inputs."""
    initializer: Initializer
    recorder: Recorder
    source: WeightSource
    store: DecompositionStore
    states: StateStore
    """Of the dense model: what enters each block, and so what the one before shall give."""
    finished: FinishedBlocks
    seed: int
    progress: Progress
    note: Callable[[dict[str, Any]], None]
    """Hears what is noted of each finished block."""
    world: World = ALONE

    def compress(
        self,
        harness: StackHarness,
        roles: BatchRoles,
        numbers: Sequence[int],
        student: StackActivations,
        routes: StackActivations | None = None,
    ) -> None:
        """Compress the blocks of one stack; the stream of ``student`` ends as what leaves it.

        ``student`` is what enters the stack in the model whose earlier stacks are compressed, for the batches whose
        dense states were kept under ``numbers``. ``routes`` has the dense model's recorded arguments, to run its blocks
        with where routing is replayed or an initialiser compares.
        """
        masks = [mask.own for mask in student.masks]
        shares = roles.shares(masks, student.hidden, self.world)
        self.progress.phase(f"Compressing {harness.stack}", len(harness.blocks))
        for block in harness.blocks:
            ranks, counts = self.plan.of(block), self.plan.channels_of(block)
            if not self.world.from_main(functools.partial(self.finished.has, block)):
                entering, leaving = (self.states.read(block.stack, block.index + i, numbers) for i in (0, 1))
                dense = self.source.block(block)
                routing = RoutingReplay(self.recorder.architecture.pinned)
                if routes is not None and routing.paths:
                    with torch.no_grad(), routing.noting(dense):
                        for index, hidden in enumerate(entering):
                            routes.runner(dense, block, index, hidden)
                before: Sequence[torch.Tensor] = entering if self.training.follows_teacher else ()
                data = BlockData(before, student.hidden, leaving, masks, roles.choose, roles.report)
                data = replace(data, train=roles.train, shares=shares, pinned=routing)
                self._compress_block(block, dense, ranks, counts, student, data, roles, routes, entering)
                # Only what the main process has written is the block.
                self.world.barrier()
            note = self.finished.note(block)
            self.note(note)
            student.advance(self.finished.read(block), block)
            release_memory()
            losses = f": loss {note['loss_before']:.4g} -> {note['loss_after']:.4g}" if ranks or counts else ""
            self.progress.step(f"{block.name}{losses}")

    def _compress_block(
        self,
        block: Block,
        dense: nn.Module,
        ranks: dict[str, int],
        counts: dict[str, int],
        activations: StackActivations,
        data: BlockData,
        roles: BatchRoles,
        routes: StackActivations | None,
        entering: Sequence[torch.Tensor],
    ) -> None:
        """Factor, adapt, correct, train, convert and write a block, made of ``dense``, which ``entering`` enters."""
        runner = activations.runner
        student = narrowed(block, dense, counts, self.store)
        # What comes from below is not what it was, even where this block stays as it is.
        name = self.store.last_map(block) if self.corrects and block.targets else None
        last = None if name is None else LastMap.of(*find_map(block, name), student)
        gradient_moment = self.store.metric(block) if ranks or counts or self.store.has(block) else None
        if ranks:
            factors = factored_layers(block, dense, student, ranks, counts, self.store, self.initializer, self.seed)
            # What the dense block reads is looked at beside.
            student = block.with_layers(student, factors)
        student.to(self.recorder.device)
        if ranks and self.initializer.adapts:
            # Of channels that are taken out the compressed model reads nothing to compare with.
            touched = {m.name for c in block.channels if c.name in counts for m in (*c.sources, c.sink)}
            batches = [batch for batch in roles.train if batch is not None]
            compared = routes if self.initializer.compares else None
            adapted = (set(ranks) - touched, self.initializer, activations, compared, entering, batches, data.pinned)
            adapt(block, dense, student, *adapted, self.world)
        training = self.training if ranks or counts else replace(self.training, steps=0)
        fisher_factor = None
        if training.loss.needs_sensitivity and gradient_moment is None:
            # Nothing is trained, and nothing else needed the backward pass: the loss is only reported, and named so.
            training = replace(training, loss=MSE())
        elif training.loss.needs_sensitivity and gradient_moment is not None:
            fisher_factor = loss_factor(gradient_moment, training.loss.fisher_damping).to(self.recorder.device)
        shrinkage = 0.0
        if last is not None:
            corrected = correct(
                last, block, student, runner, data, roles.correct, fisher_factor, self.correction_ridge, self.world
            )
            shrinkage, name = corrected.shrinkage, last.map.name
            if shrinkage > 0:
                if name in ranks:
                    seen, generator = self.store.gradients(block, name), generator_of(block, self.seed)
                    layer = corrected.factored(ranks[name], self.initializer, *seen, generator)
                else:
                    layer = last.target.rewritten(student, corrected.weight, corrected.bias)
                last.target.replace(student, {name: layer.to(self.recorder.device)})
        # The same weights to begin with, on whatever processors they were found.
        self.world.copy_([tensor for tensor in student.state_dict().values() if tensor.is_floating_point()])
        fewer = [m for c in block.channels if c.name in counts for m in (*c.sources, c.sink)]
        narrow = [block.target_of(m).path_of(m) for m in fewer]
        result = distill_block(student, block, runner, data, fisher_factor, training, self.world, narrow)
        note = {
            "name": block.path,
            "ranks": ranks,
            "channels": counts,
            "correction": shrinkage,
            "loss": training.loss.name,
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "error_before": result.error_before,
            "error_after": result.error_after,
            "steps": result.steps,
            "kept_step": result.kept_step,
        }
        if self.world.is_main:
            self.finished.write(block, student, ranks, note)


def loss_factor(gradient_moment: torch.Tensor, damping: float) -> torch.Tensor:
    """C [d, d] of C C^T = E[g g^T] / mean diagonal + ridge, for a loss that weighs output errors e as |e C|^2."""
    moment = gradient_moment / gradient_moment.diagonal().mean().clamp(min=1e-30)
    return root(moment, damping).float()


def find_map(block: Block, name: str) -> tuple[LinearTarget, TargetLinear]:
    """The target and the map of the linear layer of a block that has this name."""
    linear = (target for target in block.targets if isinstance(target, LinearTarget))
    return next((target, map_) for target in linear for map_ in target.maps if map_.name == name)
