"""Load: open the dense model, check it, and put a harness around each of its stacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lillama_core.architecture.blocks import dense_blocks
from lillama_core.models.loading import check_dtype, check_finite, load_model
from lillama_core.pipeline.context import Context, DenseModel
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.system.memory import release_memory


class LoadStage(Stage):
    """Load the model in its own dtype, everything but the blocks in fp32, and run its blocks on made-up input."""

    name = "load model"
    gives = (DenseModel,)

    def run(self, context: Context) -> None:
        spec, request = context.spec, context.request
        if request.resume:
            # What can be compared before the model is loaded: the data can not.
            context.directory.check_fingerprint(context.fingerprint(None))
        context.progress.line(f"Loading {request.model}")
        from_gguf = spec.source.gguf_file is not None
        model = load_model(spec.source, context.architecture, torch.float16 if from_gguf else "auto")
        check_finite(model)
        dtype = check_dtype(context.recipe.dtype, next(model.parameters()).dtype, from_gguf)
        context.record.dtype = str(dtype).removeprefix("torch.")
        upcast(model, context.architecture.stacks)
        model.to(context.device)
        stacks: list[StackHarness] = []
        for name in context.architecture.stacks:
            blocks = spec.blocks.get(name) or dense_blocks(context.architecture, model, name)
            stacks.append(StackHarness(model, context.architecture, blocks, tuple(stacks)))
        source = ResidentSource(model, context.device)
        inputs = context.modality.dummy_inputs(spec.config)
        chosen = {harness.stack: harness for harness in stacks if harness.stack in spec.blocks}
        for harness in chosen.values():
            # A model that overflows, or is not what the architecture says, is better named now than by a later stage.
            harness.check_order(context.recorder.on_device(inputs))
            context.recorder.check(harness, inputs, source)
        context.put(DenseModel(model, dtype, source, tuple(stacks), chosen))
        release_memory()


def upcast(model: nn.Module, stacks: Mapping[str, str]) -> None:
    """Put everything but the blocks into fp32: the hidden stream and what the model derives from its dtype follow.

    With several ``stacks`` (name -> path) the blocks of one run for real while another is worked on, so that they too
    are fp32.
    """
    inside: set[int] = set()
    if len(stacks) == 1:
        modules = [model.get_submodule(path) for path in stacks.values()]
        inside = {id(t) for m in modules for t in [*m.parameters(), *m.buffers()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside and tensor.is_floating_point():
            tensor.data = tensor.data.float()
