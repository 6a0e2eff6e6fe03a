"""The interface of an initialiser: from a weight and its statistics to factors of any rank, and a spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from lillama_core.allocation import Spectrum
from lillama_core.initialization.elimination import Elimination
from lillama_core.strategies import Strategy


@dataclass(frozen=True)
class MapStatistics:
    """Statistics of a map of the dense model.

    ``inputs`` is G = E[x x^T] [in, in] over the calibration tokens. With g the gradient of the model's loss at the
    map's output and F = E[g g^T], ``gradients`` is F [out, out] when out <= in, else W^T F W [in, in], which is smaller
    and all that is needed then; ``gradient_scale`` is the mean diagonal of F. ``center`` is E[x] [in]. Tensors that
    were not asked for, or of a map that no row reached, are None. ``rows`` is the number of rows that reach the map in
    one row of calibration data. A map that ``has_bias`` can absorb an error that is the same for all inputs.
    """

    inputs: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    gradient_scale: float = 0.0
    rows: float = 1.0
    center: torch.Tensor | None = None
    has_bias: bool = False

    def to(self, device: torch.device) -> MapStatistics:
        """These statistics on ``device``."""
        tensors = (self.inputs, self.gradients, self.center)
        inputs, gradients, center = (None if t is None else t.to(device) for t in tensors)
        return replace(self, inputs=inputs, gradients=gradients, center=center)


@dataclass(frozen=True)
class StudentStatistics:
    """Statistics of a map's inputs x' in the model as far as it is compressed, beside its inputs x in the dense one."""

    inputs: torch.Tensor
    """E[x' x'^T] [in, in]."""
    center: torch.Tensor
    """E[x'] [in]."""
    has_bias: bool
    """Whether the map can absorb an error that is the same for all inputs."""
    cross: torch.Tensor | None = None
    """E[x x'^T] [in, in], for an initialiser that compares both."""
    dense_center: torch.Tensor | None = None
    """E[x] [in], likewise."""


@dataclass(frozen=True)
class Decomposition:
    """A map's matrix taken apart once, so that factors of every rank are slices.

    On the output side W' = left[:, :r] (right[:r] W) with left, right [out, k]; on the input side
    W' = (W left[:, :r]) right[:r]. Only the smaller side is kept, which is less than W itself needs.
    """

    spectrum: Spectrum
    left: torch.Tensor
    right: torch.Tensor
    on_outputs: bool
    center: torch.Tensor | None = None
    """Input [in], the mean of all, at which the factored map shall equal the dense one: the difference goes into the
    bias, if the map has one. None: leave the bias."""

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, rank], A [rank, in]) in fp32 for W [out, in], with columns of B and rows of A of equal norm."""
        weight = weight.float()
        left, right = self.left[:, :rank].to(weight.device), self.right[:rank].to(weight.device)
        return balance(left, right @ weight) if self.on_outputs else balance(weight @ left, right)

    def bias(
        self, bias: torch.Tensor | None, weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor
    ) -> torch.Tensor | None:
        """The bias [out] of the map with factors B and A for W = ``weight`` [out, in]: b + (W - B A) center."""
        if bias is None or self.center is None:
            return bias
        center = self.center.to(weight.device)
        return bias.float() + weight.float() @ center - B @ (A @ center)


def balance(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rescale each component so that |B_i| = |A_i|; B A stays the same.

    One learning rate then suits both factors, and neither overflows in half precision.
    """
    up, down = B.norm(dim=0), A.norm(dim=1)
    scale = torch.where((up > 0) & (down > 0), (down / up.clamp(min=1e-30)).sqrt(), torch.ones_like(up))
    return (B * scale).contiguous(), (A / scale.unsqueeze(1)).contiguous()


class Initializer(Strategy, ABC):
    """Turns a matrix into factors; found by its name."""

    needs_inputs: bool = False
    needs_gradients: bool = False
    corrects: bool = False
    """Whether W may be replaced by a corrected map, see `lillama_core.distillation.correction`, and decomposed then."""
    adapts: bool = False
    """Whether `adapt` is asked for factors, once the maps before it have theirs: costs passes over all rows."""
    compares: bool = False
    """Whether `adapt` looks at what the map reads in the dense model, too, which costs as many passes again."""

    def eliminate(self, weight: torch.Tensor, statistics: MapStatistics) -> Elimination | None:
        """Order the channels that W [out, in] reads by what they matter, with errors in the unit of `decompose`.

        None: this initialiser does not say, and no channel is taken out.
        """
        return None

    @abstractmethod
    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        """Decompose W [out, in], weighted by ``statistics``, so that factors of every rank can be sliced."""

    def factors(
        self, weight: torch.Tensor, rank: int, decomposition: Decomposition, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, rank], A [rank, in]) from which training starts."""
        return decomposition.factors(weight, rank)

    def adapt(
        self, weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, seen: StudentStatistics
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Replace the factors B and A of W = ``weight`` [out, in] by others of the same rank, for the inputs ``seen``.

        The third is what goes onto the dense bias [out]; None: the bias stays as B and A had it.
        """
        return B, A, None
