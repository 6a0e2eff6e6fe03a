"""Rounding the weights of a model block by block, each for what it reads in a model that is rounded below it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, dense_blocks
from lillama_core.architecture.targets.quantized import Pack, hold, matrix
from lillama_core.data.modality import Samples
from lillama_core.pipeline.stages.load import upcast
from lillama_core.quantization.feedback import quantize_with_feedback
from lillama_core.quantization.packing import Packing, packing_of
from lillama_core.quantization.rounding import quantize
from lillama_core.runtime.activations import ActivationStore, StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.masks import upstream_tensors
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.weight_source import ResidentSource, run_blocks_from
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.system.progress import Progress

FEEDBACK_BITS = 4
"""At 8 bits plain rounding costs nothing that feedback could win back."""


def plain(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The bytes of W, rounded without regard to what it multiplies."""
    return quantize(weight, packing.bits)[1]


@dataclass(frozen=True)
class Calibration:
    """Data that goes through a model block by block, and how."""

    batches: Sequence[Samples]
    device: torch.device
    """Where the model is."""
    autocast: torch.dtype | None
    """Of matrix products; None: fp32."""
    progress: Progress


def round_by_blocks(
    model: nn.Module, architecture: Architecture, chosen: Mapping[str, int], calibration: Calibration
) -> int:
    """Let the modules of ``chosen``, path -> bits, hold their weights in few bits; return how many took feedback.

    Weights in the blocks of a stack that are held in 4 bits and read by calls of their module take it; others are
    rounded plainly. What is outside of the blocks comes first, so that the blocks make up for it as well. Raises
    UserError for a model whose blocks cannot be run one by one.
    """
    found = 0
    inside = _inside(model, architecture, chosen)
    for path, bits in chosen.items():
        if path not in inside:
            hold(model, path, bits, plain)
    fed_back = [path for path in inside if packing_of(matrix(model, path), chosen[path]).bits == FEEDBACK_BITS]
    for block, moments in _moments_by_blocks(model, architecture, fed_back, calibration, "Rounding"):
        for path in (path for path, owner in inside.items() if owner == block.path):
            hold(model, path, chosen[path], _pack(moments.get(path)))
        found += len(moments)
    return found


def rounding_errors(
    model: nn.Module, architecture: Architecture, paths: Iterable[str], calibration: Calibration | None
) -> dict[str, float]:
    """How far 4 bits move what each matrix of ``paths`` gives, E |(W - Q) x|^2 / E |W x|^2, rounded plainly.

    Where nothing is known of what a matrix reads, and without ``calibration``, all x are taken to be alike.
    """
    found = {path: relative_error(matrix(model, path), None) for path in paths}
    if calibration is not None:
        inside = _inside(model, architecture, found)
        for _, moments in _moments_by_blocks(model, architecture, list(inside), calibration, "Looking at"):
            found |= {path: relative_error(matrix(model, path), m.mean()) for path, m in moments.items()}
    return found


def relative_error(weight: torch.Tensor, moment: torch.Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) for what rounding W to 4 bits changes, D; ``moment`` H, None: that of I."""
    packing, packed = quantize(weight.detach(), FEEDBACK_BITS, None if moment is None else moment.diagonal())
    w = weight.detach().float()
    d = w - packing.dense(packed, torch.float32)
    lost, whole = ((x.square() if moment is None else (x @ moment.to(x)) * x).sum().item() for x in (d, w))
    return lost / whole if whole > 0 else 0.0


def _moments_by_blocks(
    model: nn.Module, architecture: Architecture, observed: Sequence[str], calibration: Calibration, doing: str
) -> Iterator[tuple[Block, dict[str, SecondMoment]]]:
    """Each block, and E[x x^T] of what the modules ``observed`` in it read, by path.

    Blocks get what the model gives as it is by then: the caller may change a block before it asks for the next.
    """
    blocks = {stack: dense_blocks(architecture, model, stack) for stack in architecture.stacks}
    by_path = {block.path: block for of_stack in blocks.values() for block in of_stack}
    source = ResidentSource(model, calibration.device)
    with _running_exactly(model, by_path, source):
        stacks: list[StackHarness] = []
        for of_stack in blocks.values():
            harness = StackHarness(model, architecture, of_stack, tuple(stacks), source)
            # Whether maps matter at all is not looked at: nothing is taken away from them.
            harness.idle_maps = ()
            stacks.append(harness)
        recorder = Recorder(architecture, calibration.device, calibration.autocast)
        for harness in stacks:
            recorder.check(harness, calibration.batches[0].inputs, source)
            # The stacks below have changed meanwhile, so that the model itself runs them.
            harness.depends_only_on_upstream_output = False
            activations = ActivationStore(recorder, calibration.batches).record(harness)
            calibration.progress.phase(f"{doing} {harness.stack}", len(harness.blocks))
            for block in harness.blocks:
                own = [path for path in observed if path.startswith(f"{block.path}.")]
                yield block, _moments(block, source.block(block, calibration.autocast), own, activations)
                activations.advance(source.block(block, calibration.autocast), block)
                calibration.progress.step(block.name)


def _inside(model: nn.Module, architecture: Architecture, paths: Iterable[str]) -> dict[str, str]:
    """Of those ``paths`` that are in a block of a stack, the path of the block."""
    blocks = [block.path for stack in architecture.stacks for block in dense_blocks(architecture, model, stack)]
    owners = {path: next((b for b in blocks if path.startswith(f"{b}.")), None) for path in paths}
    return {path: owner for path, owner in owners.items() if owner is not None}


def _pack(moment: SecondMoment | None) -> Pack:
    if moment is None:
        return plain
    return lambda weight, packing: quantize_with_feedback(weight, moment.mean().to(weight.device), packing)


def _moments(
    block: Block, module: nn.Module, paths: Sequence[str], activations: StackActivations
) -> dict[str, SecondMoment]:
    """E[x x^T] of what enters the modules at ``paths``, all of them in ``block``, over all batches."""
    found: dict[str, SecondMoment] = {}
    first: list[tuple[torch.Tensor, str]] = []
    same: dict[str, str] = {}
    runner = activations.runner

    def observe(path: str, x: torch.Tensor, columns: int) -> None:
        if x.shape[-1] != columns or not x.numel():
            return
        # Maps that read one tensor share its moment, as the first call of each tells.
        leader = same.setdefault(path, next((other for seen, other in first if seen is x), path))
        if leader == path:
            first.append((x, path))
            masks = activations.masks[batch]
            found.setdefault(path, SecondMoment()).add(*flat_rows(x, masks, x.data_ptr() in upstream))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path in paths:
            local = path.removeprefix(f"{block.path}.")
            columns = matrix(module, local).shape[1]
            hook = module.get_submodule(local).register_forward_pre_hook(
                lambda _, args, path=path, columns=columns: observe(path, args[0], columns)
            )
            hooks.callback(hook.remove)
        for batch in range(len(activations.batches)) if paths else ():
            first.clear()
            call = runner.inputs(block, batch)
            upstream = upstream_tensors((call.args, call.kwargs))
            runner(module, block, batch, activations.hidden[batch])
    return {path: found[leader] for path, leader in same.items() if found[leader].count}


@contextlib.contextmanager
def _running_exactly(model: nn.Module, blocks: Mapping[str, Block], source: ResidentSource) -> Iterator[None]:
    """While open, all but the blocks of ``model`` is in fp32, and each block runs as a copy in fp32."""
    before = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    upcast(model, blocks)
    run_blocks_from(model, blocks, lambda path: source.block(blocks[path]))
    try:
        yield
    finally:
        for path in blocks:
            model.get_submodule(path).__dict__.pop("forward", None)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Numbers of the narrower type come back as they were.
            tensor.data = tensor.data.to(before.get(name, tensor.dtype))
