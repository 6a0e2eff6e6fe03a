"""Mamba and Falcon-Mamba on the CPU fast enough to train: transformers' modules and weights, a compiled scan.

transformers runs the recurrence of its mixer one position at a time in Python, and keeps every state for the backward
pass. Here the convolution and the scan (Gu & Dao 2023, Algorithm 2) are C++ (``scan.cpp``, built by ``g++`` on first
use into the cache), and the matrix products run in bfloat16 where autocast is on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.errors import UserError
from lillama_core.system.cache import default_cache_dir

SOURCE = Path(__file__).with_name("scan.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-mprefer-vector-width=512")
LINKED = ("-shared", "-fopenmp")
"""Without -ffast-math: a library that is linked with it lets the whole process round small numbers to zero."""


@functools.cache
def library(states: int) -> ctypes.CDLL:
    """The compiled kernels for a state of ``states`` numbers a channel; raises UserError without a compiler."""
    command = ["g++", *FLAGS, f"-DSTATES={states}", "-c", str(SOURCE)]
    # -march=native: what was built for another processor must not be loaded here.
    host = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").is_file() else ""
    flags = next((line for line in host.splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256(f"{command[:-1]} {LINKED} {SOURCE.read_text()} {flags}".encode()).hexdigest()[:16]
    path = default_cache_dir() / "zoo" / f"scan-{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, built = Path(folder) / "scan.o", Path(folder) / path.name
            try:
                for words in ([*command, "-o", str(compiled)], ["g++", *LINKED, str(compiled), "-o", str(built)]):
                    subprocess.run(words, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise UserError("training a Mamba needs the compiler g++, which is not installed") from None
            except subprocess.CalledProcessError as error:
                raise UserError(f"g++ could not build {SOURCE.name}: {error.stderr.strip().splitlines()[0]}") from None
            os.replace(built, path)
    return ctypes.CDLL(str(path))


def _call(name: str, states: int, tensors: list[torch.Tensor], shape: torch.Size) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
    pointers = [ctypes.cast(t.data_ptr(), ctypes.POINTER(ctypes.c_float)) for t in tensors]
    getattr(library(states), name)(*pointers, *(ctypes.c_int(s) for s in shape))


class _ConvSilu(torch.autograd.Function):
    """silu of a causal depthwise convolution: x [batch, length, channels], weight [taps, channels], bias [channels]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, states: int) -> torch.Tensor:
        u = torch.empty_like(x)
        _call("conv_forward", states, [x, weight, bias, u], x.shape)
        ctx.save_for_backward(x, weight, bias)
        ctx.states = states
        return u

    @staticmethod
    def backward(ctx: Any, d_u: torch.Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        d_x = torch.empty_like(x)
        d_weight = x.new_zeros(x.shape[0], *weight.shape)
        d_bias = x.new_zeros(x.shape[0], *bias.shape)
        _call("conv_backward", ctx.states, [x, weight, bias, d_u.contiguous(), d_x, d_weight, d_bias], x.shape)
        return d_x, d_weight.sum(0), d_bias.sum(0), None


class _Scan(torch.autograd.Function):
    """Gated selective scan; dt, u, z [batch, length, channels], A [states, channels], B, C [batch, length, states]."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(inputs[0])
        _call("scan_forward", inputs[4].shape[0], [*inputs, out], out.shape)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        inputs = ctx.saved_tensors
        dt, bias, u, z, A, B, C, D = inputs
        batch = dt.shape[0]
        d_bias, d_D = dt.new_empty(batch, *bias.shape), dt.new_empty(batch, *D.shape)
        d_A, d_B, d_C = dt.new_empty(batch, *A.shape), torch.zeros_like(B), torch.zeros_like(C)
        d_dt, d_u, d_z = torch.empty_like(dt), torch.empty_like(u), torch.empty_like(z)
        gradients = [d_dt, d_bias, d_u, d_z, d_A, d_B, d_C, d_D]
        _call("scan_backward", A.shape[0], [*inputs, d_out.contiguous(), *gradients], dt.shape)
        return d_dt, d_bias.sum(0), d_u, d_z, d_A.sum(0), d_B, d_C, d_D.sum(0)


def mixer_forward(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """transformers' MambaMixer or FalconMambaMixer on x [batch, length, width] without a cache or padding."""
    m: Any = mixer
    channels, states = m.intermediate_size, m.ssm_state_size
    stream = functional.linear(x, m.in_proj.weight[:channels]).float()
    gate = functional.linear(x, m.in_proj.weight[channels:]).float()
    u = _ConvSilu.apply(stream, m.conv1d.weight.squeeze(1).t().contiguous(), m.conv1d.bias, states)
    dt, B, C = m.x_proj(u).float().split([m.time_step_rank, states, states], dim=-1)
    if hasattr(m, "dt_layernorm"):
        dt, B, C = m.dt_layernorm(dt), m.b_layernorm(B), m.c_layernorm(C)
    dt = functional.linear(dt, m.dt_proj.weight).float()
    A = -torch.exp(m.A_log.t()).contiguous()
    out = _Scan.apply(dt, m.dt_proj.bias, u, gate, A, B.contiguous(), C.contiguous(), m.D)
    return m.out_proj(out).float()


def features(model: nn.Module, tokens: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """The normalised output of the last block, [batch, length, width], of a Mamba or Falcon-Mamba language model.

    ``dropout`` falls on the embedding and on what each block adds to the stream; transformers' model has none.
    """
    backbone: Any = model.backbone
    hidden = functional.dropout(backbone.embeddings(tokens).float(), dropout, model.training)
    for block in backbone.layers:
        hidden = hidden + functional.dropout(mixer_forward(block.mixer, block.norm(hidden)), dropout, model.training)
    return backbone.norm_f(hidden)


def logits(model: nn.Module, tokens: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Next-token logits [batch, length, vocabulary], equal to those of the model's own forward up to rounding."""
    head: Any = model.lm_head
    return head(features(model, tokens, dropout))
