"""How transformers' Mamba mixers run: through their modules where a map is low rank, with the faster scan on a CPU.

In training mode a mixer first offers its weights to mamba-ssm's fused kernel, ``mamba_inner_fn``: ``x_proj`` and
``out_proj`` are then never called. That kernel knows dense matrices only; each step would multiply the factors out,
and adapters or hooks on a factor would be passed over. The way that a mixer goes in eval mode calls every map as a
module, between mamba-ssm's kernels for the convolution and the scan, which have a backward pass.

Those kernels know CUDA alone, and transformers calls them, where they are installed, on any device: a model that was
compressed on a GPU is written and looked at on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_mambapy_available

from lillama_core.formats import LowRankLinear

KERNELS = (
    *("causal_conv1d_fn", "causal_conv1d_update", "mamba_inner_fn"),
    *("mamba_selective_scan", "mamba_selective_state_update"),
)
"""What the mixers' modules call functions that a package may have replaced."""


def call_maps_as_modules(model: nn.Module) -> None:
    """Make every mixer of ``model`` choose its way anew at each call; maps may become low rank later."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "mixer":
            module.register_forward_pre_hook(_choose_way)
            keep_kernels_on_cuda(sys.modules[type(module).__module__])


def keep_kernels_on_cuda(module: Any) -> None:
    """Make the functions of transformers' ``module`` that are kernels go torch's way with tensors on a CPU."""
    if not any(importlib.util.find_spec(package) for package in ("mamba_ssm", "causal_conv1d")):
        return
    for name in KERNELS:
        kernel = getattr(module, name, None)
        if kernel is None or isinstance(kernel, _ByDevice):
            continue
        plain = inspect.unwrap(kernel)
        if plain is not kernel:
            setattr(module, name, _ByDevice(kernel, plain))


class _ByDevice:
    """A function that calls ``plain`` for a first argument on a CPU, and ``kernel`` for any other."""

    def __init__(self, kernel: Callable[..., Any], plain: Callable[..., Any]) -> None:
        functools.update_wrapper(self, kernel)
        self._kernel, self._plain = kernel, plain

    def __call__(self, first: torch.Tensor, *args: Any, **options: Any) -> Any:
        function = self._plain if first.device.type == "cpu" else self._kernel
        return function(first, *args, **options)


def _choose_way(mixer: Any, args: tuple[Any, ...]) -> None:
    # The mixer's own flag decides about the fused kernel and nothing else; its modules keep theirs.
    if mixer.training and any(isinstance(child, LowRankLinear) for child in mixer.children()):
        mixer.training = False
    # Without mamba-ssm the scan is a loop over positions. At 512 positions on two cores (width 256, 4 blocks)
    # mambapy's parallel scan took 111 ms forward where the loop took 187, and 0.32 s forward and backward where it
    # took 5.6. It needs fp32; a compiled model has torch's own parallel scan. The config, which is saved, stays.
    hidden: torch.Tensor = args[0]
    mixer.use_mambapy = mixer.config.use_mambapy or (
        is_mambapy_available()
        and hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and not torch.compiler.is_compiling()
    )
