"""One stack of blocks compressed from the bottom up: each block factored, corrected, trained and written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.distillation.correction import LastMap, correct, find_last_map, gradients_of
from lillama_core.distillation.finished_blocks import FinishedBlocks
from lillama_core.distillation.losses import MSE
from lillama_core.distillation.training import BlockData, RoutingReplay, TrainingOptions, distill_block
from lillama_core.initialization import Initializer, root
from lillama_core.runtime.activations import ActivationStore, StackActivations
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.memory import release_memory
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class BatchRoles:
    """What the batches that are followed through the blocks serve, by their positions."""

    correct: list[int]
    """The correction is fitted on them."""
    choose: list[int]
    """Checkpoints and the size of the correction are chosen on them; empty where nothing is chosen."""
    report: list[int]
    """Losses are reported on them, and nothing else."""


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
    finished: FinishedBlocks
    progress: Progress
    note: Callable[[dict[str, Any]], None]
    """Hears what is noted of each finished block."""

    def compress(
        self, harness: StackHarness, roles: BatchRoles, teacher: StackActivations, student: StackActivations
    ) -> None:
        """Compress the blocks of one stack; the streams of ``teacher`` and ``student`` end as what leaves it.

        ``teacher`` is what enters the stack in the dense model, ``student`` in the one whose earlier stacks are
        compressed.
        """
        last_maps = self._last_maps(harness, teacher)
        masks = [mask.own for mask in teacher.masks]
        self.progress.phase("Compressing blocks", len(harness.blocks))
        for block in harness.blocks:
            ranks = self.plan.of(block)
            dense = self.source.block(block)
            before = list(teacher.hidden) if self.training.follows_teacher else []
            routing = RoutingReplay(self.recorder.architecture.pinned)
            with routing.noting(dense):
                teacher.advance(dense, block)
            if not self.finished.has(block):
                data = BlockData(before, student.hidden, teacher.hidden, masks, roles.choose, roles.report, routing)
                last_map = last_maps.get(block.name)
                self._compress_block(block, dense, ranks, student.runner, data, last_map, roles.correct)
            note = self.finished.note(block)
            self.note(note)
            student.advance(self.finished.read(block, self.source.block(block), ranks), block)
            release_memory()
            self.progress.step(
                f"{block.name}: loss {note['loss_before']:.4g} -> {note['loss_after']:.4g}" if ranks else block.name
            )

    def _last_maps(
        self, harness: StackHarness, teacher: StackActivations
    ) -> dict[str, tuple[TargetModule, TargetLinear]]:
        """The maps through which blocks can make up for what those below them have lost, by block."""
        if not self.corrects:
            return {}
        # How a block ends does not depend on what enters it: two rows will do.
        few = ActivationStore(self.recorder, [teacher.batches[0].part(0, 2)]).record(harness)
        found = {}
        for block in harness.blocks:
            module = self.source.block(block)
            last = find_last_map(block, module, functools.partial(few.runner, module, block, 0, few.hidden[0]))
            if last is not None and last[1].name in self.plan.of(block):
                found[block.name] = last
        return found

    def _compress_block(
        self,
        block: Block,
        dense: nn.Module,
        ranks: dict[str, int],
        runner: BlockRunner,
        data: BlockData,
        last_map: tuple[TargetModule, TargetLinear] | None,
        correct_on: list[int],
    ) -> None:
        """Factor, correct, train, convert and write a block, made of ``dense``."""
        decompositions, gradient_moment = self.store.load(block)
        last = None if last_map is None else LastMap.of(*last_map, dense)
        student = dense
        self.finished.factor(block, student, ranks, decompositions)
        student.to(self.recorder.device)
        training = self.training if ranks else replace(self.training, steps=0)
        fisher_factor = None
        if training.loss.needs_sensitivity and gradient_moment is None:
            # Nothing is trained, and nothing else needed the backward pass: the loss is only reported, and named so.
            training = replace(training, loss=MSE())
        elif training.loss.needs_sensitivity and gradient_moment is not None:
            fisher_factor = loss_factor(gradient_moment, training.loss.fisher_damping).to(self.recorder.device)
        shrinkage = 0.0
        if last is not None:
            corrected = correct(last, block, student, runner, data, correct_on, fisher_factor, self.correction_ridge)
            shrinkage, name = corrected.shrinkage, last.map.name
            if shrinkage > 0:
                seen, generator = self.store.gradients(block), self.finished.generator(block)
                layer = corrected.factored(ranks[name], self.initializer, *gradients_of(seen, name), generator)
                last.target.replace(student, {name: layer.to(self.recorder.device)})
        result = distill_block(student, block, runner, data, fisher_factor, training)
        note = {
            "name": block.path,
            "ranks": ranks,
            "correction": shrinkage,
            "loss": training.loss.name,
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "error_before": result.error_before,
            "error_after": result.error_after,
            "steps": result.steps,
            "kept_step": result.kept_step,
        }
        self.finished.write(block, student, ranks, note)


def loss_factor(gradient_moment: torch.Tensor, damping: float) -> torch.Tensor:
    """C [d, d] of C C^T = E[g g^T] / mean diagonal + ridge, for a loss that weighs output errors e as |e C|^2."""
    moment = gradient_moment / gradient_moment.diagonal().mean().clamp(min=1e-30)
    return root(moment, damping).float()
