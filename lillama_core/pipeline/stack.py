"""One stack of blocks compressed from the bottom up: each block factored, corrected, trained and written."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.data.modality import Samples
from lillama_core.distillation.correction import LastMap, correct, find_last_map, gradients_of
from lillama_core.distillation.losses import MSE, Loss
from lillama_core.distillation.training import BlockData, RoutingReplay, TrainingOptions, distill_block
from lillama_core.initialization import Initializer, root
from lillama_core.output.record import RunRecord
from lillama_core.pipeline.finished_blocks import FinishedBlocks
from lillama_core.recipe.model import Recipe
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import RecordedInputs, Recorder
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.memory import release_memory
from lillama_core.system.progress import Progress

StackOutputs = tuple[list[torch.Tensor], list[torch.Tensor]]
"""What the last block of a stack gives for each batch, dense and compressed."""


@dataclass(frozen=True)
class CalibrationSplit:
    """The batches that are followed through the compressed blocks."""

    batches: list[Samples]
    correction_batches: int
    """How many of them, from the first, serve the correction."""
    held_out: list[int]
    """Those that are never trained on."""

    @classmethod
    def of(cls, batches: list[Samples], held_out: int, correction: float, trains: bool) -> CalibrationSplit:
        """Of ``batches`` the last ``held_out`` serve the report, the first ones the correction, all of them training.

        ``correction`` is the share of the others that the correction asks for.
        """
        training = len(batches) - held_out
        correction_batches = math.ceil(training * min(1.0, correction))
        kept = [*batches[: training if trains else correction_batches], *batches[training:]]
        return cls(kept, correction_batches, list(range(len(kept) - held_out, len(kept))))


@dataclass(frozen=True)
class StackCompressor:
    """Compresses the blocks of stacks, as a plan and a recipe say; what it notes of each goes into ``record``."""

    recipe: Recipe
    loss: Loss
    initializer: Initializer
    recorder: Recorder
    source: ResidentSource
    plan: RankPlan
    store: DecompositionStore
    finished: FinishedBlocks
    record: RunRecord
    progress: Progress

    def follow(self, batches: list[Samples], held_out: int) -> CalibrationSplit:
        """Those of ``batches`` that the blocks are run on; the last ``held_out`` serve the report alone."""
        corrected = self.recipe.correction_tokens if self.initializer.corrects else 0
        given = min(self.recipe.tokens, self.record.data["tokens"] or self.recipe.tokens)
        return CalibrationSplit.of(batches, held_out, corrected / given, self.recipe.steps > 0)

    def compress(
        self,
        parent: StackHarness,
        followed: CalibrationSplit,
        dense_recorded: RecordedInputs,
        student_recorded: RecordedInputs,
    ) -> StackOutputs:
        """Compress the blocks of one stack; what comes out of it, dense and compressed.

        ``dense_recorded`` and ``student_recorded`` are what enters the stack's blocks in the dense model, and in the
        one whose earlier stacks are compressed; their streams are used up.
        """
        recipe = self.recipe
        training = TrainingOptions(
            loss=self.loss,
            mode=recipe.mode,
            train=recipe.train,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            schedule=recipe.schedule,
            warmup=recipe.warmup,
            weight_decay=recipe.weight_decay,
            gradient_clip=recipe.gradient_clip,
            seed=recipe.seed,
        )
        last_maps = self._last_maps(parent, followed.batches[0])
        teacher_runner, teacher = self.recorder.runner(dense_recorded[0]), dense_recorded[1]
        student_runner, student = self.recorder.runner(student_recorded[0]), student_recorded[1]
        masks = [batch.masks.get(parent.stack) for batch in followed.batches]
        self.progress.phase("Compressing blocks", len(parent.blocks))
        for block in parent.blocks:
            ranks = self.plan.of(block)
            dense = self.source.block(block)
            before = list(teacher) if recipe.mode != "student" and recipe.steps > 0 else []
            pinned = RoutingReplay(self.recorder.architecture.pinned)
            with pinned.noting(dense):
                teacher_runner.advance(dense, block, teacher)
            if not self.finished.has(block):
                self._compress_block(
                    block,
                    dense,
                    ranks,
                    student_runner,
                    BlockData(before, student, teacher, masks, followed.held_out, pinned),
                    last_maps.get(block.name),
                    followed.correction_batches,
                    training,
                )
            note = self.finished.note(block)
            self.record.blocks.append(note)
            student_runner.advance(self.finished.read(block, self.source.block(block), ranks), block, student)
            release_memory()
            self.progress.step(
                f"{block.name}: loss {note['loss_before']:.4g} -> {note['loss_after']:.4g}" if ranks else block.name
            )
        return teacher, student

    def _last_maps(self, parent: StackHarness, batch: Samples) -> dict[str, tuple[TargetModule, TargetLinear]]:
        """The maps through which blocks can make up for what those below them have lost, by block."""
        if not (self.recipe.correction_tokens and self.initializer.corrects):
            return {}
        # How a block ends does not depend on what enters it.
        calls, stream = self.recorder.record(parent, [batch.part(0, 2)])
        runner, found = self.recorder.runner(calls), {}
        for block in parent.blocks:
            module = self.source.block(block)
            last = find_last_map(block, module, functools.partial(runner, module, block, 0, stream[0]))
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
        correction_batches: int,
        training: TrainingOptions,
    ) -> None:
        """Factor, correct, train, convert and write a block, made of ``dense``."""
        found, gradient_moment = self.store.load(block)
        last = None if last_map is None else LastMap.of(*last_map, dense)
        student = dense
        self.finished.factor(block, student, ranks, found)
        student.to(self.recorder.device)
        fisher_factor = None
        if not ranks:
            training = replace(training, steps=0)
        if self.loss.needs_sensitivity and gradient_moment is None:
            # Nothing is trained, and nothing else needed the backward pass: the loss is only reported.
            training = replace(training, loss=MSE())
        elif self.loss.needs_sensitivity and gradient_moment is not None:
            moment = gradient_moment / gradient_moment.diagonal().mean().clamp(min=1e-30)
            fisher_factor = root(moment, self.loss.metric_damping).float().to(self.recorder.device)
        shrinkage = 0.0
        if last is not None:
            corrected = correct(last, block, student, runner, data, range(correction_batches), fisher_factor)
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
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "error_before": result.error_before,
            "error_after": result.error_after,
            "steps": result.steps,
            "kept_step": result.kept_step,
        }
        self.finished.write(block, student, ranks, note)
