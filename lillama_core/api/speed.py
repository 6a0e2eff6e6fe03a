"""`bench` of the API: how fast a compressed model is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import nn

from lillama_core.api.arguments import Scratch, check_architecture, model_spec, python_terms, whole_number
from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.data.workload import WorkloadOptions
from lillama_core.speed.bench import BenchRequest
from lillama_core.speed.bench import bench as measure
from lillama_core.speed.comparison import Bench


def bench(
    model: str | os.PathLike[str] | nn.Module | CompressionResult,
    *,
    baseline: str | os.PathLike[str] | nn.Module | None = None,
    lengths: Sequence[int] = (128, 512),
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 10,
    dtype: str = "auto",
    threads: int | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Bench:
    """Compare the speed of ``model`` with that of ``baseline``, in turns; without one, with a dense one of its config.

    ``lengths`` are those of prompts in tokens, ``new_tokens`` are written to measure decoding, ``batch_sizes`` are rows
    worked on at once; ``dtype`` is what both compute in, ``auto``: what ``model`` is stored in. ``print`` shows the
    result as a table and in words, ``to_dict`` gives its numbers. Raises UserError for what cannot be compared.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        check_architecture(architecture)
        scratch = Scratch(stack, None)
        spec, other = (
            None if m is None else model_spec(m, None, architecture, trust_remote_code, scratch, True)
            for m in (model, baseline)
        )
        assert spec is not None
        request = BenchRequest(
            model=spec,
            baseline=other,
            work=WorkloadOptions(
                tuple(whole_number(n, "lengths") for n in lengths),
                whole_number(new_tokens, "new_tokens"),
                tuple(whole_number(n, "batch_sizes") for n in batch_sizes),
            ),
            repeats=whole_number(repeats, "repeats"),
            dtype=str(dtype).removeprefix("torch."),
            threads=None if threads is None else whole_number(threads, "threads"),
            architecture=architecture,
            device=str(device),
            trust_remote_code=bool(trust_remote_code),
            quiet=bool(quiet),
        )
        return measure(request)
