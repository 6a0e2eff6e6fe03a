"""Second moments of what goes into the maps and of the gradients that come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lillama_core.architecture import Block
from lillama_core.initialization import MapStatistics


class SecondMoment:
    """E[x x^T] over rows that arrive in batches, accumulated in fp32.

    On a CPU the product is made in tiles of the upper triangle: half the multiply-adds of the full one, at the
    speed of a large matrix product.
    """

    TILE = 384

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [tokens, d]."""
        rows = rows.detach().float()
        size = rows.shape[-1]
        if self.total is None:
            self.total = torch.zeros(size, size, device=rows.device)
        # Autocast would round the products to half precision, which leaves the small eigenvalues to chance.
        with torch.autocast(rows.device.type, enabled=False):
            if rows.device.type != "cpu" or size <= self.TILE:
                self.total.addmm_(rows.T, rows)
            else:
                for start in range(0, size, self.TILE):
                    stop = min(start + self.TILE, size)
                    self.total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.count += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """The moment [d, d], symmetric."""
        if self.total is None:
            raise ValueError("no rows were seen")
        if self.total.device.type != "cpu" or self.total.shape[0] <= self.TILE:
            return self.total / self.count
        upper = self.total.triu()
        return (upper + upper.triu(1).T) / self.count


class InputObserver:
    """Accumulates G = E[x x^T] for the maps of one block, once for maps that read the same tensor."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.moments: dict[str, SecondMoment] = {}
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[str, torch.Tensor]] = []

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """While open, every call of ``module``'s sites is observed."""
        handles = []
        for site in self.block.sites:

            def hook(_: nn.Module, inputs: tuple[Any, ...], site: Any = site) -> None:
                for name, rows in site.inputs(inputs).items():
                    self._observe(name, inputs[0], rows)

            handles.append(module.get_submodule(site.name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def next_batch(self) -> None:
        """Forget the tensors of the batch before: what follows cannot share with them."""
        self._seen.clear()

    def _observe(self, name: str, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        # The first call decides which maps read one tensor; only the first of them accumulates.
        leader = self._leader.setdefault(name, next((other for other, seen in self._seen if seen is tensor), name))
        if leader == name:
            self._seen.append((name, tensor))
            self.moments.setdefault(name, SecondMoment()).add(rows)

    def moment(self, name: str) -> torch.Tensor | None:
        """G of a map, or None if no token reached it."""
        found = self.moments.get(self._leader.get(name, name))
        return None if found is None or found.count == 0 else found.mean()


class GradientObserver:
    """Accumulates the second moments of the gradients at the maps' outputs and at the block's output."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.moments: dict[str, SecondMoment] = {m.name: SecondMoment() for m in block.maps}
        self.squares: dict[str, float] = dict.fromkeys(self.moments, 0.0)
        self.output = SecondMoment()

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """While open, gradients that flow back through ``module``'s sites are observed."""
        handles = []
        for site in self.block.sites:

            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any, site: Any = site) -> None:
                for map_ in site.maps:
                    tensor = site.outputs(output)[map_.name]
                    weight = site.weight(module, map_)
                    tensor.register_hook(lambda g, m=map_, w=weight: self._observe(m.name, g, w))

            handles.append(module.get_submodule(site.name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(self, name: str, gradient: torch.Tensor, weight: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        self.squares[name] += rows.square().sum().item()
        # See MapStatistics: on a map with more outputs than inputs W^T F W is smaller, and enough.
        if weight.shape[0] > weight.shape[1]:
            rows = rows @ weight.float()
        self.moments[name].add(rows)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors by name, ready for a file."""
        found = {"output": self.output.mean()}
        for map_ in self.block.maps:
            moment = self.moments[map_.name]
            if moment.count:
                found[f"gradients.{map_.name}"] = moment.mean()
                scale = self.squares[map_.name] / (moment.count * map_.out_features)
                found[f"scale.{map_.name}"] = torch.tensor(scale, dtype=torch.float64)
        return found


def map_statistics(
    name: str, inputs: torch.Tensor | None, gradients: dict[str, torch.Tensor], device: torch.device
) -> MapStatistics:
    """What an initialiser may see of one map, on ``device``."""
    scale, moment = gradients.get(f"scale.{name}"), gradients.get(f"gradients.{name}")
    return MapStatistics(
        None if inputs is None else inputs.to(device),
        None if moment is None else moment.to(device),
        0.0 if scale is None else float(scale.item()),
    )
