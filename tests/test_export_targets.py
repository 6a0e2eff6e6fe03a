"""Exports of models whose low-rank maps are convolutions, grouped projections, or experts of other layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_with_random_factors
from safetensors.torch import load_file
from test_convolution import Conformer, conformer  # noqa: F401  a fixture

from lillama_benchmarks.coverage import tiny_model
from lillama_core import export, hookimpl, load
from lillama_core.exporting import ExportJob
from lillama_core.exporting.run import ExportRequest, open_compressed
from lillama_core.models.outputs import main_output
from lillama_core.strategies import make
from lillama_core.system.progress import Progress
from lillama_registry import registry
from lillama_testing.tiny import TinyModel

ENCODER = "wav2vec2_conformer.encoder.layers"
SITES: dict[str, dict[str, dict[str, Any]]] = {
    "wav2vec2-conformer": {
        f"{ENCODER}.0.conv_module.pointwise_conv1": {"kind": "convolution", "format": "factored", "rank": 7},
        f"{ENCODER}.1.conv_module.pointwise_conv2": {"kind": "convolution", "format": "pivoted", "rank": 5},
        f"{ENCODER}.1.ffn1.output_dense": {"kind": "linear", "format": "pivoted", "rank": 5},
    },
    "deepseek_v4": {
        "model.layers.0.self_attn.o_a_proj": {"kind": "grouped", "format": "factored", "ranks": {"0": 3, "1": 2}},
        "model.layers.1.self_attn.o_a_proj": {"kind": "grouped", "format": "pivoted", "ranks": {"1": 3}},
    },
    "llama4_text": {
        "model.layers.1.feed_forward.experts": {
            "kind": "experts", "format": "pivoted", "ranks": {"gate_up.0": 5, "down.2": 4},
        },
    },
    "nemotron_h": {
        "model.layers.2.mixer.experts": {"kind": "experts", "format": "factored", "ranks": {"up.0": 5, "down.2": 4}},
    },
    "longcat_flash": {
        "model.layers.0.mlp.experts": {
            "kind": "experts", "format": "pivoted", "ranks": {"gate_up.0": 5, "down.2": 4},
        },
    },
    "inkling_text": {
        "model.layers.1.mlp.shared_experts": {
            "kind": "experts", "format": "factored", "ranks": {"gate.0": 5, "up.0": 3, "down.0": 4},
        },
    },
    "jetmoe": {
        "model.layers.0.mlp.input_linear": {"kind": "sorted", "format": "factored", "ranks": {"0": 5}},
        "model.layers.1.mlp.output_linear": {"kind": "sorted", "format": "pivoted", "ranks": {"0": 4, "1": 3}},
    },
}  # fmt: skip
"""What is low rank in a model of each type."""


class Plugin:
    """Names the type that no plugin of lillama's does."""

    @staticmethod
    @hookimpl
    def lillama_architectures() -> list[Conformer]:
        return [Conformer()]


@pytest.fixture(scope="module", autouse=True)
def _conformers_are_known() -> Iterator[None]:
    registry().add(Plugin, "conformer", "conformer", "1")
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def folders(
    conformer: TinyModel,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path]]:
    """``folders("deepseek_v4")``: a dense model, and one as a compression leaves it."""
    made: dict[str, tuple[Path, Path]] = {}

    def make_one(model_type: str) -> tuple[Path, Path]:
        if model_type not in made:
            at = tmp_path_factory.mktemp("targets")
            specimen = conformer if model_type == conformer.model_type else tiny_model(model_type, at / "dense")[0]
            model = getattr(transformers, specimen.architecture.auto_class).from_pretrained(specimen.folder)
            save_with_random_factors(model, SITES[model_type], at / "low")
            made[model_type] = specimen.folder, at / "low"
        return made[model_type]

    return make_one


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval()(**inputs))


def loaded(folder: Path, of: str, **options: Any) -> Any:
    model, notes = getattr(transformers, of).from_pretrained(folder, output_loading_info=True, **options)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    return model


@pytest.mark.parametrize("model_type", sorted(SITES))
def test_standalone_and_dense_give_what_the_compressed_model_gives(
    model_type: str, folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    dense, low = folders(model_type)
    model = open_compressed(ExportRequest(str(low), "standalone", tmp_path))
    inputs, of = model.inputs(), model.architecture.auto_class
    expected = outputs(load(low), inputs)
    # The factors matter.
    assert not torch.allclose(outputs(loaded(dense, of), inputs), expected, rtol=1e-3, atol=1e-4)
    for to in ("standalone", "dense"):
        job = ExportJob(tmp_path / to, tmp_path / f"{to}-scratch", None, Progress("quiet"))
        job.folder.mkdir()
        job.scratch.mkdir()
        make("exporters", to).write(model, job)
    found = loaded(tmp_path / "standalone", of, trust_remote_code=True)
    torch.testing.assert_close(outputs(found, inputs), expected)
    assert "lillama_core" not in (tmp_path / "standalone" / "modeling_lillama.py").read_text()
    torch.testing.assert_close(outputs(loaded(tmp_path / "dense", of), inputs), expected, rtol=1e-3, atol=1e-3)
    stored, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", dense))
    assert {k: t.shape for k, t in stored.items()} == {k: t.shape for k, t in original.items()}
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("to", ["standalone", "onnx"])
def test_what_is_exported_runs_without_lillama(
    to: str, folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    made = export(folders("wav2vec2-conformer")[1], tmp_path / "out", to=to, quiet=True)
    assert made.agreements
    assert all(agreement.holds for agreement in made.agreements)
