"""Write: round the model, write the directory, load it in a fresh process, and make it appear."""

from __future__ import annotations

from lillama_core.allocation.plan import RankPlan
from lillama_core.errors import LillamaError
from lillama_core.models.loading import count_parameters
from lillama_core.output import write_result
from lillama_core.pipeline.context import Context, DenseModel
from lillama_core.pipeline.stage import Stage


class WriteStage(Stage):
    """Write the result; the output directory appears only when a fresh process has loaded it."""

    name = "output"
    reads = (DenseModel, RankPlan)

    def run(self, context: Context) -> None:
        dense, record = context.get(DenseModel), context.record
        dense.model.to("cpu")
        # Parameters only: tables such as rotary frequencies are made in fp32, and stay so when the result is loaded.
        for parameter in dense.model.parameters():
            parameter.data = parameter.data.to(dense.dtype)
        counted, promised = count_parameters(dense.model), record.parameters["parameters_after"]
        if counted != promised:
            raise LillamaError(
                f"the model has {counted:,} parameters where format {context.spec.format.name!r} promised {promised:,};"
                " please report this to whoever made the format"
            )
        write_result(
            dense.model,
            context.processor,
            context.spec,
            context.get(RankPlan),
            record,
            context.directory,
            context.progress,
        )
