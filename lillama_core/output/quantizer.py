"""Loading and saving through transformers: ``from_pretrained`` works once lillama_core is imported.

A compressed directory keeps its model type; ``quantization_config`` in its config.json says which modules are low
rank. On disk one matrix of each low-rank module has the name of the dense weight and another shape, so that a
transformers without lillama stops with an error instead of filling the maps with random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Not from the package: it may be on its way to be imported, and this module a part of that.
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.experts import ExpertsTarget
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.quantized import hold
from lillama_core.errors import LillamaError
from lillama_core.formats.base import LowRankLinear, empty_linear
from lillama_core.models.source import QUANT_METHOD
from lillama_core.models.transformers_adapter import attach_quantizer, is_registered, mark_loaded, weight_renaming
from lillama_core.output.soundness import check_orders
from lillama_core.quantization.modules import QuantizedLinear
from lillama_core.quantization.packing import BITS, GROUP
from lillama_core.strategies import get, make, names
from lillama_registry import registry

CONFIG_VERSION = 1
QUANTIZED_VERSION = 2
"""Of a config that also says which weights are held in few bits: a lillama that does not know of it refuses."""
NARROW_VERSION = 3
"""Likewise of one that says which matrices have fewer rows or columns than those of the dense model."""
CAN_BE_NARROW = (LinearTarget.kind, ExpertsTarget.kind)
"""Kinds of target of which channels may have been taken out."""
VERSIONS = (CONFIG_VERSION, QUANTIZED_VERSION, NARROW_VERSION)


@dataclass(frozen=True)
class TargetConfig:
    """How one module is stored."""

    kind: str
    format: str
    """Empty where no map has a rank."""
    ranks: Mapping[str, int]
    """By the map's name within its target; empty for the only map of a target."""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(out, in) of the maps of which that is less than in the dense model, by the same names."""
    runs: int = 1
    """In how many runs of equal length the outputs of the only map lie, where each has become shorter."""

    @classmethod
    def parse(cls, name: str, entry: Any) -> TargetConfig:
        """Check an entry of an untrusted config; raise LillamaError for one that is not valid."""
        if not isinstance(entry, Mapping) or set(entry) - ({"runs"} if "shape" in entry else set()) not in (
            {"kind", "format", "rank"},
            {"kind", "format", "ranks"},
            {"kind", "format", "rank", "shape"},
            {"kind", "format", "ranks", "shapes"},
            {"kind", "shape"},
        ):
            raise LillamaError(
                f"low-rank config of {name!r} must have exactly 'kind', 'format' and 'rank' or 'ranks'; a 'shape' goes"
                " with 'rank', or with 'kind' alone, 'runs' with a 'shape', and 'shapes' with 'ranks'"
            )
        kind, format_ = entry["kind"], entry.get("format", "")
        if not isinstance(kind, str) or kind not in names("targets"):
            raise LillamaError(
                f"{name!r} is a target of kind {kind!r}; install the lillama plugin that provides it"
                f" (known: {', '.join(names('targets'))})"
            )
        if "format" in entry and (not isinstance(format_, str) or format_ not in names("formats")):
            raise LillamaError(
                f"{name!r} is stored in format {format_!r}; install the lillama plugin that provides it"
                f" (known: {', '.join(names('formats'))})"
            )
        ranks = {"": entry["rank"]} if "rank" in entry else entry.get("ranks", {})
        # None at all: experts that are dense, with a matrix for each map.
        if not isinstance(ranks, Mapping):
            raise LillamaError(f"the ranks of {name!r} must be a mapping of map to rank")
        for local, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise LillamaError(f"the rank of {joined(name, local)!r} must be a positive whole number, not {rank!r}")
        shapes = {"": entry["shape"]} if "shape" in entry else entry.get("shapes", {})
        if not isinstance(shapes, Mapping):
            raise LillamaError(f"the shapes of {name!r} must be a mapping of map to shape")
        parsed = {str(local): _shape(joined(name, str(local)), shape) for local, shape in shapes.items()}
        runs = entry.get("runs", 1)
        if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1 or any(s[0] % runs for s in parsed.values()):
            raise LillamaError(f"the runs of {name!r} must be a whole number that divides its rows, not {runs!r}")
        return cls(kind, format_, {str(k): v for k, v in ranks.items()}, parsed, runs)


def _shape(name: str, shape: Any) -> tuple[int, int]:
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    ):
        raise LillamaError(f"the shape of {name!r} must be two positive whole numbers, not {shape!r}")
    return shape[0], shape[1]


def target_entries(blocks: Iterable[Block], plan: RankPlan) -> dict[str, dict[str, Any]]:
    """Return the config's entry of every target that a plan makes smaller, by the path of its module."""
    found: dict[str, dict[str, Any]] = {}
    for block in blocks:
        shapes = plan.shapes_of(block)
        runs = {source.name: c.runs for c in block.channels for source in c.sources}
        for target in block.targets:
            names = {target.local_name(m): block.full_name(m) for m in target.maps}
            ranks = {local: plan.ranks[full] for local, full in names.items() if full in plan.ranks}
            smaller = {target.local_name(m): list(shapes[m.name]) for m in target.maps if m.name in shapes}
            entry: dict[str, Any] = {"kind": target.kind}
            if not ranks and not smaller:
                continue
            if set(names) != {""}:
                entry |= {"format": plan.format, "ranks": ranks, **({"shapes": smaller} if smaller else {})}
            else:
                entry |= {"format": plan.format, "rank": ranks[""]} if ranks else {}
                entry |= {"shape": smaller[""]} if smaller else {}
                entry |= {"runs": runs[target.name]} if smaller and runs.get(target.name, 1) > 1 else {}
            found[block.path_of(target.name)] = entry
    return found


def joined(path: str, local: str) -> str:
    """Return the path of a map from the path of its target."""
    return f"{path}.{local}" if local else path


class LillamaConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model: module path -> kind, format and rank; and what is in few bits."""

    def __init__(
        self,
        sites: Mapping[str, Any] | None = None,
        version: int = CONFIG_VERSION,
        quantization: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        if version not in VERSIONS:
            raise LillamaError(
                f"the model was compressed with config version {version!r}; this lillama reads"
                f" {', '.join(map(str, VERSIONS))}"
            )
        if not isinstance(sites, Mapping):
            raise LillamaError("the quantization_config of a compressed model must list its 'sites'")
        self.targets = {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in sites.items()}
        self.parsed = {name: TargetConfig.parse(name, entry) for name, entry in self.targets.items()}
        self.bits = {} if quantization is None else parse_bits(quantization)
        """Path of a module -> the bits that its weight is held in."""
        self.version = QUANTIZED_VERSION if self.bits else CONFIG_VERSION
        if any(entry.shapes for entry in self.parsed.values()):
            self.version = NARROW_VERSION

    def to_dict(self) -> dict[str, Any]:
        said = {"quant_method": self.quant_method, "version": self.version, "sites": self.targets}
        return {**said, "quantization": bits_entry(self.bits)} if self.bits else said


def bits_entry(bits: Mapping[str, int]) -> dict[str, Any]:
    """The config's entry of what is held in few bits: by the number of bits, the paths of the modules."""
    return {"group": GROUP, "bits": {str(b): [p for p, own in bits.items() if own == b] for b in BITS}}


def parse_bits(entry: Any) -> dict[str, int]:
    """Check such an entry of an untrusted config; raise LillamaError for one that is not valid."""
    named = entry.get("bits") if isinstance(entry, Mapping) else None
    if not isinstance(named, Mapping) or entry.get("group") != GROUP:
        raise LillamaError(f"the 'quantization' of a quantised model must have 'bits', and a 'group' of {GROUP}")
    found: dict[str, int] = {}
    for bits, paths in named.items():
        if str(bits) not in map(str, BITS) or not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            raise LillamaError(
                f"weights are held in {' or '.join(map(str, BITS))} bits, by lists of paths, not {bits!r}"
            )
        found |= dict.fromkeys(paths, int(bits))
    return found


class LillamaHfQuantizer(HfQuantizer):
    """Puts low-rank modules in place before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, target in self.quantization_config.parsed.items():
            path = own_path(model, name)
            if path is not None:
                _swap(model, path, target)
        for name, bits in self.quantization_config.bits.items():
            path = own_path(model, name)
            if path is not None:
                hold(model, path, bits, lambda weight, packing: packing.empty(weight.device))
        # All of these come from the files, and a model's rules for the layers that they replace do not fit them.
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                for part in module.modules():
                    mark_loaded(part)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        check_orders(model)
        for architecture in registry().architectures_for(model.config.model_type):
            architecture.adapt(model)
        # Weights that are converted to another dtype are copies. Integers are not converted: as views of the mapped
        # file they would keep all of it in memory beside the copies.
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_floating_point():
                    setattr(module, name, buffer.clone())
        # The weights are plain numbers: ``half`` and ``float`` need not be refused.
        model.is_quantized = False
        loaded: nn.Module = model
        return loaded

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        # Last on loading, first on saving: a family may have names of its own on disk, and ours start from those that
        # the modules have in memory.
        return [*weight_conversions, *renamings(model, self.quantization_config)]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def own_path(model: nn.Module, name: str) -> str | None:
    """``name``, a path from the model that was compressed, as a path from ``model``.

    The base model without its head (AutoModel) has the same modules one level up, and one that gets a head, to be
    fine-tuned, one level down. None when it has no such part.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    for path in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def renamings(model: nn.Module, config: LillamaConfig) -> list[Any]:
    """From the names on disk to those in memory, where they differ."""
    found = []
    prefix = str(getattr(model, "base_model_prefix", ""))
    for name, entry in config.parsed.items():
        path = own_path(model, name)
        # A linear layer that is smaller alone keeps its name.
        if path is not None and entry.format:
            target = get("targets", entry.kind).at(path, model.get_submodule(path))
            ranks = {joined(path, local): rank for local, rank in entry.ranks.items()}
            pairs = target.renamings(model, ranks, make("formats", entry.format))
            if path == f"{prefix}.{name}":
                # transformers adds the prefix to names on disk after they are renamed.
                pairs = [(a.removeprefix(f"{prefix}."), b.removeprefix(f"{prefix}.")) for a, b in pairs]
            found += [_as_packed(model, *pair) for pair in pairs]
    sites = tuple(f"{path}." for name in config.parsed if (path := own_path(model, name)) is not None)
    for name in config.bits:
        path = own_path(model, name)
        if path is None or path.startswith(sites) or not isinstance(model.get_submodule(path), QuantizedLinear):
            # What is within a low-rank map has no name of the dense model's, and a table keeps its own.
            continue
        pair = (f"{path}.weight", f"{path}.packed")
        if path == f"{prefix}.{name}":
            pair = (pair[0].removeprefix(f"{prefix}."), pair[1].removeprefix(f"{prefix}."))
        found.append(weight_renaming(*pair))
    return found


def _as_packed(model: nn.Module, on_disk: str, in_memory: str) -> Any:
    """A renaming, to the bytes where the matrix in memory is held in few bits."""
    module = in_memory.removesuffix(".weight")
    path = own_path(model, module)
    packed = path is not None and isinstance(model.get_submodule(path), QuantizedLinear)
    return weight_renaming(on_disk, f"{module}.packed" if packed else in_memory)


def _swap(model: nn.Module, path: str, entry: TargetConfig) -> None:
    target = get("targets", entry.kind).at(path, model.get_submodule(path))
    if entry.format and not entry.ranks:
        target.separate(model)
    if entry.shapes:
        _narrow(model, path, target, entry)
        target = get("targets", entry.kind).at(path, model.get_submodule(path))
    if not entry.ranks:
        return
    target.check(make("formats", entry.format))
    maps = {m.name: m for m in target.maps}
    layers: dict[str, nn.Module] = {}
    for local, rank in entry.ranks.items():
        map_ = maps.get(joined(path, local))
        if map_ is None:
            raise LillamaError(f"{path!r} has no map {local!r}; the config is of another model")
        if rank >= map_.full_rank:
            raise LillamaError(
                f"the rank of {map_.name!r} is {rank}, which a [{map_.out_features}, {map_.in_features}] matrix"
                " cannot have"
            )
        weight, bias = target.weight(model, map_), target.bias(model, map_)
        layers[map_.name] = (
            make("formats", entry.format)
            .module(map_.out_features, map_.in_features, rank, bias is not None, weight.dtype, str(weight.device))
            .requires_grad_(weight.requires_grad)
        )
    target.replace(model, layers)


def _narrow(model: nn.Module, path: str, target: TargetModule, entry: TargetConfig) -> None:
    """Put linear layers of the ``shapes`` of ``entry`` in the places of larger ones."""
    if target.kind not in CAN_BE_NARROW:
        (first, *_) = entry.shapes.values()
        raise LillamaError(f"{path!r} is a target of kind {target.kind!r}, and cannot have the shape {list(first)}")
    maps = {target.local_name(m): m for m in target.maps}
    layers: dict[str, nn.Module] = {}
    for local, shape in entry.shapes.items():
        name, map_ = joined(path, local), maps.get(local)
        if map_ is None:
            raise LillamaError(f"{path!r} has no map {local!r}; the config is of another model")
        full = (map_.out_features, map_.in_features)
        if shape == full or any(n > most for n, most in zip(shape, full, strict=True)):
            raise LillamaError(f"{name!r} cannot have the shape {list(shape)}: it has to be smaller than {list(full)}")
        if full[0] % entry.runs:
            raise LillamaError(f"{name!r} has {full[0]} rows, which are not {entry.runs} runs")
        weight, bias = target.weight(model, map_), target.bias(model, map_)
        layer = empty_linear(shape[1], shape[0], bias is not None, weight.dtype, str(weight.device))
        layers[map_.name] = layer.requires_grad_(weight.requires_grad)
    target.replace(model, layers)


def narrow_paths(model: Any) -> list[str]:
    """Paths of the linear layers of a compressed model that have fewer rows or columns than in the dense one."""
    found: list[str] = []
    for name, entry in model.hf_quantizer.quantization_config.parsed.items():
        if entry.shapes:
            target = get("targets", entry.kind).at(name, model.get_submodule(name))
            own = ((m, target.local_name(m)) for m in target.maps)
            found += [target.path_of(m) for m, local in own if local in entry.shapes and local not in entry.ranks]
    return found


def attach(model: Any, config: LillamaConfig) -> None:
    """Tell transformers that ``model``, whose modules are low rank already, is a compressed one: it can be saved."""
    attach_quantizer(model, LillamaHfQuantizer(config, pre_quantized=True), config)


def register() -> None:
    """Make the format known to transformers; calling it again does nothing."""
    # Looked up anew: whoever reloads transformers' table has a new one.
    if not is_registered(QUANT_METHOD):
        auto.register_quantization_config(QUANT_METHOD)(LillamaConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(LillamaHfQuantizer)


register()
