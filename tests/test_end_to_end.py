"""Whole runs on a tiny model, every strategy at least once: the budget is met, and the result is as promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lillama_core import load_recipe
from lillama_core.models.loading import count_parameters
from lillama_core.output.record import peak_memory_bytes
from lillama_core.pipeline import Request, compress

SMALL = {
    "stacks": ["decoder"], "reduction": 0.2, "tokens": 512, "sequence_length": 32,
    "self_share": 0.0, "compute": "float32",
}  # fmt: skip
RANKS = {"minimum_rank": 4, "rank_step": 2}
GRADIENTS = {"sensitivity_tokens": 128}


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("default", {**GRADIENTS, "steps": 2}),
        ("lillama", {**RANKS, "steps": 2}),
        # Nothing here asks for the backward pass that the loss would use.
        ("fast", {"init": "svd", "allocation": "uniform", "steps": 0}),
        ("default", {"steps": 2, "init": "activation", "loss": "l1+logcos", "mode": "teacher", "format": "factored"}),
        (
            "default",
            {
                **RANKS,
                "steps": 2,
                "init": "random",
                "allocation": "top-first",
                "loss": "mse",
                "mode": "teacher+student",
            },
        ),
    ],
)
def test_a_run_with_these_strategies(
    recipe: str,
    options: dict[str, Any],
    tmp_path: Path,
    make_model: Callable[..., Path],
    calibration_text: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    dense = make_model(tmp_path / "dense", num_hidden_layers=3)
    chosen = load_recipe(recipe).with_options({**SMALL, "calibration": [str(calibration_text)], **options})
    out = tmp_path / "out"
    record = compress(Request(str(dense), out, chosen), "quiet")

    model = AutoModelForCausalLM.from_pretrained(dense)
    stack = count_parameters(model.model.layers)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    removed = count_parameters(model) - count_parameters(loaded)
    # The maps are 32 and 64 wide: one rank more or less is worth about a hundredth of a map.
    assert removed == pytest.approx(0.2 * stack, rel=0.08)
    assert removed >= int(0.2 * stack)
    written = json.loads((out / "lillama.json").read_text())
    assert written["recipe"]["init"] == chosen.init
    assert len(written["blocks"]) == 3
    for block in record.blocks:
        assert block["loss_after"] <= block["loss_before"]
    assert record.fidelity is not None
    assert record.fidelity["divergence"] > 0
    assert str(tmp_path) not in (out / "lillama.json").read_text()


def test_what_was_trained_is_rounded_once(
    tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    """A model of half precision, written in fp32: norms that were trained keep all of their digits."""
    dense = make_model(tmp_path / "dense", dtype=torch.bfloat16)
    options = {**SMALL, "calibration": [str(calibration_text)], "train": "block", "dtype": "float32"}
    # From there every step is a gain.
    options |= {"init": "random", "allocation": "uniform", "steps": 8}
    record = compress(Request(str(dense), tmp_path / "out", load_recipe("default").with_options(options)), "quiet")
    found = load_file(tmp_path / "out" / "model.safetensors")
    trained = [block["name"] for block in record.blocks if block["kept_step"] > 0]
    assert trained
    for block in trained:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = found[f"{block}.{norm}.weight"]
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, weight.bfloat16().float()), block


def test_peak_memory_without_the_kernels_high_water_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sandboxes write a shorter ``/proc/self/status``, or none; a run must not end there after hours."""
    usual = peak_memory_bytes()
    for status in (lambda *_, **__: "VmRSS:\t  9 kB\n", _not_there):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", status)
            assert peak_memory_bytes() >= 0.9 * usual


def _not_there(*_: Any, **__: Any) -> str:
    raise FileNotFoundError
