"""What healing minimises, and its gradient at the model's outputs, in closed form.

With logits s of the student and t of the teacher at a token, q = softmax(s) and p = softmax(t):

- kd: KL(p || q), whose gradient is q - p (Hinton et al., arXiv 1503.02531, section 2, at temperature 1);
- lm: -log q(label), whose gradient is q - onehot(label).

Both are made some tokens at a time and the logits are all that autograd sees: their tables in fp32, as wide as the
vocabulary, would be the largest tensors of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lillama_core.data.modality import IGNORE_INDEX, Samples
from lillama_core.errors import UserError

PARTS: Mapping[str, tuple[float, float]] = {"kd": (1.0, 0.0), "lm": (0.0, 1.0), "kd+lm": (0.5, 0.5)}
"""What the divergence and the loss of the data's own tokens count for."""
TOKENS_AT_ONCE = 256
"""A table of them in fp32 is 50 MB for a vocabulary of 49,152; other numbers were not tried."""


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the divergence from the teacher and of the loss of the labels."""

    kd: float
    lm: float

    @classmethod
    def named(cls, name: str) -> Objective:
        return cls(*PARTS[name])

    def check(self, samples: Samples, predicts: bool) -> None:
        """Raise UserError for data, or a model, that does not go with the objective."""
        if self.lm and (samples.targets is None or not predicts):
            raise UserError("objectives lm and kd+lm need a model that predicts tokens, and data with such; take kd")

    def count(self, samples: Samples, positions: int = 1) -> float:
        """How many predictions of ``samples`` count; ``positions`` of a row do where neither mask nor targets say."""
        return float(self._counts(samples, positions).sum().item())

    def _counts(self, samples: Samples, positions: int) -> torch.Tensor:
        """What each position counts for [rows, length]."""
        if samples.output_mask is not None:
            counts = samples.output_mask.float()
        elif samples.targets is not None:
            counts = torch.ones(samples.targets.shape)
        else:
            return torch.ones(len(samples), positions)
        if self.lm and samples.targets is not None:
            counts = counts * (samples.targets != IGNORE_INDEX)
        return counts

    def of_predictions(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        samples: Samples,
        gradient: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss [] of ``student`` logits [rows, length, classes], or [rows, classes], summed over what counts.

        Writes the loss's gradient at the logits into ``gradient``, of their shape, if given. ``teacher`` is None when
        the divergence counts for nothing.
        """
        classes = student.shape[-1]
        device = student.device
        flat = student.detach().reshape(-1, classes)
        whole = None if teacher is None else teacher.reshape(-1, classes)
        counts = self._counts(samples, student[0, ..., 0].numel()).to(device).reshape(-1)
        labels = None if samples.targets is None else samples.targets.to(device).reshape(-1).clamp(min=0)
        out = None if gradient is None else gradient.view(-1, classes)
        total = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        for start in range(0, len(flat), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            weight = counts[part]
            log_q = flat[part].float().log_softmax(-1)
            wanted = torch.zeros_like(log_q)
            if self.kd and whole is not None:
                log_p = whole[part].float().log_softmax(-1)
                p = log_p.exp()
                total += self.kd * ((p * (log_p - log_q)).sum(-1) * weight).sum()
                wanted.add_(p, alpha=self.kd)
            if self.lm and labels is not None:
                label = labels[part, None]
                total -= self.lm * (log_q.gather(1, label).squeeze(1) * weight).sum()
                wanted.scatter_add_(1, label, torch.full_like(label, self.lm, dtype=wanted.dtype))
            if out is not None:
                out[part] = log_q.exp_().mul_(self.kd + self.lm).sub_(wanted).mul_(weight[:, None])
        return total

    @staticmethod
    def of_numbers(student: torch.Tensor, teacher: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """The squared error [] of outputs that are no predictions, relative to the teacher's squares, times the rows.

        Writes its gradient at the student's outputs into ``gradient``, if given.
        """
        difference = student.detach().float() - teacher.float()
        scale = len(student) / teacher.float().square().sum().clamp(min=1e-30)
        if gradient is not None:
            gradient.copy_(2 * scale * difference)
        return difference.square().sum() * scale
