"""Statistics: passes over the dense model that take every map apart, ready for any rank."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.data.split import CalibrationSplit
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel, Statistics
from lillama_core.pipeline.measuring import ROWS_PER_BATCH
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.activations import ActivationStore, StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.states import StateStore
from lillama_core.statistics.dense_pass import DensePass, report_undersampled_experts
from lillama_core.statistics.embedding import EmbeddingObserver
from lillama_core.statistics.sensitivity import Piece, SensitivityPass
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.memory import release_memory

MOMENTS_OF_DISK = 0.25
"""Part of the free disk that moments may take while they wait for the backward pass."""


class StatisticsStage(Stage):
    """Run the dense model forward and backward, block by block, and decompose every map."""

    name = "profile"
    reads = (DenseModel, CalibrationRows, CalibrationSplit)
    gives = (Statistics,)

    def found(self, context: Context) -> str | None:
        store = DecompositionStore(context.directory.store)
        blocks = [block for block in context.spec.all_blocks if block.targets]
        done = sum(store.has(block) for block in blocks)
        return f"statistics of {done} of {len(blocks)} blocks" if done else None

    def run(self, context: Context) -> None:
        dense, split, spec, world = context.get(DenseModel), context.get(CalibrationSplit), context.spec, context.world
        store = DecompositionStore(context.directory.store)
        states = StateStore(world.own(context.directory.states), context.state_dtype)
        embedding = None if spec.embedding is None else EmbeddingObserver.of(spec.embedding)
        for chain in context.get(CalibrationRows).chains:
            self._run_chain(context, chain, store, states, embedding)
        if (
            spec.embedding is not None
            and embedding is not None
            and not world.from_main(functools.partial(store.has, spec.embedding))
        ):
            embedding.reduce(world, context.device)
            # Of the rows that nothing else is fitted to, the frequencies of tokens are not taken either.
            rows = context.get(CalibrationRows).data.part(0, split.fitted_rows)
            if world.is_main:
                embedding.decompose(spec.embedding, dense.model, rows, context.initializer, store)
                # Bands of the table are the largest maps of all.
                release_memory()
            world.barrier()
        blocks = [block for blocks in spec.blocks.values() for block in blocks]
        context.record.rows_seen = report_undersampled_experts(blocks, store, context.progress)
        context.put(Statistics(store, states))

    def _run_chain(
        self,
        context: Context,
        chain: Sequence[StackHarness],
        store: DecompositionStore,
        states: StateStore,
        embedding: EmbeddingObserver | None,
    ) -> None:
        dense, split = context.get(DenseModel), context.get(CalibrationSplit)
        goes_back = self._needs_gradients(context)
        looks, follows = context.initializer.needs_inputs, context.follows_fit
        fit = split.here(split.fit) if looks or follows or goes_back else ()
        numbers = (*fit, *split.here((*split.choose, *split.report)))
        activations = ActivationStore(context.recorder, split.batches).select(numbers)
        rows = split.rows_for(context.recipe.sensitivity_tokens, context.given_tokens) if goes_back else 0
        keeps_moments = self._keeps_moments(context)
        kept = set(numbers)
        if not follows:
            # What is neither fitted to again nor run again need not be kept.
            fitted = len(split.fit) if goes_back and not keeps_moments else split.batches_with(rows)
            correcting = split.batches_for(context.recipe.correction_tokens / context.given_tokens)
            kept -= set(split.fit[max(fitted, correcting if context.corrects else 0) :])
            if context.spec.removes_channels:
                # Whether they are channels is tried on one.
                kept |= set(numbers[:1])
        dense_pass = DensePass(
            source=dense.source,
            states=states,
            store=store,
            initializer=context.initializer,
            numbers=numbers,
            fitted=len(fit),
            sequences=split.fitted_rows,
            kept=frozenset(kept),
            goes_back=goes_back,
            keeps_moments=keeps_moments,
            done=names_of(context, chain, store.has),
            with_moments=names_of(context, chain, store.has_moments),
            finds_last_maps=context.corrects,
            takes_out=context.spec.removes_channels,
            arithmetic=context.autocast,
            progress=context.progress,
            world=context.world,
        )
        first = next(i for i, harness in enumerate(chain) if harness.stack in dense.chosen)
        recorded: dict[str, StackActivations] = {}
        way_back: WayBack | None = None
        with context.record.timed("forward"):
            for position, harness in enumerate(chain):
                found = recorded[harness.stack] = activations.record(harness)
                if position == len(chain) - 1:
                    if goes_back:
                        way_back = WayBack.of(context, activations, dense_pass, rows)
                    # What the stacks below gave is in the recordings; of a few rows the way back needs it again.
                    activations.forget_outputs()
                release_memory()
                dense_pass.forward(harness, found, with_states=position >= first)
                if position < len(chain) - 1:
                    activations.keep_output(harness.stack, found.hidden)
                found.hidden = []
                if keeps_moments or not goes_back:
                    # No block is run again, but on one batch to see how it ends.
                    del found.runner.calls[1:]
                # The way back drops what it has passed.
                del found
        if way_back is not None:
            with context.record.timed("backward"):
                self._go_back(context, chain[first:], dense_pass, recorded, way_back, embedding)
        release_memory()

    @staticmethod
    def _go_back(
        context: Context,
        stacks: Sequence[StackHarness],
        dense_pass: DensePass,
        recorded: dict[str, StackActivations],
        way_back: WayBack,
        embedding: EmbeddingObserver | None,
    ) -> None:
        world, seed, small = context.world, context.recipe.seed, way_back.activations
        folder = world.own(context.directory.gradients)
        sensitivity = SensitivityPass(
            stacks,
            context.recorder,
            small,
            way_back.pieces,
            way_back.row_numbers,
            dense_pass.states,
            folder,
            seed,
            world,
        )
        model, kept = context.get(DenseModel).model, folder / "embedding.safetensors"
        left = sensitivity.resume(lambda block: not block.targets or block.name in dense_pass.done)
        if left is not None:
            position, reached = left
            if embedding is not None:
                embedding.read(kept, context.device)
        else:
            position, reached = len(stacks) - 1, len(stacks[-1].blocks)
            if embedding is None:
                sensitivity.start()
            else:
                with embedding.observe(model):
                    sensitivity.start()
                embedding.write(kept)
        for i in range(position, -1, -1):
            harness = stacks[i]
            dense_pass.backward(harness, sensitivity, recorded[harness.stack], reached)
            if (
                embedding is not None
                and harness.stack not in embedding.entered
                and (gain := world.from_main(functools.partial(entry_gain, embedding, model, small, harness))) > 0
            ):
                # Only where its rows enter do gradients say what they matter.
                sensitivity.add_entry(harness, embedding.entry, gain)
                embedding.entered.add(harness.stack)
                embedding.write(kept)
            # Its blocks have been passed: what they were given goes before another stack begins.
            del recorded[harness.stack]
            if i > 0:
                sensitivity.leave(harness)
                small.forget_outputs(stacks[i - 1].stack)
                release_memory()
                reached = len(stacks[i - 1].blocks)

    @staticmethod
    def _needs_gradients(context: Context) -> bool:
        trains = context.recipe.steps > 0
        return (
            context.initializer.needs_gradients
            or (context.loss.needs_sensitivity and trains)
            # What the embedding's rows are for is only seen in that pass.
            or (context.spec.embedding is not None and context.initializer.needs_inputs)
        )

    @classmethod
    def _keeps_moments(cls, context: Context) -> bool:
        return context.world.from_main(lambda: cls._may_keep_moments(context))

    @staticmethod
    def _may_keep_moments(context: Context) -> bool:
        """Whether moments of inputs wait in files for the backward pass, or blocks are run a second time.

        Either way they are the same. A CPU is spared a second pass of all rows through each block; an accelerator is
        expected to have run the block again before a file of that size is written, which has not been measured.
        """
        size = 4 * sum(m.map.in_features**2 for m in context.spec.maps)
        free = shutil.disk_usage(context.directory.path).free
        return context.device.type == "cpu" and size <= MOMENTS_OF_DISK * free


@dataclass(frozen=True)
class WayBack:
    """The rows that gradients are taken of, in small batches, and what stacks gave for them."""

    activations: ActivationStore
    pieces: Sequence[Piece]
    row_numbers: Sequence[int]
    """Of all these rows among those of all processes."""

    @classmethod
    def of(cls, context: Context, activations: ActivationStore, dense_pass: DensePass, rows: int) -> WayBack:
        """The first ``rows`` of those that are fitted to; ``activations`` are of all batches."""
        fitted = activations.select(range(dense_pass.fitted))
        own_rows = context.world.numbers(rows)
        small, taken = fitted.first_rows(len(own_rows), ROWS_PER_BATCH, context.device)
        pieces = [Piece(dense_pass.numbers[i], part, len(fitted.batches[i])) for i, part in taken]
        return cls(small, pieces, own_rows)


def names_of(context: Context, chain: Sequence[StackHarness], has: Callable[[Block], bool]) -> frozenset[str]:
    """The names of the blocks that the run directory ``has`` something of; only the main process looks.

    A network file system would remember for the others what was not there yet.
    """
    return frozenset(context.world.from_main(lambda: [b.name for of in chain for b in of.blocks if has(b)]))


def entry_gain(embedding: EmbeddingObserver, model: nn.Module, small: ActivationStore, harness: StackHarness) -> float:
    """What rows of the embedding are multiplied by on their way into a stack; 0: it is made of others."""
    first = small.select([0])
    return embedding.gain(model, lambda: first.record(harness).hidden)
