"""On a real CUDA GPU: a compression gives what it gives on the CPU, and says what memory it took there.

Whatever needs no GPU to be seen is in test_pretend_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from lillama_core.architecture.find import find_architecture
from lillama_core.errors import LillamaError, UserError
from lillama_core.models.loading import count_parameters
from lillama_core.output.record import RunRecord
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.stages.report import ReportStage
from lillama_core.recipe.loading import load_recipe
from lillama_testing import TinyModel, make_tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

MODELS = ("llama", "mixtral", "whisper")
QUICK = {
    "tokens": 1024, "sequence_length": 32, "samples": 8, "batch_size": 4, "sensitivity_tokens": 128,
    "rescaling_tokens": 64, "self_share": 0.0,
}  # fmt: skip


@dataclass
class Bench:
    """Tiny models, and compressions of them that are run once."""

    folder: Path

    def __post_init__(self) -> None:
        self._models: dict[str, TinyModel] = {}
        self._records: dict[Any, RunRecord] = {}

    def model(self, model_type: str) -> TinyModel:
        if model_type not in self._models:
            architecture = find_architecture(CONFIG_MAPPING[model_type]())
            self._models[model_type] = make_tiny_model(architecture, model_type, self.folder / model_type)
        return self._models[model_type]

    def request(self, model_type: str, output: Path, device: str, recipe: str, **options: Any) -> Request:
        tiny = self.model(model_type)
        chosen = load_recipe(recipe).with_options({"calibration": list(tiny.calibration), **QUICK, **options})
        return Request(str(tiny.folder), output, chosen, device=device)

    def record(self, model_type: str, device: str, recipe: str = "fast", **options: Any) -> RunRecord:
        key = (model_type, device, recipe, *options.items())
        if key not in self._records:
            output = self.folder / f"output{len(self._records)}"
            self._records[key] = compress(self.request(model_type, output, device, recipe, **options), "quiet")
        return self._records[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("model_type", MODELS)
def test_the_result_is_that_of_the_cpu(model_type: str, bench: Bench) -> None:
    found, expected = (bench.record(model_type, device, compute="float32") for device in ("cuda", "cpu"))
    assert found.parameters["parameters_after"] == pytest.approx(expected.parameters["parameters_after"], rel=0.01)
    assert found.fidelity is not None
    assert expected.fidelity is not None
    # Sums in another order, and convolutions in TF32: labels of the sensitivity pass may fall otherwise, ranks follow.
    assert found.fidelity["perplexity_before"] == pytest.approx(expected.fidelity["perplexity_before"], rel=0.01)
    assert found.fidelity["relative_error"] == pytest.approx(expected.fidelity["relative_error"], rel=0.2)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_record_says_what_memory_the_gpu_gave(model_type: str, bench: Bench) -> None:
    record = bench.record(model_type, "cuda", compute="float32")
    assert torch.device(record.device).type == "cuda"
    assert record.peak_device_memory_bytes is not None
    assert record.peak_device_memory_bytes >= 4 * count_parameters(bench.model(model_type).load())


@pytest.mark.parametrize("model_type", MODELS)
def test_blocks_are_trained_in_half_precision_where_the_gpu_has_it(model_type: str, bench: Bench) -> None:
    record = bench.record(model_type, "cuda", "default", steps=4)
    fast = torch.cuda.get_device_capability() >= (8, 0)
    assert record.compute == ("bfloat16" if fast else "float32")
    exact = bench.record(model_type, "cuda", compute="float32")
    assert record.fidelity is not None
    assert exact.fidelity is not None
    # bfloat16 has eight bits: sums of products are off by a percent or so.
    assert record.fidelity["perplexity_before"] == pytest.approx(exact.fidelity["perplexity_before"], rel=0.05)
    assert all(block["loss_after"] <= 1.1 * block["loss_before"] for block in record.blocks)


def test_a_model_writes_the_same_text_twice_on_a_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for attempt in range(2):
        # What was written before must not be found again.
        monkeypatch.setenv("LILLAMA_CACHE", str(bench.folder / f"cache{attempt}"))
        hashes.append(bench.record("llama", "cuda", self_share=0.5, seed=7, name=f"attempt {attempt}").data["sha256"])
    assert hashes[0] == hashes[1]


@pytest.fixture
def stopped(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The output of a run on a device that was stopped when its blocks were done."""

    def stop(device: str) -> Path:
        def fail(*_: Any) -> None:
            raise LillamaError("stopped")

        output = tmp_path / "small"
        with monkeypatch.context() as patch:
            patch.setattr(ReportStage, "run", fail)
            with pytest.raises(LillamaError, match="stopped"):
                compress(bench.request("llama", output, device, "fast"), "quiet")
        return output

    return stop


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_does_not_go_on_on_another_kind_of_device(
    first: str, second: str, bench: Bench, stopped: Callable[[str], Path]
) -> None:
    request = bench.request("llama", stopped(first), second, "fast")
    with pytest.raises(UserError, match="device"):
        compress(Request(request.model, request.output, request.recipe, device=second, resume=True), "quiet")


def test_a_run_goes_on_on_the_same_kind_of_device(bench: Bench, stopped: Callable[[str], Path]) -> None:
    request = bench.request("llama", stopped("cuda"), "cuda", "fast")
    record = compress(Request(request.model, request.output, request.recipe, device="cuda:0", resume=True), "quiet")
    assert record.resumed
