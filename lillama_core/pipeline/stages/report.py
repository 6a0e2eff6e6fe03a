"""Report: say how the compressed model predicts on rows that chose nothing."""

from __future__ import annotations

from lillama_core.evaluation.fidelity import measure_fidelity
from lillama_core.pipeline.context import CompressedStacks, Context
from lillama_core.pipeline.stage import Stage
from lillama_core.system.memory import release_memory


class ReportStage(Stage):
    """Compare the predictions of the dense and the compressed model on the rows that report."""

    name = "report"
    reads = (CompressedStacks,)

    def run(self, context: Context) -> None:
        found = context.get(CompressedStacks)
        context.record.fidelity = measure_fidelity(
            found.harness, found.outputs, context.autocast, found.dense_embeddings, context.world
        )
        context.drop(CompressedStacks)
        release_memory()
