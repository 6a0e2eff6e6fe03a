"""What the blocks below have lost, made up for by the last map of a block, in closed form.

A residual block ends in y = s + W x + b: what goes past its last map, and that map. In the compressed model both s' and
x' differ from what the dense model has, by errors that x' partly tells. With r = y - s' what the map would have to give
for the block's output y to be the dense one, the ridge regression of r - (W x' + b) on x' says by what matrix K (and
shift, where there is a bias) W falls short, and W + shrinkage * K is what is factored. (Targets from the dense stream
for the compressed one's inputs: AA-SVD, arXiv 2604.02119, section 3; there each map aims at its own dense output, here
the last one at the block's.)

All of K would follow the calibration rows too closely, and so each block disturbs the next. Rows that took no part say
how much of it holds elsewhere: the shrinkage, between 0 and 1, is the factor of K that fits them best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.distillation.training import BlockData
from lillama_core.formats import Factored
from lillama_core.initialization import Initializer, MapStatistics, root
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.masks import StackMasks
from lillama_core.statistics.moments import SecondMoment, flat_rows
from lillama_core.statistics.reduction import reduce_moments
from lillama_core.system.devices import exact_device
from lillama_core.system.processes import ALONE, World


@dataclass(frozen=True)
class LastMap:
    """The map that ends a block, at full rank."""

    target: LinearTarget
    map: TargetLinear
    weight: torch.Tensor
    """W [out, in], fp32."""
    bias: torch.Tensor | None
    """b [out], fp32."""

    @classmethod
    def of(cls, target: LinearTarget, map_: TargetLinear, block: nn.Module) -> LastMap:
        """Copies from a block of matrices of full rank, which may be replaced afterwards."""
        weight, bias = target.weight(block, map_), target.bias(block, map_)
        copied = None if bias is None else bias.detach().float().clone()
        return cls(target, map_, weight.detach().float().clone(), copied)


@dataclass(frozen=True)
class Corrected:
    """A dense map with the correction in it, and what was seen on the way."""

    weight: torch.Tensor
    """W + shrinkage * K [out, in], fp32."""
    bias: torch.Tensor | None
    """[out], fp32."""
    inputs: torch.Tensor
    """E[x' x'^T] [in, in]."""
    center: torch.Tensor
    """E[x'] [in]."""
    shrinkage: float
    """Part of K that rows which took no part in it confirm, between 0 and 1."""

    def factored(
        self,
        rank: int,
        initializer: Initializer,
        gradients: torch.Tensor | None,
        gradient_scale: float,
        generator: torch.Generator,
    ) -> nn.Module:
        """Factors of the corrected map for the inputs that it has.

        ``gradients`` is F [out, out] of the dense map, which may have had more inputs, with its mean diagonal.
        """
        exact = exact_device(self.weight)
        weight = self.weight.to(exact)
        if gradients is not None and weight.shape[0] > weight.shape[1]:
            # Fewer channels than outputs are left: see `MapStatistics`, on the smaller side.
            gradients = weight.T @ gradients.to(exact) @ weight
        seen = MapStatistics(self.inputs, gradients, gradient_scale, 1.0, self.center, self.bias is not None).to(exact)
        found = initializer.decompose(weight, seen)
        B, A = initializer.factors(weight, rank, found, generator)
        bias = found.bias(None if self.bias is None else self.bias.to(exact), weight, B, A)
        return Factored().from_factors(B, A, bias)


def correct(
    last: LastMap,
    block: Block,
    student: nn.Module,
    runner: BlockRunner,
    data: BlockData,
    correction_batches: Sequence[int],
    fisher_factor: torch.Tensor | None,
    ridge: float,
    world: World = ALONE,
) -> Corrected:
    """The dense map ``last`` with what ``student``, whose maps are low rank already, needs of it besides.

    ``data`` holds the student's stream and the dense block's outputs. K is fitted on ``correction_batches``
    with a ``ridge`` relative to the mean diagonal of E[x x^T], its shrinkage on the batches that choose, where
    ``fisher_factor`` C [width, width] weighs errors e of the output as |e C|^2. Sums run over the rows of all
    processes.
    """
    W, bias = last.weight.to(runner.device), None if last.bias is None else last.bias.to(runner.device)
    moment, cross, wanted = SecondMoment(), torch.zeros_like(W), torch.zeros_like(W[:, 0])
    for batch in correction_batches:
        rows, r, weights = _seen(last, block, student, runner, data, batch)
        moment.add(rows, weights)
        r = r if weights is None else r * weights[:, None]
        with torch.autocast(rows.device.type, enabled=False):
            cross.addmm_(r.T, rows)
        wanted += r.sum(0)
    moment = reduce_moments(world, {"": moment}, [""], None, W.device)[""]
    world.sum_([cross, wanted])
    exact = exact_device(W)
    P, center = moment.mean(), moment.center()

    def precise(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(exact).double()

    K, shift = _regression(
        precise(W),
        precise(P),
        precise(center),
        precise(cross / moment.count),
        precise(wanted / moment.count),
        None if bias is None else precise(bias),
        ridge,
    )
    K, shift = K.float().to(W.device), shift.float().to(W.device)

    agreeing, size = 0.0, 0.0
    for batch in data.choose:
        rows, r, weights = _seen(last, block, student, runner, data, batch)
        missing = r - rows @ W.T - (0.0 if bias is None else bias)
        offered = rows @ K.T + shift
        if fisher_factor is not None:
            missing, offered = missing @ fisher_factor, offered @ fisher_factor
        counts = torch.ones_like(rows[:, 0]) if weights is None else weights
        agreeing += ((missing * offered).sum(1) * counts).sum().item()
        size += (offered.square().sum(1) * counts).sum().item()
    agreeing, size = world.sums([agreeing, size])
    shrinkage = min(1.0, max(0.0, agreeing / size)) if size > 0 else 0.0
    return Corrected(W + shrinkage * K, None if bias is None else bias + shrinkage * shift, P, center, shrinkage)


def _seen(
    last: LastMap, block: Block, student: nn.Module, runner: BlockRunner, data: BlockData, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the last map reads [n, in], what it would have to give [n, out], and what each row counts [n]."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def on_input(map_: TargetLinear, tensor: torch.Tensor) -> None:
        if map_.name == last.map.name:
            inputs.append(tensor)

    def on_output(map_: TargetLinear, tensor: torch.Tensor) -> None:
        if map_.name == last.map.name:
            outputs.append(tensor)

    observe = last.target.observe(student, on_input=on_input, on_output=on_output)
    with torch.no_grad(), observe, data.pinned.replaying(student, batch):
        out = runner(student, block, batch, data.student[batch])
    mask = data.masks[batch]
    rows, weights = flat_rows(inputs[0], StackMasks(mask))
    r = data.targets[batch].to(out.device) - out + outputs[0].float().view_as(out)
    r = r.reshape(-1, r.shape[-1])
    if weights is not None:
        kept = weights > 0
        rows, r, weights = rows[kept], r[kept], weights[kept].float()
    return rows.float(), r, weights


def _regression(
    W: torch.Tensor,
    P: torch.Tensor,
    center: torch.Tensor,
    cross: torch.Tensor,
    wanted: torch.Tensor,
    bias: torch.Tensor | None,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [out, in] and the shift [out] that r - (W x + b) = K x + shift is fitted with; no shift without a bias.

    ``P`` = E[x x^T], ``center`` = E[x], ``cross`` = E[r x^T], ``wanted`` = E[r].
    """
    if bias is not None:
        P, cross = P - torch.outer(center, center), cross - torch.outer(wanted, center)
    mean = P.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(W), torch.zeros_like(wanted)
    C = root(P, ridge)
    K = torch.cholesky_solve((cross - W @ P).T, C).T
    shift = torch.zeros_like(wanted) if bias is None else wanted - bias - (W + K) @ center
    return K, shift
