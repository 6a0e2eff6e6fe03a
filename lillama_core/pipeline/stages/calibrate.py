"""Calibrate: load the calibration rows and split them into those to fit, to choose and to report by."""

from __future__ import annotations

from collections.abc import Collection

from lillama_core.data.modality import SampleRequest
from lillama_core.data.split import CalibrationSplit
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness


class CalibrateStage(Stage):
    """Load the rows, open the run directory, and run the stacks that stay dense and are read by others."""

    name = "calibration data"
    reads = (DenseModel,)
    gives = (CalibrationRows, CalibrationSplit)

    def run(self, context: Context) -> None:
        recipe, dense = context.recipe, context.get(DenseModel)
        data = context.modality.load(
            SampleRequest(
                recipe,
                dense.model,
                context.processor,
                context.record.model_fingerprint,
                context.device,
                context.autocast,
                context.progress,
            )
        )
        split = CalibrationSplit.of(data, recipe.batch_size, recipe.held_out, recipe.steps > 0 or context.corrects)
        context.record.data = {
            "sha256": data.sha256,
            "rows": len(data),
            "tokens": data.tokens,
            "sources": data.description,
            "parts": split.describe(),
        }
        context.directory.open(context.fingerprint(data), context.request.overwrite)
        context.progress.release()
        for harness in dense.chosen.values():
            # Again, on rows as they are: what reaches the blocks of a stack may depend on them.
            context.recorder.check(harness, split.batches[0].inputs, dense.source)
            if has_stale_upstream(harness, dense.chosen):
                harness.depends_only_on_upstream_output = False
        activations = ActivationStore(context.recorder, split.batches)
        run_frozen_stacks(context, dense, activations)
        context.put(CalibrationRows(data, activations))
        context.put(split)


def run_frozen_stacks(context: Context, dense: DenseModel, activations: ActivationStore) -> None:
    """Run the stacks of which nothing is chosen, once, where their last output is all that others get of them."""
    for harness in dense.stacks:
        read = any(
            harness in later.earlier and later.depends_only_on_upstream_output for later in dense.chosen.values()
        )
        if harness.stack in dense.chosen or not read:
            continue
        context.progress.phase(f"Running {harness.stack}", len(activations.batches))
        outputs = []
        for batch in activations.batches:
            outputs.append(context.recorder.stack_output(harness, batch.inputs, dense.source).cpu())
            context.progress.step(harness.stack)
        activations.keep_output(harness.stack, outputs)


def has_stale_upstream(harness: StackHarness, chosen: Collection[str]) -> bool:
    """Whether an earlier stack stays dense above one that does not: it will say something else, but only when run."""
    return any(
        other.stack not in chosen and any(below.stack in chosen for below in other.earlier) for other in harness.earlier
    )
