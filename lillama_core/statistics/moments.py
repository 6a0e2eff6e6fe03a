"""Second moments of rows, accumulated batch by batch."""

from __future__ import annotations

import torch

from lillama_core.runtime.masks import StackMasks


class SecondMoment:
    """E[x x^T] over rows that arrive in batches, accumulated in fp32.

    On a CPU the product is made in tiles of the upper triangle: half the multiply-adds of the full one, at the
    speed of a large matrix product.
    """

    TILE = 384

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        self.count = 0.0

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows [tokens, d], each as often as ``weights`` [tokens] says; once without."""
        rows = rows.detach().float()
        size = rows.shape[-1]
        if self.total is None or self.sum is None:
            self.total = torch.zeros(size, size, device=rows.device)
            self.sum = torch.zeros(size, device=rows.device)
        if weights is None:
            self.sum += rows.sum(0)
        else:
            kept = weights > 0
            rows, weights = rows[kept], weights[kept].float()
            self.sum += weights @ rows
            rows = rows * weights.sqrt()[:, None]
        # Autocast would round the products to half precision, which leaves the small eigenvalues to chance.
        with torch.autocast(rows.device.type, enabled=False):
            if rows.device.type != "cpu" or size <= self.TILE:
                self.total.addmm_(rows.T, rows)
            else:
                for start in range(0, size, self.TILE):
                    stop = min(start + self.TILE, size)
                    self.total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.count += rows.shape[0] if weights is None else weights.sum().item()

    def center(self) -> torch.Tensor:
        """E[x] [d]."""
        if self.sum is None or not self.count:
            raise ValueError("no rows were seen")
        return self.sum / self.count

    def mean(self) -> torch.Tensor:
        """The moment [d, d], symmetric."""
        if self.total is None or not self.count:
            raise ValueError("no rows were seen")
        if self.total.device.type != "cpu" or self.total.shape[0] <= self.TILE:
            return self.total / self.count
        upper = self.total.triu()
        return (upper + upper.triu(1).T) / self.count


def flat_rows(
    tensor: torch.Tensor, masks: StackMasks, reads_upstream: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``tensor`` [..., d] as rows [n, d], and what each counts for [n]; see `StackMasks.weights`."""
    return tensor.reshape(-1, tensor.shape[-1]), masks.weights(tensor, reads_upstream)


def weighted_average(values: dict[str, torch.Tensor], counts: dict[str, float]) -> torch.Tensor:
    """The mean of tensors of one shape, each counted as often as ``counts`` says."""
    total = sum(counts[name] for name in values)
    first = next(iter(values.values()))
    average = torch.zeros_like(first)
    for name, value in values.items():
        average.add_(value, alpha=counts[name] / total)
    return average


def blend(own: torch.Tensor, count: float, average: torch.Tensor) -> torch.Tensor:
    """A moment [d, d] over ``count`` rows, joined by d rows of ``average``."""
    loan = len(own)
    return (own * count + average * loan) / (count + loan)
