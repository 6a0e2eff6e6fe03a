"""Sites: the modules that are swapped. A site lists its maps, reads and watches them, and takes their replacements."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, LowRankLinear
from lillama_core.maps import LinearMap, MapChoice, matches_any

OnRows = Callable[[LinearMap, torch.Tensor], None]
"""Receives a map and rows [..., in] that it multiplies, or its output [..., out]."""


class Site(ABC):
    """One module of a block with the maps that it holds, dense or low rank.

    ``block`` in the methods is the module that the site's name starts from: a block, or a whole model when the
    name is a path from there.
    """

    kind: str
    """How the site is called in the config of a compressed model."""

    def __init__(self, name: str, maps: tuple[LinearMap, ...]) -> None:
        self.name = name
        self.maps = maps

    @classmethod
    @abstractmethod
    def at(cls, name: str, module: nn.Module) -> Site:
        """The site for ``module``, dense or low rank already; raises LillamaError when it is of another kind."""

    @abstractmethod
    def weight(self, block: nn.Module, map_: LinearMap) -> torch.Tensor:
        """W [out, in] of ``map_`` while dense, a view on the block's parameter."""

    @abstractmethod
    def bias(self, block: nn.Module, map_: LinearMap) -> torch.Tensor | None:
        """The bias [out] added to the map's output, or None; dense or low rank."""

    @abstractmethod
    def watching(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """While open, the rows that each dense map multiplies are shown, and its outputs, as part of the graph.

        Maps that read the same tensor are shown the same object.
        """

    @abstractmethod
    def put(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Put low-rank modules in the place of the maps named, which may be low rank already; others stay."""

    @abstractmethod
    def layer(self, block: nn.Module, map_: LinearMap) -> nn.Module:
        """What ``put`` has put in the place of ``map_``."""

    @abstractmethod
    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        """Names of tensors (on disk, in memory) that differ, as paths from ``block``.

        At least one name on disk must be that of a dense parameter whose shape is another, so that a loader which
        does not know the format stops with an error instead of filling the maps with random numbers.
        """

    def check(self, format_: Format) -> None:  # noqa: B027  most sites take any format
        """Raise UserError when the site's maps cannot be stored in ``format_``."""

    def local_name(self, map_: LinearMap) -> str:
        """The map's name within its site; empty for the site's only map."""
        return map_.name.removeprefix(self.name).removeprefix(".")


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D stores its weight [in, out]; matched by shape of its interface, imported late
    # because transformers is slow to import.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def showing(map_: LinearMap, on_input: OnRows | None, on_output: OnRows | None) -> Callable[..., None]:
    """A forward hook for a module that multiplies its first input by ``map_``."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if on_input is not None:
            on_input(map_, inputs[0])
        if on_output is not None:
            on_output(map_, output)

    return hook


class LinearSite(Site):
    """A module that is one linear map: ``nn.Linear``, or transformers' ``Conv1D`` with its transposed weight."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        if isinstance(module, LowRankLinear):
            out_features, in_features = module.out_features, module.in_features
        else:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            out_features, in_features = reversed(weight.shape) if _is_conv1d(module) else weight.shape
        super().__init__(name, (LinearMap(name, out_features, in_features),))

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` is a dense linear map of this kind."""
        # Exactly nn.Linear: a subclass may compute something else from its weight.
        return type(module) is nn.Linear or _is_conv1d(module)

    @classmethod
    def at(cls, name: str, module: nn.Module) -> LinearSite:
        if not cls.accepts(module) and not isinstance(module, LowRankLinear):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a linear map")
        return cls(name, module)

    def weight(self, block: nn.Module, map_: LinearMap) -> torch.Tensor:
        module = block.get_submodule(self.name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if _is_conv1d(module) else weight

    def bias(self, block: nn.Module, map_: LinearMap) -> torch.Tensor | None:
        bias = getattr(block.get_submodule(self.name), "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    @contextlib.contextmanager
    def watching(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        (map_,) = self.maps

        handle = block.get_submodule(self.name).register_forward_hook(showing(map_, on_input, on_output))
        try:
            yield
        finally:
            handle.remove()

    def put(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        if self.name in layers:
            parent, _, child = self.name.rpartition(".")
            setattr(block.get_submodule(parent), child, layers[self.name])

    def layer(self, block: nn.Module, map_: LinearMap) -> nn.Module:
        return block.get_submodule(self.name)

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        (map_,) = self.maps
        stored = format_.stored_as_weight(map_.out_features, map_.in_features)
        return [(f"{self.name}.weight", f"{self.name}.{stored}.weight")]


def linear_sites(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[Site]:
    """The linear modules of a block in module order.

    ``only`` and ``exclude`` hold paths from the block; a ``*`` in them matches one path component. With
    ``only`` empty every linear module of the block is a site; ``choice.include`` comes on top, ``choice.exclude`` wins.
    """
    choice = choice or MapChoice()

    def wanted(name: str) -> bool:
        own = (not only or matches_any(name, only)) and not matches_any(name, exclude)
        return (own or matches_any(name, choice.include)) and not matches_any(name, choice.exclude)

    return [LinearSite(n, m) for n, m in block.named_modules() if LinearSite.accepts(m) and wanted(n)]


KINDS: dict[str, type[Site]] = {LinearSite.kind: LinearSite}
"""Kinds of site that a compressed model's config may name; `lillama_core.experts` adds its own."""
