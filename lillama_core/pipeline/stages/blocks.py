"""Blocks: factor, correct, train and write every block, stack by stack, from the bottom up."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import nn

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.data.split import CalibrationSplit
from lillama_core.distillation.embedding import EmbeddingCompressor
from lillama_core.distillation.finished_blocks import FinishedBlocks
from lillama_core.distillation.stack import BatchRoles, StackCompressor
from lillama_core.distillation.training import TrainingOptions
from lillama_core.pipeline.context import CalibrationRows, CompressedStacks, Context, DenseModel, Statistics
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.activations import ActivationStore, StackActivations
from lillama_core.runtime.modules import swapped_modules
from lillama_core.strategies import ChosenStrategies, StrategyOptions


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
    gives = (CompressedStacks,)

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        if chosen.recipe.correction_tokens and getattr(chosen.init, "corrects", False):
            return {}
        return {"correction_ridge": "no correction is made without --correction-tokens"}

    def found(self, context: Context) -> str | None:
        done = len(list(context.directory.blocks.glob("*.safetensors")))
        return f"{done} finished blocks" if done else None

    def run(self, context: Context) -> None:
        dense, plan, store = context.get(DenseModel), context.get(RankPlan), context.get(Statistics).store
        # What was kept of the rows that were fitted to is done with; the blocks follow streams of their own.
        context.drop(Statistics)
        followed, roles = self._follow(context)
        context.drop(CalibrationRows)
        finished = context.finished_blocks(dense)
        compressor = StackCompressor(
            plan,
            training_options(context),
            context.corrects,
            self.options.correction_ridge,
            context.initializer,
            context.recorder,
            dense.source,
            store,
            finished,
            context.progress,
            context.record.blocks.append,
        )
        teachers: dict[str, StackActivations] = {}
        for name, harness in dense.chosen.items():
            if harness.earlier and not harness.depends_only_on_upstream_output:
                # Only the dense model can tell what its blocks get, and parts of it are compressed soon.
                teachers[name] = followed.record(harness)
        dense_embeddings: dict[str, nn.Module] = {}
        if context.spec.embedding is not None:
            embedding = EmbeddingCompressor(finished, context.recipe.seed, context.progress)
            dense_embeddings = embedding.compress(context.spec.embedding, dense.model, plan, store)
        # The student of a later stack lives with the compressed ones below it, its teacher with the dense.
        students = followed.select(range(len(followed.batches)))
        for position, (name, harness) in enumerate(dense.chosen.items()):
            final = position == len(dense.chosen) - 1
            with swapped_modules(dense.model, dense_embeddings):
                teacher = teachers.pop(name, None) or followed.record(harness)
            same = position == 0 and not dense_embeddings
            student = teacher.fork() if same else students.record(harness)
            if final:
                # What the stacks below gave is in the recordings: some streams less in memory.
                followed.forget_outputs()
                students.forget_outputs()
            compressor.compress(harness, roles, teacher, student)
            self._install(dense, harness.blocks, finished, plan)
            if not final:
                followed.keep_output(name, teacher.hidden)
                students.keep_output(name, student.hidden)
        outputs = [(followed.batches[i], teacher.hidden[i], student.hidden[i]) for i in roles.report]
        context.put(CompressedStacks(harness, outputs, dense_embeddings))

    @staticmethod
    def _follow(context: Context) -> tuple[ActivationStore, BatchRoles]:
        """The batches that are followed through the blocks, and what each serves.

        All that is fitted to where blocks are trained, else what the correction asks for; and what chooses and reports.
        """
        split, recipe = context.get(CalibrationSplit), context.recipe
        correcting = 0
        if context.corrects:
            correcting = split.batches_for(recipe.correction_tokens / context.given_tokens)
        fit = split.fit if recipe.steps > 0 else split.fit[:correcting]
        chosen = [*fit, *split.choose, *split.report]
        first, second = len(fit), len(fit) + len(split.choose)
        roles = BatchRoles(list(range(correcting)), list(range(first, second)), list(range(second, len(chosen))))
        return context.get(CalibrationRows).activations.select(chosen), roles

    @staticmethod
    def _install(dense: DenseModel, blocks: list[Block], finished: FinishedBlocks, plan: RankPlan) -> None:
        """Put the finished blocks of a stack into the model."""
        for block in blocks:
            # In fp32: what was trained is rounded once, to the dtype of the result.
            module = finished.read(block, dense.model.get_submodule(block.path).float(), plan.of(block))
            if len(dense.stacks) == 1:
                # Nothing runs them again before they are written.
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(dense.dtype)


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
