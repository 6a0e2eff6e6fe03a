"""Statistics: passes over the dense model that take every map apart, ready for any rank."""

from __future__ import annotations

import contextlib

from lillama_core.data.split import CalibrationSplit
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel, Statistics
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness
from lillama_core.statistics.dense_pass import decompose_blocks, report_undersampled_experts
from lillama_core.statistics.embedding import EmbeddingObserver
from lillama_core.statistics.sensitivity import measure_sensitivity
from lillama_core.statistics.store import DecompositionStore

ROWS_PER_BATCH = 2
"""Rows of a batch of the passes with gradients: all inputs of all blocks are held for one."""


class StatisticsStage(Stage):
    """Measure the sensitivity of the predictions (backward), then decompose every map (forward), stack by stack."""

    name = "profile"
    reads = (DenseModel, CalibrationRows, CalibrationSplit)
    gives = (Statistics,)

    def found(self, context: Context) -> str | None:
        store = DecompositionStore(context.directory.store)
        blocks = context.spec.all_blocks
        done = sum(store.has(block) for block in blocks)
        return f"statistics of {done} of {len(blocks)} blocks" if done else None

    def run(self, context: Context) -> None:
        dense, split, spec = context.get(DenseModel), context.get(CalibrationSplit), context.spec
        rows = context.get(CalibrationRows)
        store = DecompositionStore(context.directory.store)
        fitted = rows.activations.select(split.fit)
        embedding = None if spec.embedding is None else EmbeddingObserver.of(spec.embedding)
        for harness in dense.chosen.values():
            if self._needs_gradients(context) and not self._has_gradients(context, harness, store):
                with context.record.timed("sensitivity"):
                    self._measure_sensitivity(context, harness, dense, fitted, embedding, store)
            if not all(store.has(block) for block in harness.blocks):
                with context.record.timed("statistics"):
                    self._decompose(context, harness, dense, fitted, store)
        if spec.embedding is not None and embedding is not None and not store.has(spec.embedding):
            # Of the rows that nothing else is fitted to, the frequencies of tokens are not taken either.
            embedding.decompose(
                spec.embedding, dense.model, rows.data.part(0, split.fitted_rows), context.initializer, store
            )
        blocks = [block for blocks in spec.blocks.values() for block in blocks]
        context.record.rows_seen = report_undersampled_experts(blocks, store, context.progress)
        context.put(Statistics(store, fitted))

    @staticmethod
    def _needs_gradients(context: Context) -> bool:
        trains = context.recipe.steps > 0
        return (
            context.initializer.needs_gradients
            or (context.loss.needs_sensitivity and trains)
            # What the embedding's rows are for is only seen in that pass.
            or (context.spec.embedding is not None and context.initializer.needs_inputs)
        )

    @staticmethod
    def _has_gradients(context: Context, harness: StackHarness, store: DecompositionStore) -> bool:
        embedding = context.spec.embedding
        known = all(store.has_gradients(block) for block in harness.blocks)
        return known and (embedding is None or store.has(embedding))

    @staticmethod
    def _measure_sensitivity(
        context: Context,
        harness: StackHarness,
        dense: DenseModel,
        fitted: ActivationStore,
        embedding: EmbeddingObserver | None,
        store: DecompositionStore,
    ) -> None:
        split = context.get(CalibrationSplit)
        rows = split.rows_for(context.recipe.sensitivity_tokens, context.given_tokens)
        small = fitted.first_rows(rows, ROWS_PER_BATCH, context.device)
        entry = None
        with contextlib.ExitStack() as observing:
            if embedding is None:
                activations = small.record(harness)
            else:
                with embedding.lookups(dense.model) as seen:
                    activations = small.record(harness)
                # Only where its rows enter do gradients say what they matter.
                entry = embedding.entry if seen else None
                observing.enter_context(embedding.observe(dense.model))
            for block, found in measure_sensitivity(
                harness, dense.source, activations, context.recipe.seed, context.progress, entry
            ):
                store.save_gradients(block, found)

    @staticmethod
    def _decompose(
        context: Context, harness: StackHarness, dense: DenseModel, fitted: ActivationStore, store: DecompositionStore
    ) -> None:
        looks = context.initializer.needs_inputs
        activations = (fitted if looks else fitted.select(())).record(harness)
        decompose_blocks(harness.blocks, dense.source, activations, context.initializer, store, context.progress)
        if looks and harness.stack != list(dense.chosen)[-1]:
            fitted.keep_output(harness.stack, activations.hidden)
