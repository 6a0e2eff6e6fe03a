"""Linear maps: the matrices W [out, in] inside a model, wherever they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LinearMap:
    """One matrix W [out_features, in_features] inside a block, and the site that holds it."""

    name: str
    """Path from the block: ``mlp.up_proj``."""
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Parameters of the dense matrix, its bias left out (a bias stays as it is in every format)."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """The largest rank that a product of factors can have."""
        return min(self.out_features, self.in_features)


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D stores its weight [in, out]; matched by shape of its interface, imported late
    # because transformers is slow to import.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


class LinearSite:
    """A module that is one linear map: ``nn.Linear``, or transformers' ``Conv1D`` with its transposed weight.

    A site is what gets swapped. It lists its maps, reads their weights, shows the rows that they multiply,
    and makes place for the replacement. Other kinds of site (an input group, fused experts) offer the same
    methods over several maps.
    """

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.transposed = _is_conv1d(module)
        rows, columns = weight.shape
        out_features, in_features = (columns, rows) if self.transposed else (rows, columns)
        self.maps = (LinearMap(name, out_features, in_features),)

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` is a linear map of this kind."""
        # Exactly nn.Linear: a subclass may compute something else from its weight.
        return type(module) is nn.Linear or _is_conv1d(module)

    def weight(self, block: nn.Module, map_: LinearMap) -> torch.Tensor:
        """W [out, in] of ``map_``, a view on the block's parameter."""
        weight = block.get_submodule(self.name).weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if self.transposed else weight

    def bias(self, block: nn.Module, map_: LinearMap) -> torch.Tensor | None:
        """The bias [out] added to the map's output, or None."""
        bias = getattr(block.get_submodule(self.name), "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    def inputs(self, call_inputs: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        """Rows [tokens, in] that each map multiplies, from the positional inputs of one call of the module."""
        rows = call_inputs[0]
        return {self.maps[0].name: rows.reshape(-1, rows.shape[-1])}

    def outputs(self, call_output: Any) -> dict[str, torch.Tensor]:
        """The output of each map [..., out] within the output of one call of the module."""
        return {self.maps[0].name: call_output}

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        """Put ``replacement`` in the module's place."""
        parent, _, child = self.name.rpartition(".")
        setattr(block.get_submodule(parent), child, replacement)


def find_sites(block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[LinearSite]:
    """The linear sites of a block in module order.

    ``only`` and ``exclude`` hold paths from the block; a ``*`` in them matches one path component. With
    ``only`` empty every linear module of the block is a site.
    """
    return [
        LinearSite(name, module)
        for name, module in block.named_modules()
        if LinearSite.accepts(module)
        and (not only or any(path_matches(name, pattern) for pattern in only))
        and not any(path_matches(name, pattern) for pattern in exclude)
    ]


def path_matches(path: str, pattern: str) -> bool:
    """Whether a dotted path equals a pattern in which ``*`` stands for one component."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))
