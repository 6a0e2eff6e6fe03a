"""Ready for a GPU, tested without one: every architecture and recipe runs on the pretend device.

What it counts there is bounded: how often the CPU waits for the device and what is copied, for each block, and the
bytes that live there. Bounds are measurements of today, to be lowered with every wait that goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import (
    DeviceReport,
    PretendRunError,
    SeededBug,
    execute_on_pretend_device,
    per_block,
    reason_to_skip,
    run_on_pretend_device,
)
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from lillama_core.architecture.find import find_architecture
from lillama_testing import TinyModel, make_tiny_model

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or "")

DATA = {"self_share": 0.0, "tokens": 256, "sequence_length": 32, "batch_size": 2, "samples": 4}
"""Enough for four batches: two to fit, one to choose and one to report by."""
GRADIENTS = {"sensitivity_tokens": 64, "rescaling_tokens": 32}
FAST = {"recipe": "fast", **DATA, **GRADIENTS}
DEFAULT = {"recipe": "default", "steps": 2, **DATA, **GRADIENTS}
SHORT = {"sequence_length": 8, "tokens": 64, "sensitivity_tokens": 16, "rescaling_tokens": 8}
"""For models that are read position by position where their kernels are missing."""
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-default": ("llama", DEFAULT),
    "llama-lillama": ("llama", {"recipe": "lillama", "steps": 2, **DATA}),
    "llama-self": ("llama", {**FAST, "self_share": 0.5}),
    "gpt2-fast": ("gpt2", FAST),
    "mixtral-fast": ("mixtral", FAST),
    "mixtral-share_experts": ("mixtral", {**DEFAULT, "share_experts": True}),
    "mamba-correction": ("mamba", {**FAST, **SHORT, "correction_tokens": 16}),
    "falcon_mamba-embeddings": ("falcon_mamba", {**DEFAULT, **SHORT, "compress_embeddings": True}),
    "whisper-default": ("whisper", DEFAULT),
}
"""Every architecture that lillama brings, and every recipe and option that takes a way of its own."""

Specimen = Callable[[str], TinyModel]


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    """A tiny model by its type."""
    made: dict[str, TinyModel] = {}

    def make(model_type: str) -> TinyModel:
        if model_type not in made:
            architecture = find_architecture(CONFIG_MAPPING[model_type]())
            made[model_type] = make_tiny_model(architecture, model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


def run(tiny: TinyModel, options: dict[str, Any], **how: Any) -> DeviceReport:
    return run_on_pretend_device(tiny.folder, {"calibration": list(tiny.calibration), **options}, **how)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_all_that_lillama_brings_runs_on_a_gpu(name: str, specimen: Specimen, tmp_path: Path) -> None:
    model_type, options = RUNS[name]
    report = run(specimen(model_type), options)
    assert report.record["device"] == "cuda:0"
    assert report.record["compute"] == "bfloat16"
    assert report.record["peak_device_memory_bytes"] == report.peak_bytes == max(report.peak_by_phase.values())
    assert {"load model", "profile", "blocks", "report", "output"} <= set(report.peak_by_phase)
    assert min(report.copied_to_device, report.copied_to_host) > 0
    # Where pytest keeps the files of the last runs.
    report.save(tmp_path / "report.json")
    assert DeviceReport(**json.loads((tmp_path / "report.json").read_text())) == report


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_result_is_that_of_the_cpu(model_type: str, specimen: Specimen, tmp_path: Path) -> None:
    """The same numbers go through the same kernels, but for the choice of one: what differs is rounding."""
    options = {**FAST, "compute": "float32"}
    run(specimen(model_type), options, output=tmp_path / "device")
    run(specimen(model_type), options, output=tmp_path / "cpu", device="cpu")
    found, expected = (load_file(tmp_path / where / "model.safetensors") for where in ("device", "cpu"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_is_resumed_on_the_same_kind_of_device_alone(specimen: Specimen, tmp_path: Path) -> None:
    tiny, output = specimen("llama"), tmp_path / "small"
    late = SeededBug("lillama_core.evaluation.fidelity:measure_fidelity", "dense[row : row + 1].to(device)", "None")
    with pytest.raises(PretendRunError):
        run(tiny, FAST, output=output, bug=late)
    with pytest.raises(PretendRunError, match=r"UserError.*device"):
        run(tiny, FAST, output=output, resume=True, device="cpu")
    assert run(tiny, FAST, output=output, resume=True).record["resumed"]


BUGS = {
    "inputs of the model": SeededBug(
        "lillama_core.data.modality:Samples.to", "{k: v.to(device) for k, v in self.inputs.items()}", "self.inputs"
    ),
    "what was read from a file": SeededBug(
        "lillama_core.initialization.base:Decomposition.factors",
        "self.left[:, :rank].to(weight.device)",
        "self.left[:, :rank]",
    ),
    "a stream that is kept on the host": SeededBug(
        "lillama_core.evaluation.fidelity:measure_fidelity",
        "compressed[row : row + 1].to(device)",
        "compressed[row : row + 1]",
    ),
    "labels of a metric": SeededBug(
        "lillama_core.evaluation.fidelity:Comparison.add", "samples.targets[row].to(device)", "samples.targets[row]"
    ),
    "a matrix made without a device": SeededBug(
        "lillama_core.initialization.base:balance", "torch.ones_like(up)", "torch.ones(up.shape)"
    ),
}


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_forgotten_device_is_noticed(name: str, specimen: Specimen) -> None:
    with pytest.raises(PretendRunError, match="on the same device"):
        run(specimen("llama"), FAST, bug=BUGS[name])


def test_a_cpu_does_not_notice_them(specimen: Specimen) -> None:
    """Or the bugs would break more than the device."""
    assert run(specimen("llama"), FAST, bug=BUGS["a matrix made without a device"], device="cpu").waits == 0


def test_a_seeded_bug_that_has_no_place_is_an_error(specimen: Specimen) -> None:
    bug = SeededBug("lillama_core.data.modality:Samples.to", "no such code", "")
    with pytest.raises(PretendRunError, match="out of date"):
        run(specimen("llama"), FAST, bug=bug)


def waits(code: str) -> list[str]:
    """What the CPU waits for in ``code``, which may use ``x`` = [0, 1, 2] on the device and ``host`` = [0, 1, 2]."""
    source = (
        "import torch\nfrom pretend_cuda.device import LEDGER\n"
        "host = torch.arange(3.0)\nx = host.to('cuda')\nLEDGER.synchronisations.clear()\n"
        f"{code}\n"
        "found = [k.partition(' ')[2] for k, n in LEDGER.synchronisations.items() for _ in range(n)]"
    )
    found: list[str] = execute_on_pretend_device(source)
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x * 2 + x.sum()", []),
        ("x.clamp_(0).mul_(2); x[:2] = 7; x[1:].copy_(x[:1])", []),
        # The number becomes a tensor on the host, of the size of what it goes to: it is copied, not filled in.
        ("x[0] = 7", ["copy to device"]),
        ("x.sum().item()", ["item"]),
        ("bool((x > 0).any())", ["item"]),
        ("x.tolist()", ["copy to host"]),
        ("x.cpu()", ["copy to host"]),
        ("x.to('cpu', non_blocking=True)", []),
        ("host.to('cuda')", ["copy to device"]),
        ("host.pin_memory().to('cuda', non_blocking=True)", []),
        ("torch.empty(3).copy_(x, non_blocking=True)", ["copy to host"]),
        ("torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)", []),
        ("torch.tensor([1.0], device='cuda')", ["copy to device"]),
        ("x[[0, 2]]", ["copy to device"]),
        ("x[x > 0]", ["mask as index"]),
        ("x[x > 0] = 0.0", []),
        ("x.nonzero()", ["nonzero"]),
        ("torch.equal(x, x)", ["equal"]),
        ("torch.linalg.eigh(torch.outer(x, x))", ["eigh"]),
        ("torch.linalg.cholesky(torch.eye(2, device='cuda'))", ["linalg"]),
        ("torch.cuda.synchronize()", ["synchronize"]),
    ],
)
def test_what_the_cpu_waits_for(code: str, expected: list[str]) -> None:
    assert waits(code) == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x + host", "same device"),
        ("torch.cat([x, host])", "same device"),
        ("x.mul_(host)", "same device"),
        ("torch.nn.Linear(3, 2)(x)", "same device"),
        ("host[x.long()]", "same device"),
        ("x.numpy()", "to numpy"),
        ("x.data = host", "device"),
        ("torch.randn(3, device='cuda', generator=torch.Generator())", "generator"),
    ],
)
def test_what_fails_on_a_gpu_fails(code: str, message: str) -> None:
    with pytest.raises(PretendRunError, match=message):
        waits(code)


def test_single_numbers_of_the_host_may_be_used() -> None:
    assert waits("x * host[1] + torch.tensor(2.0)") == []


def test_bytes_live_as_long_as_a_tensor_or_its_views() -> None:
    source = """
import torch
from pretend_cuda.device import LEDGER
found = []
with LEDGER.phase("outer"):
    x = torch.zeros(100, device="cuda")
    with LEDGER.phase("inner"):
        y = x[50:].double().requires_grad_(True)
        view = x[10:]
        z = (y * y).sum()
        found.append(LEDGER.live)
        del x
        found.append(LEDGER.live)
        del view, z, y
        found.append(LEDGER.live)
x = torch.zeros(10, device="cuda")
x.data = torch.zeros(20, device="cuda")
found += [LEDGER.live, LEDGER.peak, LEDGER.peak_by_phase]
"""
    # 400 bytes, half of them again in fp64 twice, and a sum; the product is gone.
    *live, renewed, peak, by_phase = execute_on_pretend_device(source)
    assert live == [400 + 400 + 8, 400 + 400 + 8, 0]
    assert renewed == 80
    assert by_phase == {"outer": peak, "inner": peak}
    assert peak == 400 + 3 * 400 - 400 + 8


DEPTHS = (4, 12)
"""Fewer and more than there are variants of the loss calibration, which are ten at most."""
Deep = Callable[[str, int], DeviceReport]


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    """What a recipe does with a Llama of so many blocks."""
    found: dict[tuple[str, int], DeviceReport] = {}

    def report(recipe: str, blocks: int) -> DeviceReport:
        if (recipe, blocks) not in found:
            folder = make_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=blocks)
            options = {"fast": FAST, "default": DEFAULT}[recipe]
            found[recipe, blocks] = run_on_pretend_device(folder, {"calibration": [str(calibration_text)], **options})
        return found[recipe, blocks]

    return report


@pytest.mark.parametrize(
    ("recipe", "synchronisations", "to_device", "to_host"),
    [("fast", 280, 345_000, 250_000), ("default", 326, 515_000, 292_000)],
)
def test_a_block_costs_no_more_than_today(
    recipe: str, synchronisations: float, to_device: float, to_host: float, deep: Deep
) -> None:
    """Waits and bytes of a block of width 32 with seven maps, over four batches of 2 x 32 tokens.

    Bounds are what was counted when the test was written, rounded up. Each copy from pageable memory waits, too.
    """
    found = per_block(deep(recipe, 4), deep(recipe, 8), 4)
    assert found.synchronisations <= synchronisations, found.by_line
    assert found.copied_to_device <= to_device
    assert found.copied_to_host <= to_host


def test_the_peak_of_a_streamed_run_does_not_grow_with_the_number_of_blocks(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    options = {"calibration": [str(calibration_text)], **FAST}
    reports = [
        run_on_pretend_device(make_model(tmp_path / str(blocks), num_hidden_layers=blocks), options, stream=True)
        for blocks in DEPTHS
    ]
    # One variant of the loss calibration for each run of blocks, up to ten: their streams are on the host.
    for phase in reports[0].peak_by_phase:
        peaks = [report.peak_by_phase[phase] for report in reports]
        assert max(peaks) <= 1.05 * min(peaks), (phase, peaks)
