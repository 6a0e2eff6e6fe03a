"""Local distillation: teach one block's factors to give what the dense block gives.

Lillama (arXiv 2412.16719, section 3.2). With T the dense block and S its low-rank student, both on hidden states of
their own stream: the teacher stream h is what the dense model computes, the student stream h' what the finished
student blocks below compute. Targets are T(h) always.

- ``teacher``: S(h) against T(h);
- ``student``: S(h') against T(h), so that each block also corrects the errors of those below it;
- ``teacher+student``: the sum of both losses.

Gradients never leave the block: its inputs are detached, and it has an optimiser of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.distillation.losses import Loss
from lillama_core.errors import LillamaError
from lillama_core.formats import FactoredLinear
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.system.processes import ALONE, World


@dataclass(frozen=True)
class TrainingOptions:
    """How a block is trained; the names are those of the recipe."""

    loss: Loss
    mode: str
    train: str
    steps: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    gradient_clip: float
    seed: int

    @property
    def follows_teacher(self) -> bool:
        """Whether the student block is trained on the dense model's stream, too."""
        return self.mode != "student" and self.steps > 0


@dataclass(frozen=True)
class BlockResult:
    """Loss and relative squared error of a block's output on the rows that report, before and after training."""

    loss_before: float
    loss_after: float
    error_before: float
    error_after: float
    steps: int
    kept_step: int
    """The step whose weights were kept; 0: those before training."""


@dataclass
class BlockData:
    """The streams at one block: batches [rows, length, width]; ``targets`` are T(h).

    ``teacher`` may be empty when only the student stream is followed.
    """

    teacher: Sequence[torch.Tensor]
    student: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    masks: list[torch.Tensor | None]
    """What each position counts for [rows, length], by batch."""
    choose: list[int]
    """Batches that choose the checkpoint, and are not trained on."""
    report: list[int]
    """Batches that only say how well it went."""
    train: list[int | None] | None = None
    """Batches that are trained on; for those of which only other processes have rows None. None: all the others."""
    shares: Sequence[float] = ()
    """Which part this process has of what each batch counts for in a mean over all processes; none: all of it."""
    pinned: RoutingReplay = field(default_factory=lambda: RoutingReplay(()))
    """What the deciding modules of the teacher block said on each batch."""

    def share(self, batch: int) -> float:
        """Which part of what ``batch`` counts for this process has."""
        return self.shares[batch] if self.shares else 1.0


class RoutingReplay:
    """The outputs of some modules of a block: noted while the teacher runs, given back while the student learns.

    A router whose input has drifted sends tokens elsewhere, and an expert would be taught what another one is for.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self._noted: dict[str, list[Any]] = {path: [] for path in paths}

    @contextlib.contextmanager
    def noting(self, block: nn.Module) -> Iterator[None]:
        """While open, the outputs of successive batches are noted."""
        with self._hooked(block, lambda path: lambda _, __, output: self._noted[path].append(output)):
            yield

    @contextlib.contextmanager
    def replaying(self, block: nn.Module, batch: int) -> Iterator[None]:
        """While open, the modules of ``block`` say what was noted on ``batch``."""
        with self._hooked(block, lambda path: lambda _, __, output: self._noted[path][batch]):
            yield

    @contextlib.contextmanager
    def _hooked(self, block: nn.Module, hook: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        # Not every block of a stack need have a router.
        found = {name: module for name, module in block.named_modules() if name in self.paths}
        handles = [module.register_forward_hook(hook(name)) for name, module in found.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear warm-up, then constant or a cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def trained_parameters(student: nn.Module, train: str, narrow: Collection[str] = ()) -> list[nn.Parameter]:
    """The factors of the student block, or with ``train`` = ``block`` its norms, biases and dense maps as well.

    With the factors go matrices that have fewer rows or columns than in the dense block: those at the paths ``narrow``.
    """
    if train == "block":
        return [p for p in student.parameters() if p.is_floating_point()]
    found: list[nn.Parameter] = []
    for name, module in student.named_modules():
        if isinstance(module, FactoredLinear):
            found += [p for p in (module.down.weight, module.up.weight) if isinstance(p, nn.Parameter)]
        elif name in narrow and isinstance(module, nn.Linear):
            found += module.parameters(recurse=False)
    return found


def distill_block(
    student: nn.Module,
    block: Block,
    runner: BlockRunner,
    data: BlockData,
    fisher_factor: torch.Tensor | None,
    options: TrainingOptions,
    world: World = ALONE,
    narrow: Collection[str] = (),
) -> BlockResult:
    """Train ``student`` in place; it ends in eval mode with the weights that did best on the batches that choose.

    Of several processes, which begin with the same weights, each brings its rows of every batch; they end
    alike. ``narrow`` as in `trained_parameters`. Raises LillamaError when the loss is not a finite number.
    """

    def loss_of(batch: int, stream: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with data.pinned.replaying(student, batch):
            out = runner(student, block, batch, stream[batch])
        loss = options.loss(out, data.targets[batch].to(out.device), mask_of(batch), fisher_factor)
        return loss * data.share(batch), out

    def mask_of(batch: int) -> torch.Tensor | None:
        mask = data.masks[batch]
        return None if mask is None else mask.to(runner.device)

    followed = [data.student] if options.mode == "student" else [data.teacher]
    if options.mode == "teacher+student":
        followed.append(data.student)

    def evaluate(batches: list[int]) -> tuple[float, float]:
        total, wrong, size, count = 0.0, 0.0, 0.0, 0.0
        with torch.no_grad():
            for batch in batches:
                count += data.share(batch)
                loss, out = loss_of(batch, data.student)
                target = data.targets[batch].to(out.device)
                mask = mask_of(batch)
                counts = torch.ones_like(out[..., 0]) if mask is None else mask
                total += loss.item()
                wrong += ((out - target).square().sum(-1) * counts).sum().item()
                size += (target.square().sum(-1) * counts).sum().item()
        total, wrong, size, count = world.sums([total, wrong, size, count])
        if not math.isfinite(total):
            raise LillamaError(
                f"the loss of block {block.name} is not finite: its activations overflow;"
                " try --loss sensitivity or --dtype float32"
            )
        return total / count, wrong / max(size, 1e-30)

    student.eval()
    before, error_before = evaluate(data.report)
    parameters = trained_parameters(student, options.train, narrow)
    if options.steps == 0 or not parameters:
        return BlockResult(before, before, error_before, error_before, 0, 0)

    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.95)
    )
    generator = torch.Generator().manual_seed(options.seed)
    order = _batches(data, options, generator)
    best, kept_step = evaluate(data.choose)[0], 0
    kept = [p.detach().clone() for p in parameters]
    # Each evaluation costs a forward pass of the rows that choose; a few are enough.
    eval_steps = {round(options.steps * part) for part in (0.5, 0.75, 1.0)}
    for step in range(options.steps):
        factor = learning_rate_factor(step, options.steps, options.warmup, options.schedule)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        if (batch := order[step]) is not None:
            # One backward pass a stream: the same sum, with one graph alive at a time.
            for stream in followed:
                loss, _ = loss_of(batch, stream)
                # It depends on no factor where the batch sends no row to the only experts that have some.
                if loss.requires_grad:
                    loss.backward()
        sum_gradients(parameters, world)
        if options.gradient_clip > 0:
            nn.utils.clip_grad_norm_(parameters, options.gradient_clip)
        optimizer.step()
        if step + 1 in eval_steps:
            if not all(bool(torch.isfinite(p).all()) for p in parameters):
                # Factors of nearly nothing may be large and small numbers, which a step tears apart.
                break
            now, _ = evaluate(data.choose)
            if now < best:
                best, kept_step = now, step + 1
                for saved, parameter in zip(kept, parameters, strict=True):
                    saved.copy_(parameter.detach())
    for saved, parameter in zip(kept, parameters, strict=True):
        parameter.data.copy_(saved)
    student.requires_grad_(False)
    after, error_after = (before, error_before) if kept_step == 0 else evaluate(data.report)
    return BlockResult(before, after, error_before, error_after, options.steps, kept_step)


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Give each parameter the sum of its gradients in all processes; none where no process has one."""
    if world.size == 1:
        return
    has = world.greatest([p.grad is not None for p in parameters])
    found = [p for p, has_gradient in zip(parameters, has, strict=True) if has_gradient]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.sum_([p.grad for p in found if p.grad is not None])


def _batches(data: BlockData, options: TrainingOptions, generator: torch.Generator) -> list[int | None]:
    """The batch for each step: every training batch once an epoch, in an order drawn anew each time."""
    held = {*data.choose, *data.report}
    training = data.train if data.train is not None else [i for i in range(len(data.targets)) if i not in held]
    order: list[int | None] = []
    while len(order) < options.steps:
        order += [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
    return order[: options.steps]
