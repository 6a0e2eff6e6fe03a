"""Calibrate: load the calibration rows, split them, and find out how they go through the stacks."""

from __future__ import annotations

import functools

import torch
from torch import nn

from lillama_core.data.modality import SampleRequest, Samples
from lillama_core.data.sharing import shared_samples
from lillama_core.data.split import CalibrationSplit
from lillama_core.errors import UserError
from lillama_core.models.loading import load_model
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel
from lillama_core.pipeline.stage import Stage
from lillama_core.runtime.harness import StackHarness


class CalibrateStage(Stage):
    """Load the rows, open the run directory, and check on rows as they are that blocks can be run one by one."""

    name = "calibration data"
    reads = (DenseModel,)
    gives = (CalibrationRows, CalibrationSplit)

    def run(self, context: Context) -> None:
        recipe, dense = context.recipe, context.get(DenseModel)
        load = context.modality.load if context.request.data is None else context.modality.load_given
        asked = SampleRequest(
            recipe,
            dense.model,
            context.processor,
            context.record.model_fingerprint,
            context.device,
            context.autocast,
            context.progress,
            context.request.data,
            functools.partial(open_whole, context) if context.streams else None,
        )
        data = shared_samples(context.world, lambda: load(asked))
        split = CalibrationSplit.of(data, recipe.batch_size, recipe.held_out, context.chooses)
        context.record.data = {
            "sha256": data.sha256,
            "rows": len(data),
            "tokens": data.tokens,
            "sources": data.description,
            "parts": split.describe(),
        }
        own = split.share(context.world)
        if context.world.is_main:
            context.directory.open(context.fingerprint(data), context.request.overwrite)
        context.world.barrier()
        context.progress.release()
        # All processes look at the same rows: they have to come to the same chains.
        chains = find_chains(context, dense, split.batches[0])
        idle = [name for harness in dense.chosen.values() for name in harness.idle_maps or ()]
        if idle:
            context.progress.line(
                f"{len(idle)} maps have no effect on what their blocks give, and are made as small as can be; the first"
                f" is {idle[0]}"
            )
        context.put(CalibrationRows(data, chains))
        context.put(own)


def open_whole(context: Context) -> nn.Module:
    """The dense model with all of its weights on the device, for a while: it writes text token by token."""
    source = context.spec.source
    dtype = torch.float16 if source.gguf_file is not None else "auto"
    return load_model(source, context.architecture, dtype).to(context.device)


def find_chains(context: Context, dense: DenseModel, batch: Samples) -> tuple[tuple[StackHarness, ...], ...]:
    """The stacks that are run one after the other, see `CalibrationRows.chains`.

    What reaches the blocks of a stack may depend on the rows: they are checked on a ``batch`` as it is. Raises
    UserError where the blocks of a chosen stack do not give what the model gives.
    """
    known: dict[str, torch.Tensor] = {}
    hand_on = True
    for harness in dense.stacks:
        try:
            known[harness.stack] = context.recorder.check(harness, batch.inputs, dense.source, known)
        except UserError:
            if harness.stack in dense.chosen:
                raise
            hand_on = False
            continue
        read = [below.stack for below in harness.earlier if below.stack in dense.chosen]
        if read and harness.adds_between and not harness.depends_only_on_upstream_output:
            raise UserError(
                f"the model adds to the hidden states of {harness.stack!r} between its blocks, and not what the last"
                f" block of {' or '.join(map(repr, read))} gives: a stack that is read at several places cannot be"
                " compressed; choose others with --stacks"
            )
        if harness.earlier:
            hand_on = hand_on and harness.depends_only_on_upstream_output
            two = context.recorder.on_device({k: v[:2] for k, v in batch.inputs.items()})
            hand_on = hand_on and harness.outputs_need_no_earlier(two, known[harness.stack])
    if hand_on:
        return (dense.stacks,)
    for harness in dense.stacks:
        # The model runs everything below for real, whatever is known of it.
        harness.depends_only_on_upstream_output = False
    return tuple((harness,) for harness in dense.chosen.values())
