"""Write: round the model, write the directory, load it in a fresh process, and make it appear."""

from __future__ import annotations

import torch

from lillama_core.errors import LillamaError
from lillama_core.models.loading import count_parameters
from lillama_core.output.directory import FinishedModel, write_result
from lillama_core.pipeline.context import CompressedModel, Context, DenseModel
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.modules import move


class WriteStage(Stage):
    """Write the result; the output directory appears only when a fresh process has loaded it."""

    name = "output"
    reads = (DenseModel, CompressedModel)

    def run(self, context: Context) -> None:
        if not context.world.is_main:
            return
        dense, record, found = context.get(DenseModel), context.record, context.get(CompressedModel)
        move(dense.model, torch.device("cpu"))
        # Parameters only: tables such as rotary frequencies are made in fp32, and stay so when the result is loaded.
        for parameter in dense.model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(dense.dtype)
        counted, promised = count_parameters(found.checkpoint.model), record.parameters["parameters_after"]
        if counted != promised:
            raise LillamaError(
                f"the model has {counted:,} parameters where format {context.spec.format.name!r} promised {promised:,};"
                " please report this to whoever made the format"
            )
        blocks = {block.path: found.finished.path(block) for block in found.blocks}
        model = FinishedModel(dense.model, found.checkpoint, blocks, context.streams)
        write_result(model, context.processor, context.spec, record, context.directory, context.progress)
