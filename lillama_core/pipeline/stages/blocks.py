"""Blocks: factor, correct, train and write every block, stack by stack, from the bottom up."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.data.modality import Samples
from lillama_core.data.split import CalibrationSplit
from lillama_core.distillation.embedding import EmbeddingCompressor
from lillama_core.distillation.finished_blocks import FinishedBlocks
from lillama_core.distillation.stack import BatchRoles, StackCompressor
from lillama_core.distillation.training import TrainingOptions
from lillama_core.output.checkpoint import CompressedCheckpoint
from lillama_core.output.quantizer import target_entries
from lillama_core.pipeline.context import (
    CalibrationRows,
    CompressedModel,
    CompressedStacks,
    Context,
    DenseModel,
    Statistics,
)
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.activations import ActivationStore, StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.modules import replace_module
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.states import StateStore
from lillama_core.strategies import ChosenStrategies, StrategyOptions
from lillama_core.system.memory import release_memory


class BlocksOptions(StrategyOptions):
    """How blocks are compressed, beyond what the recipe says of training."""

    correction_ridge: float = Field(
        default=0.1,
        description="ridge of the closed-form correction, relative to the mean diagonal of the second moment of the"
        " last map's inputs; a choice that was made when the correction was built, not swept since",
        gt=0.0,
        le=10.0,
    )


class BlocksStage(Stage):
    """Compress the embedding, if asked to, and the stacks, in place; each finished block is a file of the run."""

    name = "blocks"
    Options = BlocksOptions
    options: BlocksOptions
    reads = (DenseModel, CalibrationRows, CalibrationSplit, Statistics, RankPlan)
    gives = (CompressedStacks, CompressedModel)

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        if chosen.recipe.correction_tokens and getattr(chosen.init, "corrects", False):
            return {}
        return {"correction_ridge": "no correction is made without --correction-tokens"}

    def found(self, context: Context) -> str | None:
        done = len(list(context.directory.blocks.glob("*.safetensors")))
        return f"{done} finished blocks" if done else None

    def run(self, context: Context) -> None:
        dense, plan, found = context.get(DenseModel), context.get(RankPlan), context.get(Statistics)
        chains = context.get(CalibrationRows).chains
        numbers, roles = self._follow(context)
        split = context.get(CalibrationSplit)
        followed = [split.batches[number] for number in numbers]
        context.drop(CalibrationRows)
        checkpoint = CompressedCheckpoint.of(
            context.architecture,
            dense.model,
            target_entries(context.spec.all_blocks, plan),
            dense.dtype,
            context.spec.source.trust_remote_code,
        )
        finished = FinishedBlocks(
            context.directory.blocks, checkpoint, context.spec.format, dense.dtype, context.device, context.autocast
        )
        compressor = StackCompressor(
            plan,
            training_options(context),
            context.corrects,
            self.options.correction_ridge,
            context.initializer,
            context.recorder,
            dense.source,
            found.store,
            found.states,
            finished,
            context.recipe.seed,
            context.progress,
            functools.partial(self._note, context),
            context.world,
        )
        # Routing, and what maps read, is noted of the dense model's blocks, given what the dense model gives them.
        routes: dict[str, StackActivations] = {}
        if context.architecture.pinned or context.initializer.compares:
            routes = record_dense(context.recorder, dense.chosen.values(), found.states, numbers, followed)
        dense_embeddings: dict[str, nn.Module] = {}
        if context.spec.embedding is not None:
            embedding = EmbeddingCompressor(
                finished, context.initializer, context.recipe.seed, context.progress, context.world
            )
            dense_embeddings = embedding.compress(context.spec.embedding, dense.model, plan, found.store)
        for chain in chains:
            # The student of a later stack lives with the compressed ones below it.
            students = ActivationStore(context.recorder, followed)
            for position, harness in enumerate(chain):
                student = students.record(harness)
                if position == len(chain) - 1:
                    # What the stacks below gave is in the recordings: some streams less in memory.
                    students.forget_outputs()
                if harness.stack in dense.chosen:
                    compressor.compress(harness, roles, numbers, student, routes.pop(harness.stack, None))
                else:
                    for block in harness.blocks:
                        student.advance(dense.source.block(block), block)
                        release_memory()
                if position < len(chain) - 1:
                    students.keep_output(harness.stack, student.hidden)
            if len(chains) > 1:
                install(dense.model, harness.blocks, finished)
        blocks = tuple(block for harness in dense.stacks for block in harness.blocks)
        for block in blocks if context.world.is_main else ():
            if not finished.has(block):
                # Of a stack that stays as it is.
                finished.write(block, dense.source.block(block), {}, {})
        last = found.states.read(harness.stack, len(harness.blocks), numbers)
        outputs = [(followed[i], last[i], student.hidden[i]) for i in roles.report]
        context.drop(Statistics)
        context.put(CompressedStacks(harness, outputs, dense_embeddings))
        context.put(CompressedModel(checkpoint, finished, blocks))

    @staticmethod
    def _note(context: Context, note: dict[str, Any]) -> None:
        context.record.blocks.append(note)
        numbers = {f"block/{name}": note[name] for name in ("loss_before", "loss_after", "error_before", "error_after")}
        context.progress.measured(numbers, len(context.record.blocks))

    @staticmethod
    def _follow(context: Context) -> tuple[list[int], BatchRoles]:
        """The numbers of the batches that are followed through the blocks by this process, and what each serves.

        All that is fitted to where blocks are trained or factors adapted, else what the correction asks for; and what
        chooses and reports.
        """
        split, recipe = context.get(CalibrationSplit), context.recipe
        correcting = 0
        if context.corrects:
            correcting = split.batches_for(recipe.correction_tokens / context.given_tokens)
        fit = split.fit if context.follows_fit else split.fit[:correcting]
        numbers = split.here([*fit, *split.choose, *split.report])
        places = {number: place for place, number in enumerate(numbers)}

        def here(part: Sequence[int]) -> list[int]:
            return [places[number] for number in split.here(part)]

        return list(numbers), BatchRoles(
            here(split.fit[:correcting]),
            here(split.choose),
            here(split.report),
            [places.get(number) for number in fit],
            [places.get(number) for number in (*fit, *split.choose, *split.report)],
        )


def record_dense(
    recorder: Recorder,
    stacks: Iterable[StackHarness],
    states: StateStore,
    numbers: Sequence[int],
    batches: Sequence[Samples],
) -> dict[str, StackActivations]:
    """What the dense model gives the blocks of ``stacks`` for ``batches``, besides the hidden states."""
    activations = ActivationStore(recorder, batches)
    found = {}
    for harness in stacks:
        for below in harness.earlier:
            if states.has_all(below.stack, len(below.blocks), numbers):
                activations.keep_output(below.stack, states.read(below.stack, len(below.blocks), numbers))
        found[harness.stack] = activations.record(harness)
        found[harness.stack].hidden = []
    return found


def install(model: nn.Module, blocks: Sequence[Block], finished: FinishedBlocks) -> None:
    """Put the finished blocks of a stack into the model, which runs them for those above."""
    for block in blocks:
        replace_module(model, block.path, finished.read(block))


def training_options(context: Context) -> TrainingOptions:
    """How blocks are trained, as the recipe says."""
    recipe = context.recipe
    return TrainingOptions(
        loss=context.loss,
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
