"""Load: open the dense model, check it, and put a harness around each of its stacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import Block, dense_blocks
from lillama_core.models.loading import check_dtype, check_finite, load_model
from lillama_core.models.shards import BlockReader
from lillama_core.pipeline.context import Context, DenseModel
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.modules import move
from lillama_core.runtime.weight_source import ResidentSource, StreamedSource, WeightSource, run_blocks_from
from lillama_core.system.memory import release_memory


class LoadStage(Stage):
    """Load the model in its own dtype, everything but the blocks in fp32, and run its blocks on made-up input."""

    name = "load model"
    gives = (DenseModel,)

    def run(self, context: Context) -> None:
        spec, request = context.spec, context.request
        if request.resume and context.world.is_main:
            # What can be compared before the model is loaded: the data can not.
            context.directory.check_fingerprint(context.fingerprint(None))
        context.progress.line(f"Loading {request.model}")
        from_gguf = spec.source.gguf_file is not None
        blocks = {name: self._blocks(context, name) for name in context.architecture.stacks}
        by_path = {block.path: block for of_stack in blocks.values() for block in of_stack}
        source: WeightSource
        if context.streams:
            model, source = self._open_shell(context)
        else:
            model = load_model(spec.source, context.architecture, torch.float16 if from_gguf else "auto")
            source = ResidentSource(model, context.device)
        check_finite(model)
        dtype = check_dtype(context.recipe.dtype, model.dtype, from_gguf)
        context.record.dtype = str(dtype).removeprefix("torch.")
        upcast(model, by_path)
        move(model, context.device)
        if context.streams or len(context.architecture.stacks) > 1:
            # The blocks of one stack run for real while another is worked on: in fp32, as the hidden states are.
            run_blocks_from(model, by_path, lambda path: source.block(by_path[path]))
        stacks: list[StackHarness] = []
        for of_stack in blocks.values():
            stacks.append(StackHarness(model, context.architecture, of_stack, tuple(stacks), source))
        inputs = context.modality.dummy_inputs(spec.config)
        chosen = {harness.stack: harness for harness in stacks if harness.stack in spec.blocks}
        for harness in chosen.values():
            # A model that overflows, or is not what the architecture says, is better named now than by a later stage.
            harness.check_order(context.recorder.on_device(inputs))
            if not context.streams:
                context.recorder.check(harness, inputs, source)
        context.put(DenseModel(model, dtype, source, tuple(stacks), chosen))
        release_memory()

    @staticmethod
    def _blocks(context: Context, name: str) -> list[Block]:
        """All blocks of a stack, with their targets where it is chosen."""
        return context.spec.blocks.get(name) or dense_blocks(context.architecture, context.spec.meta, name)

    @staticmethod
    def _open_shell(context: Context) -> tuple[Any, WeightSource]:
        """The model without the weights of its blocks, and where these are read from."""
        spec = context.spec
        reader = BlockReader.of(spec.source, context.architecture, spec.config)
        reader.load_shell()
        return reader.model, StreamedSource(reader, context.device)


def upcast(model: nn.Module, blocks: Iterable[str]) -> None:
    """Put everything but the ``blocks`` into fp32: the hidden stream and what the model derives from it follow."""
    modules = [model.get_submodule(path) for path in blocks]
    inside = {id(t) for m in modules for t in [*m.parameters(), *m.buffers()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside and tensor.is_floating_point():
            tensor.data = tensor.data.float()
