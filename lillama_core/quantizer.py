"""Loading and saving through transformers: ``from_pretrained`` works once lillama_core is imported.

A compressed directory keeps its model type; ``quantization_config`` in its config.json says which modules are low
rank. On disk one matrix of each low-rank module has the name of the dense weight and another shape, so that a
transformers without lillama stops with an error instead of filling the maps with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama_core.errors import LillamaError
from lillama_core.maps import LinearSite
from lillama_core.models import QUANT_METHOD
from lillama_core.strategies import formats
from lillama_registry import registry

CONFIG_VERSION = 1


@dataclass(frozen=True)
class SiteConfig:
    """How one module is stored."""

    kind: str
    format: str
    rank: int

    @classmethod
    def parse(cls, name: str, entry: Any) -> SiteConfig:
        """Check an entry of a stranger's config; raises LillamaError."""
        if not isinstance(entry, Mapping) or set(entry) != {"kind", "format", "rank"}:
            raise LillamaError(f"low-rank config of {name!r} must have exactly 'kind', 'format' and 'rank'")
        kind, format_, rank = entry["kind"], entry["format"], entry["rank"]
        if kind != LinearSite.kind:
            raise LillamaError(f"{name!r} is a site of kind {kind!r}, which this version of lillama does not know")
        if not isinstance(format_, str) or format_ not in formats():
            raise LillamaError(
                f"{name!r} is stored in format {format_!r}; install the lillama plugin that provides it"
                f" (known: {', '.join(formats())})"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise LillamaError(f"the rank of {name!r} must be a positive whole number, not {rank!r}")
        return cls(kind, format_, rank)


class LillamaConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model: module path -> kind, format and rank."""

    def __init__(self, sites: Mapping[str, Any] | None = None, version: int = CONFIG_VERSION, **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        if version != CONFIG_VERSION:
            raise LillamaError(
                f"the model was compressed with config version {version!r}; this lillama reads {CONFIG_VERSION}"
            )
        if not isinstance(sites, Mapping):
            raise LillamaError("the quantization_config of a compressed model must list its 'sites'")
        self.version = version
        self.sites = {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in sites.items()}
        self.parsed = {name: SiteConfig.parse(name, entry) for name, entry in self.sites.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "version": self.version, "sites": self.sites}


class LillamaHfQuantizer(HfQuantizer):
    """Puts low-rank modules in place before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, site in self.quantization_config.parsed.items():
            path = own_path(model, name)
            if path is not None:
                _swap(model, path, site)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        for architecture in registry().architectures_for(model.config.model_type):
            architecture.adapt(model)
        loaded: nn.Module = model
        return loaded

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        return [*renamings(model, self.quantization_config), *weight_conversions]

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

    The base model without its head (AutoModel) has the same modules one level up. None when it has no such part.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    for path in (name, name.removeprefix(f"{prefix}.")):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def renamings(model: nn.Module, config: LillamaConfig) -> list[WeightRenaming]:
    """From the names on disk to those in memory, one for each low-rank module."""
    found = []
    for name, site in config.parsed.items():
        path = own_path(model, name)
        if path is not None:
            module = model.get_submodule(path)
            stored = formats()[site.format].stored_as_weight(module.out_features, module.in_features)  # type: ignore[arg-type]
            found.append(WeightRenaming(f"{path}.weight", f"{path}.{stored}.weight"))
    return found


def _swap(model: nn.Module, path: str, site: SiteConfig) -> None:
    dense = model.get_submodule(path)
    if not LinearSite.accepts(dense):
        raise LillamaError(f"{path!r} is a {type(dense).__name__}, not a linear map")
    place = LinearSite(path, dense)
    map_ = place.maps[0]
    if site.rank >= map_.full_rank:
        raise LillamaError(
            f"the rank of {path!r} is {site.rank}, which a [{map_.out_features}, {map_.in_features}] matrix cannot have"
        )
    weight = dense.weight
    assert isinstance(weight, torch.Tensor)
    module = formats()[site.format].module(
        map_.out_features,
        map_.in_features,
        site.rank,
        place.bias(model, map_) is not None,
        weight.dtype,
        str(weight.device),
    )
    place.replace(model, module.requires_grad_(weight.requires_grad))


def attach(model: Any, config: LillamaConfig) -> None:
    """Tell transformers that ``model``, whose modules are low rank already, is a compressed one: it can be saved."""
    quantizer = LillamaHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    # What loading would have found out: how the names in memory differ from those on disk.
    from transformers.conversion_mapping import get_model_conversion_mapping

    model._weight_conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer, add_legacy=False)


def register() -> None:
    """Make the format known to transformers; calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LillamaConfig)
        register_quantizer(QUANT_METHOD)(LillamaHfQuantizer)
