"""The training of a compressed model as a whole, and what is kept of it on disk so that it can go on.

Each step looks at one batch. Of several processes each has its own rows of every batch; gradients are added up, so
that a step is that of a single process. Weights are in fp32; matrix products are made under autocast.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.data.modality import Samples
from lillama_core.distillation.training import learning_rate_factor, sum_gradients
from lillama_core.errors import UserError
from lillama_core.formats.base import LowRankLinear
from lillama_core.healing.factors import fold, unfold
from lillama_core.healing.objective import Objective
from lillama_core.healing.options import HealingOptions
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.system import seeds
from lillama_core.system.files import read_json, read_tensors, write_json, write_tensors
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What torch's AdamW keeps of each parameter that has had a gradient."""
DIVERGED = 2.0
"""The training has diverged when the loss on the rows that choose is this many times what it was before."""


@dataclass(frozen=True)
class Point:
    """How good the model was after some steps."""

    step: int
    tokens: int
    """What the training had seen by then, in the data's own unit."""
    loss: float
    """A prediction's, on rows that are not trained on."""


@dataclass
class Healed:
    """How it went."""

    curve: list[Point] = field(default_factory=list)
    kept_step: int = 0
    """The step whose weights were kept; 0: those before training."""
    ended: str = ""
    """Why the training ended early; empty when it did not."""

    @property
    def loss_before(self) -> float:
        return self.curve[0].loss

    @property
    def loss_after(self) -> float:
        return min(point.loss for point in self.curve)


@dataclass
class Healing:
    """A student, its teacher, and the rows of this process to train it on."""

    student: nn.Module
    """In fp32, on the device of the run; trained in place."""
    teacher: nn.Module | None
    """None when no teacher is looked at."""
    fit: Sequence[Samples]
    """Batches to train on; of some this process may have no rows."""
    choose: Sequence[Samples]
    """Batches that tell which weights to keep, and when to stop."""
    options: HealingOptions
    epochs: float
    """How often the training goes through the data."""
    seed: int
    tokens: int
    """Of all batches in ``fit`` and of all processes, for the curve."""
    autocast: torch.dtype | None
    progress: Progress
    folder: Path | None = None
    """Where an interrupted run finds what it had."""
    world: World = ALONE
    narrow: Collection[str] = ()
    """Paths of layers of the student whose matrices are smaller than in the dense model: they go with the factors."""
    _positions: int = field(default=1, init=False)

    @property
    def objective(self) -> Objective:
        return Objective.named(self.options.objective)

    @property
    def steps(self) -> int:
        """At least one."""
        return max(1, round(self.epochs * len(self.fit)))

    def run(self) -> Healed:
        """Train; the student ends in eval mode with the weights that did best on the rows that choose.

        Goes on from what ``folder`` holds. Raises UserError for a model and data that the objective does not suit.
        """
        options = self.options
        # In eval mode: without dropout a step is the same in every run.
        self.student.eval().requires_grad_(False)
        formats = {} if options.train == "norms" else unfold(self.student)
        trained = trained_parameters(self.student, options.train, self.narrow)
        if not trained:
            raise UserError(f"--train {options.train}: the model has no such parameters")
        for parameter in trained.values():
            parameter.requires_grad_(True)
        parameters = list(trained.values())
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.95)
        )
        self._positions = self._predictions_of_a_row()
        state = _State(trained, optimizer, self.folder)
        found, step = state.restore()
        steps, order = self.steps, self._order()
        self.progress.phase("Healing", steps)
        if step:
            self.progress.step(advance=step)
        else:
            found.curve.append(Point(0, 0, self._loss(self.choose)))
            state.keep()
        look = {round(steps * i / options.evaluations) for i in range(1, options.evaluations + 1)}
        while step < steps and not found.ended:
            factor = learning_rate_factor(step, steps, options.warmup, "cosine")
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * factor
            optimizer.zero_grad(set_to_none=True)
            loss = self._learn(self.fit[order[step]], parameters)
            step += 1
            if not math.isfinite(loss):
                found.ended = f"the loss of step {step} is not finite; lower the learning rate"
                break
            optimizer.step()
            self.progress.step(f"loss {loss:.4f}")
            self.progress.measured(
                {"healing/loss": loss, "healing/learning_rate": options.learning_rate * factor}, step
            )
            if step in look:
                self._look(found, state, step, steps)
        state.give_back()
        fold(self.student, formats)
        self.student.requires_grad_(False)
        if found.ended:
            self.progress.line(f"The training ends at step {step} of {steps}: {found.ended}")
        return found

    def _look(self, found: Healed, state: _State, step: int, steps: int) -> None:
        """Measure the student, keep it if it is the best so far, and say whether to stop."""
        loss = self._loss(self.choose)
        self.progress.measured({"healing/held_out_loss": loss}, step)
        best = found.loss_after
        found.curve.append(Point(step, round(self.tokens * step / max(1, len(self.fit))), loss))
        if loss < best:
            found.kept_step = step
            state.keep()
        self.progress.line(f"Step {step} of {steps}: {loss:.4f} on rows that are not trained on ({best:.4f} at best)")
        since = sum(point.step > found.kept_step for point in found.curve)
        if not math.isfinite(loss) or loss > DIVERGED * found.loss_before:
            found.ended = "it has diverged; lower the learning rate"
        elif since >= self.options.patience and step < steps:
            found.ended = f"nothing better was found {since} times in a row"
        if self.world.is_main:
            state.save(found, step)
        self.world.barrier()

    def _order(self) -> list[int]:
        """The batch of each step: all of them once an epoch, in an order drawn anew each time."""
        order: list[int] = []
        epoch = 0
        while len(order) < self.steps:
            generator = seeds.stream(self.seed, "healing", epoch)
            order += torch.randperm(len(self.fit), generator=generator).tolist()
            epoch += 1
        return order[: self.steps]

    def _learn(self, samples: Samples, parameters: list[nn.Parameter]) -> float:
        """Give the parameters the gradient of the mean loss of a batch, and return that loss."""
        (count,) = self.world.sums([self._count(samples) if len(samples) else 0.0])
        total = 0.0
        # Row by row: one graph alive at a time, and the same sum.
        for row in range(len(samples)):
            total += self._row(samples.part(row, row + 1), 1 / max(count, 1e-30))
        sum_gradients(parameters, self.world)
        if self.options.gradient_clip > 0:
            norm = nn.utils.clip_grad_norm_(parameters, self.options.gradient_clip)
            total = total if torch.isfinite(norm) else math.inf
        return self.world.sums([total])[0] / max(count, 1e-30)

    def _loss(self, batches: Sequence[Samples]) -> float:
        """The mean loss of a prediction."""
        total, count = 0.0, 0.0
        for samples in batches:
            for row in range(len(samples)):
                one = samples.part(row, row + 1)
                total += self._row(one, None)
                count += self._count(one)
        total, count = self.world.sums([total, count])
        return total / max(count, 1e-30)

    def _count(self, samples: Samples) -> float:
        return self.objective.count(samples, self._positions)

    def _predictions_of_a_row(self) -> int:
        """How many the student makes, where its data does not say; 1 where its outputs are no predictions."""
        one = next((batch.part(0, 1) for batch in (*self.fit, *self.choose) if len(batch)), None)
        if one is None or one.targets is not None or one.output_mask is not None:
            return 1
        device = next(self.student.parameters()).device
        with torch.no_grad(), self._autocast(device):
            outputs = self.student(**{k: v.to(device) for k, v in one.inputs.items()})
        logits = class_logits(self.student, outputs)
        return 1 if logits is None else logits[0, ..., 0].numel()

    def _row(self, samples: Samples, scale: float | None) -> float:
        """The summed loss of a row; with a ``scale`` its gradient times that is added to the parameters'."""
        device = next(self.student.parameters()).device
        inputs: dict[str, Any] = {k: v.to(device) for k, v in samples.inputs.items()}
        if "use_cache" in inspect.signature(self.student.forward).parameters:
            # Nothing is generated: keys and values of the row would be kept for nothing.
            inputs["use_cache"] = False
        objective = self.objective
        with self._autocast(device):
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = main_output(self.teacher(**inputs))
            with contextlib.nullcontext() if scale is not None else torch.no_grad():
                outputs = self.student(**inputs)
            logits = class_logits(self.student, outputs)
            objective.check(samples, logits is not None)
            found = main_output(outputs)
            gradient = None if scale is None else torch.empty_like(found)
            if logits is not None:
                loss = objective.of_predictions(found, wanted, samples, gradient)
            else:
                assert wanted is not None
                loss = objective.of_numbers(found, wanted, gradient)
        if gradient is not None and scale is not None:
            found.backward(gradient.mul_(scale))
        return float(loss.item())

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


def trained_parameters(model: nn.Module, train: str, narrow: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that ``train`` names, each once, by their paths; layers ``narrow`` count as low-rank ones do."""
    smaller = [m for name, m in model.named_modules() if isinstance(m, LowRankLinear) or name in narrow]
    inside = {id(p) for m in smaller for p in m.parameters()}
    chosen: Callable[[nn.Parameter], bool] = {
        "factors": lambda p: id(p) in inside,
        "norms": lambda p: id(p) not in inside and p.dim() == 1,
        "all": lambda p: True,
    }[train]
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and chosen(p)}


class _State:
    """The weights that did best, and on disk all that an interrupted run needs."""

    def __init__(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, folder: Path | None) -> None:
        self._trained, self._optimizer, self._folder = trained, optimizer, folder
        self._best: dict[str, torch.Tensor] = {}

    def keep(self) -> None:
        """Note the present weights as the best so far."""
        for name, parameter in self._trained.items():
            if name in self._best:
                self._best[name].copy_(parameter.detach())
            else:
                self._best[name] = parameter.detach().clone()

    def give_back(self) -> None:
        """Put the best weights into the model."""
        for name, parameter in self._trained.items():
            parameter.data.copy_(self._best[name])

    def save(self, found: Healed, step: int) -> None:
        """Write what a run needs to go on after ``step``; the file before is there until this one is."""
        if self._folder is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            tensors[f"now.{name}"], tensors[f"best.{name}"] = parameter.detach(), self._best[name]
            # What no row has reached yet (an expert, a tower beside the text) has no state.
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        path = self._folder / f"healing-{step}.safetensors"
        write_tensors(path, tensors)
        write_json(self._folder / "healing.json", {"step": step, "file": path.name, **asdict(found)})
        for other in self._folder.glob("healing-*.safetensors"):
            if other != path:
                other.unlink()

    def restore(self) -> tuple[Healed, int]:
        """What an interrupted run had found, and its step; nothing and 0 where there was none."""
        note = None if self._folder is None else read_json(self._folder / "healing.json")
        if self._folder is None or note is None:
            return Healed(), 0
        tensors = read_tensors(self._folder / str(note["file"]))
        for name, parameter in self._trained.items():
            parameter.data.copy_(tensors[f"now.{name}"])
            self._best[name] = tensors[f"best.{name}"].to(parameter.device)
            own = {key: tensors[f"{key}.{name}"] for key in ADAMW_STATE if f"{key}.{name}" in tensors}
            if own:
                # Each parameter's own count of steps, which torch keeps on the CPU.
                self._optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
                }
        curve = [Point(**point) for point in note["curve"]]
        return Healed(curve, int(note["kept_step"]), str(note["ended"])), int(note["step"])
