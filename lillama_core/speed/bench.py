"""``lillama bench``: a compressed model beside the dense one, in turns in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.data.workload import WorkloadOptions
from lillama_core.errors import UserError, in_one_line
from lillama_core.evaluation.metrics.decoding import memory_bytes
from lillama_core.models.loading import DTYPES, auto_class, load_config, load_model
from lillama_core.models.source import locate
from lillama_core.models.transformers_adapter import from_config
from lillama_core.speed.comparison import WARM_UP, Bench, compare_speed
from lillama_core.system.devices import choose_device
from lillama_core.system.files import write_json
from lillama_core.system.progress import Progress
from lillama_core.system.quiet import quiet
from lillama_core.system.regular import check_new_file

SAME_CONFIG = "a dense model of the same config, random weights"
MOST = 1_000_000


@dataclass(frozen=True)
class BenchRequest:
    """What to compare, and at what work."""

    model: str
    baseline: str | None = None
    """The dense model; None: one of the same config with random weights, which is as fast."""
    work: WorkloadOptions = field(default_factory=WorkloadOptions)
    repeats: int = 10
    dtype: str = "auto"
    """``auto``: the one that ``model`` is stored in; the baseline is computed in the same."""
    threads: int | None = None
    architecture: str | Architecture | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    json_file: Path | None = None
    quiet: bool = False


def check(request: BenchRequest) -> None:
    """Raise UserError for what is wrong with the request whatever the models are."""
    work = request.work
    for name, values, least in (
        ("--lengths", work.lengths, 1),
        ("--batch-sizes", work.batch_sizes, 1),
        ("--new-tokens", (work.new_tokens,), 2),
        ("--repeats", (request.repeats,), 1),
        ("--threads", () if request.threads is None else (request.threads,), 1),
    ):
        if not values and name != "--threads":
            raise UserError(f"{name} must name at least one number")
        for value in values:
            if not least <= value <= MOST:
                raise UserError(f"{name} must be from {least} to {MOST:,}, not {value}")
    if request.dtype != "auto" and request.dtype not in DTYPES:
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, not {request.dtype!r}")
    if request.json_file is not None:
        check_new_file(request.json_file, "--json")


def bench(request: BenchRequest) -> Bench:
    """Measure; raises UserError before any work for models that cannot be compared."""
    check(request)
    device = choose_device(request.device)
    with _threads(request.threads), in_one_line("ask for less with --lengths or --batch-sizes"):
        return _bench(request, device)


def _bench(request: BenchRequest, device: torch.device) -> Bench:
    source = locate(request.model, request.trust_remote_code)
    config = load_config(source, allow_compressed=True)
    architecture = find_architecture(config, request.architecture, request.trust_remote_code)
    workloads = modality_of(architecture).workloads(config, request.work)
    with Progress("quiet" if request.quiet else "normal") as progress:
        progress.line(f"Loading {request.model}")
        dtype = DTYPES.get(request.dtype, "auto")
        model: Any = load_model(source, architecture, dtype).to(device)
        progress.line(f"Loading {request.baseline or SAME_CONFIG}")
        baseline: Any = _baseline(request, model, config, architecture).to(device)
        progress.release()
        progress.phase("Measuring", len(workloads) * (WARM_UP + request.repeats))
        found = Bench(
            request.model,
            request.baseline or SAME_CONFIG,
            str(model.dtype).removeprefix("torch."),
            device.type,
            torch.get_num_threads(),
            (memory_bytes(model), memory_bytes(baseline)),
            compare_speed(model, baseline, workloads, request.repeats, progress.step),
        )
    if request.json_file is not None:
        write_json(request.json_file, found.to_dict())
    return found


def _baseline(request: BenchRequest, model: Any, config: Any, architecture: Architecture) -> Any:
    if request.baseline is not None:
        source = locate(request.baseline, request.trust_remote_code)
        other = load_config(source, allow_compressed=True)
        if other.model_type != config.model_type:
            raise UserError(
                f"baseline {request.baseline!r} is a {other.model_type!r} model, and {request.model!r} a"
                f" {config.model_type!r} one; compare with the model that was compressed"
            )
        found = find_architecture(other, request.architecture, request.trust_remote_code)
        return load_model(source, found, model.dtype)
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    # Made in fp32 by a config that says so, and converted: not every initialisation is there in half precision.
    dense.dtype = torch.float32
    with quiet():
        baseline: Any = from_config(auto_class(architecture), dense, request.trust_remote_code)
    baseline.to(model.dtype).eval().requires_grad_(False)
    architecture.adapt(baseline)
    return baseline


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads for torch's operators while open; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
