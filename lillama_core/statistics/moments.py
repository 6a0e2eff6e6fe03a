"""Second moments of rows, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.linalg.blas import ssyrk

from lillama_core.runtime.masks import StackMasks
from lillama_core.system.devices import exact_device, fast_gram_products, has_fast_bfloat16_cpu

TILE = 384
"""Columns of a tile of the upper triangle: the fastest that was tried before, on two threads."""


class SecondMoment:
    """E[x x^T] over rows that arrive in batches, accumulated in fp32.

    No batch waits for the device: counts stay there until they are asked for. On a CPU only the upper triangle is
    made: on one thread by BLAS, 0.75 to 0.84 of the time of a loop over tiles of it, which several threads take.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        self._count: float | torch.Tensor = 0.0

    @property
    def count(self) -> float:
        """The number of rows, each as often as its weight said; waits for the device where weights were given."""
        if isinstance(self._count, torch.Tensor):
            self._count = float(self._count.item())
        return self._count

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows [tokens, d], each as often as ``weights`` [tokens] says; once without."""
        half = rows.dtype == torch.bfloat16 or computes_in_bfloat16(rows.device)
        rows = rows.detach().float()
        size = rows.shape[-1]
        if self.total is None or self.sum is None:
            self.total = torch.zeros(size, size, device=rows.device)
            self.sum = torch.zeros(size, device=rows.device)
        if weights is not None and rows.device.type == "cpu":
            # Rows that count for nothing may hold anything, and 0 times infinity is no number. A CPU leaves them out;
            # on other devices their number is not known without waiting.
            kept = weights > 0
            if not kept.all():
                rows, weights = rows[kept], weights[kept]
            weights = None if (weights == 1).all() else weights.float()
        elif weights is not None:
            weights = weights.float()
            rows = torch.where(weights.unsqueeze(1) > 0, rows, 0.0)
        if weights is None:
            self._count = self._count + rows.shape[0]
        else:
            exact = torch.float64 if exact_device(weights) == weights.device else torch.float32
            self._count = self._count + weights.sum(dtype=exact)
        # Autocast would round the products to half precision, which leaves the small eigenvalues to chance.
        with torch.autocast(rows.device.type, enabled=False):
            roots = None if weights is None else weights.sqrt()
            if roots is not None:
                rows = rows * roots.unsqueeze(1)
            rounded = half and sums_bfloat16(rows.device)
            if rounded:
                # Before both sums: G - E[x] E[x]^T is positive only if G and E[x] are of the same rows.
                rows = rows.bfloat16().float()
            self.sum += rows.sum(0) if roots is None else roots @ rows
            if rows.device.type == "cpu":
                add_upper_gram(self.total, rows, rounded)
            elif rounded:
                rows = rows.bfloat16()
                self.total = torch.addmm(self.total, rows.T, rows, out_dtype=torch.float32)
            else:
                with fast_gram_products(rows.device):
                    self.total.addmm_(rows.T, rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums so far, as tensors by name; none before the first row."""
        if self.total is None or self.sum is None:
            return {}
        return {"total": self.total, "sum": self.sum, "count": torch.tensor(self.count, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, torch.Tensor], device: torch.device | None = None) -> None:
        """Go on from what `tensors` gave; with ``device``, for rows that are there."""
        if tensors:
            self.total, self.sum = tensors["total"].to(device), tensors["sum"].to(device)
            self._count = float(tensors["count"])

    def center(self) -> torch.Tensor:
        """E[x] [d]."""
        if self.sum is None or not self.count:
            raise ValueError("no rows were seen")
        return self.sum / self.count

    def mean(self) -> torch.Tensor:
        """The moment [d, d], symmetric."""
        if self.total is None or not self.count:
            raise ValueError("no rows were seen")
        if self.total.device.type != "cpu":
            return self.total / self.count
        upper = self.total.triu()
        return (upper + upper.triu(1).T) / self.count


def add_upper_gram(total: torch.Tensor, rows: torch.Tensor, half: bool = False) -> None:
    """Add the upper triangle of rows^T rows to ``total`` [d, d], in place; both in fp32 on the CPU, rows [n, d].

    ``half``: the rows are bfloat16 numbers, and the CPU has products of such.
    """
    if not len(rows):
        return
    if half or torch.get_num_threads() > 1:
        # Threads of scipy's BLAS and torch's own wait for each other: between products of torch on two threads ssyrk
        # took 2.8 times (1536 features) and 3.4 times (576) as long as these tiles.
        size = len(total)
        with fast_gram_products(rows.device, half):
            for start in range(0, size, TILE):
                stop = min(start + TILE, size)
                total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        return
    # BLAS counts by columns: what it sees is rows^T and total^T, whose lower triangle is the upper one of total.
    ssyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=1, lower=1)


def sums_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has products of bfloat16 that are summed up in fp32; CUDA since PyTorch 2.8."""
    if device.type == "cpu":
        return has_fast_bfloat16_cpu()
    return device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the pass computes in bfloat16, so that maps read rows rounded to it, and their moments may as well.

    Rounding the rows changes truncation errors by less than 1e-5 of themselves on SmolLM2's activations.
    """
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


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
    """A moment [d, d] or mean [d] over ``count`` rows, joined by d rows of ``average``."""
    loan = len(own)
    return (own * count + average * loan) / (count + loan)
