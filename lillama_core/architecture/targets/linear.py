"""Linear layers as targets: ``nn.Linear``, and the ``Conv1D`` of transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture.targets.base import OnRows, TargetModule, make_hook
from lillama_core.architecture.targets.channels import filled
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear, matches_any
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format, LowRankLinear, dense_weight
from lillama_core.runtime.modules import shared_copy


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D stores its weight [in, out]. Told by its attributes, since transformers is slow to import.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


@functools.cache
def _computes_the_same(kind: type[nn.Linear]) -> bool:
    """Whether a subclass says in a ``forward`` of its own what ``nn.Linear`` says, of its weight and bias alone.

    Its ``forward`` is run on small layers that are no more than an ``nn.Linear``: what needs anything else, or gives
    anything else, is another map. One that inherits ``forward`` may be there to be read instead of called.
    """
    if "forward" not in kind.__dict__:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        for bias in (True, False):
            plain = nn.utils.skip_init(nn.Linear, 5, 3, bias=bias, dtype=torch.float64)
            for parameter in plain.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            # Rows of several sizes: what rounds or clips shows in one of them.
            for shape, scale in (((2, 4, 5), 1.0), ((7, 5), 1e3), ((5,), 1e-3)):
                x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
                try:
                    found = kind.forward(plain, x)
                except Exception:  # whatever a model's own code raises
                    return False
                expected = functional.linear(x, plain.weight, plain.bias)
                if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
                    return False
                if not torch.allclose(found, expected, rtol=1e-9, atol=1e-12):
                    return False
    return True


def _is_linear(module: nn.Module) -> bool:
    kind: Any = type(module)
    if kind is nn.Linear:
        return True
    # A subclass may compute something else from its weight, or hold something else.
    held = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return isinstance(module, nn.Linear) and held <= {"weight", "bias"} and _computes_the_same(kind)


class LinearTarget(TargetModule):
    """A module that is one linear map: ``nn.Linear``, or transformers' ``Conv1D`` with its transposed weight."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        if isinstance(module, LowRankLinear):
            out_features, in_features = module.out_features, module.in_features
        else:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            out_features, in_features = reversed(weight.shape) if _is_conv1d(module) else weight.shape
        super().__init__(name, (TargetLinear(name, out_features, in_features),))

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` is a dense linear map of this kind."""
        return _is_linear(module) or _is_conv1d(module)

    @classmethod
    def at(cls, name: str, module: nn.Module) -> LinearTarget:
        if not cls.accepts(module) and not isinstance(module, LowRankLinear):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a linear map")
        return cls(name, module)

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        module = block.get_submodule(self.name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if _is_conv1d(module) else weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        bias = getattr(block.get_submodule(self.name), "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        (map_,) = self.maps

        handle = block.get_submodule(self.name).register_forward_hook(make_hook(map_, on_input, on_output))
        try:
            yield
        finally:
            handle.remove()

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        if self.name in layers:
            parent, _, child = self.name.rpartition(".")
            setattr(block.get_submodule(parent), child, layers[self.name])

    def rewritten(self, block: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """Return a copy of the dense module with W [out, in] and the bias [out], if it has one, in place of its own."""
        layer = shared_copy(block.get_submodule(self.name))
        layer.weight = nn.Parameter((weight.T if _is_conv1d(layer) else weight).contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(self.name)

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        weight, bias = dense_weight(self.layer(block, self.maps[0])), self.bias(block, self.maps[0])
        whole = dense.get_submodule(self.name)
        (map_,) = LinearTarget(self.name, whole).maps
        # Of channels that were taken out nothing comes, and nothing is read.
        weight = filled(filled(weight, map_.out_features, self.runs).T, map_.in_features).T
        found = {f"{self.name}.weight": weight.T if _is_conv1d(whole) else weight}
        if bias is not None:
            found[f"{self.name}.bias"] = filled(bias.detach(), map_.out_features, self.runs)
        return found

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        (map_,) = self.maps
        stored = format_.stored_as_weight(map_.out_features, map_.in_features)
        return [(f"{self.name}.weight", f"{self.name}.{stored}.weight")]


def plain_modules(block: nn.Module) -> frozenset[str]:
    """Paths of the modules in a block in which all weights are those of linear layers."""
    mixed: set[str] = set()
    for name, module in block.named_modules():
        if not LinearTarget.accepts(module) and any(True for _ in module.parameters(recurse=False)):
            parts = name.split(".")
            mixed |= {".".join(parts[:end]) for end in range(len(parts) + 1)}
    return frozenset(name for name, _ in block.named_modules() if name not in mixed)


def linear_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """The linear modules of a block in module order.

    ``only`` and ``exclude`` hold paths from the block; a ``*`` in them matches one path component. With
    ``only`` empty every linear module of the block is a target; ``choice.include`` adds to them, ``choice.exclude``
    wins.
    """
    choice = choice or MapChoice()

    def wanted(name: str) -> bool:
        own = (not only or matches_any(name, only)) and not matches_any(name, exclude)
        return (own or matches_any(name, choice.include)) and not matches_any(name, choice.exclude)

    return [LinearTarget(n, m) for n, m in block.named_modules() if LinearTarget.accepts(m) and wanted(n)]
