"""Convolutions as targets, on request: each is one linear map of the patches that its kernel meets.

A convolution of C channels with a kernel of k positions multiplies its weight [out, C k] by every patch [C k] that the
kernel is laid on, and adds its bias. With a kernel of one position a patch is a position of the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture.targets.base import OnRows, TargetModule
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, is_asked_for
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, dense_weight

Convolution = nn.Conv1d | nn.Conv2d


class PatchLinear(nn.Module):
    """A linear map, dense or low rank, of the patches of a convolution: [N, C, *positions] -> [N, out, *positions]."""

    def __init__(self, convolution: Convolution, map_: nn.Module) -> None:
        super().__init__()
        self.geometry = geometry_of(convolution)
        self.map = map_

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return positions_of(self.map(patches_of(x, self.geometry)), x, self.geometry)


Geometry = dict[str, tuple[int, ...]]
"""``kernel_size``, ``dilation``, ``padding`` and ``stride``, with as many numbers as there are axes of positions."""


def geometry_of(convolution: Convolution) -> Geometry:
    """What of a convolution is no weight."""
    names = ("kernel_size", "dilation", "padding", "stride")
    return {name: tuple(int(n) for n in getattr(convolution, name)) for name in names}


def patches_of(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The patches [N, L, C k] of ``x`` [N, C, *positions]; a view on it where the kernel is a single position."""
    if all(set(numbers) == {0 if name == "padding" else 1} for name, numbers in geometry.items()):
        return x.flatten(2).transpose(1, 2)
    if x.dim() == 3:
        # unfold takes two axes of positions.
        x = x.unsqueeze(2)
        geometry = {name: (0 if name == "padding" else 1, *numbers) for name, numbers in geometry.items()}
    found: torch.Tensor = functional.unfold(x, **geometry)
    return found.transpose(1, 2)


def positions_of(rows: torch.Tensor, x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """What belongs to the patches of ``x``, [N, L, out], laid out as the convolution gives it: [N, out, *positions]."""
    columns = zip(x.shape[2:], *geometry.values(), strict=True)
    sizes = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k, dilation, padding, stride in columns]
    return rows.transpose(1, 2).unflatten(2, sizes)


class ConvolutionTarget(TargetModule):
    """``nn.Conv1d`` or ``nn.Conv2d`` of one group, whose padding are zeros: one map W [out, C k]."""

    kind = "convolution"

    def __init__(self, name: str, module: nn.Module) -> None:
        if isinstance(module, PatchLinear):
            inner: Any = module.map
            shape, geometry = (inner.out_features, inner.in_features), module.geometry
        else:
            assert isinstance(module, Convolution)
            weight = module.weight
            shape, geometry = (weight.shape[0], weight[0].numel()), geometry_of(module)
        super().__init__(name, (TargetLinear(name, *shape, token_fraction=1 / prod(geometry["stride"])),))

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` is a dense convolution that is one linear map of its patches."""
        # Exactly these classes: a subclass may compute something else from its weight. Padding may be a word.
        return (
            type(module) in (nn.Conv1d, nn.Conv2d)
            and isinstance(module, Convolution)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    @classmethod
    def at(cls, name: str, module: nn.Module) -> ConvolutionTarget:
        if not cls.accepts(module) and not isinstance(module, PatchLinear):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a convolution of one group")
        return cls(name, module)

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module: Any = block.get_submodule(self.name)
        inner: Any = module.map if isinstance(module, PatchLinear) else module
        weight: torch.Tensor = inner.weight.flatten(1)
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        module: Any = block.get_submodule(self.name)
        bias = getattr(module.map if isinstance(module, PatchLinear) else module, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        (map_,) = self.maps

        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            geometry = geometry_of(module)
            if on_input is not None:
                on_input(map_, patches_of(inputs[0], geometry))
            if on_output is None:
                return None
            # What goes on is made of the rows that are shown: the gradient at them is the one at the output.
            rows = output.flatten(2).transpose(1, 2)
            on_output(map_, rows)
            return positions_of(rows, inputs[0], geometry)

        handle = block.get_submodule(self.name).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        if self.name not in layers:
            return
        module: Any = block.get_submodule(self.name)
        if isinstance(module, PatchLinear):
            module.map = layers[self.name]
        else:
            block.set_submodule(self.name, PatchLinear(module, layers[self.name]).train(module.training))

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(f"{self.name}.map")

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        shape = dense.get_parameter(f"{self.name}.weight").shape
        found = {f"{self.name}.weight": dense_weight(self.layer(block, self.maps[0])).reshape(shape)}
        bias = self.bias(block, self.maps[0])
        return found if bias is None else {**found, f"{self.name}.bias": bias.detach()}

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # A matrix where the dense convolution has one axis more, or two.
        (map_,) = self.maps
        stored = format_.stored_as_weight(map_.out_features, map_.in_features)
        return [(f"{self.name}.weight", f"{self.name}.map.{stored}.weight")]


def convolution_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """The convolutions of a block that ``only`` or ``choice.include`` name, in module order; never any others.

    ``exclude`` and ``choice.exclude`` as in `linear_targets`.
    """
    named = (only, exclude, choice or MapChoice())
    found = [(n, m) for n, m in block.named_modules() if ConvolutionTarget.accepts(m)]
    return [ConvolutionTarget(n, m) for n, m in found if is_asked_for(n, *named)]
