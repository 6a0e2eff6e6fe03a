"""Whole runs on a tiny model, every strategy at least once: the budget is met, and the result is as promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lillama_core import Request, compress, load_recipe
from lillama_core.models import count_parameters

SMALL = {
    "stacks": ["decoder"], "reduction": 0.2, "tokens": 512, "sequence_length": 32, "sensitivity_tokens": 128,
    "self_share": 0.0, "steps": 2, "minimum_rank": 4, "rank_step": 2, "compute": "float32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("default", {}),
        ("lillama", {}),
        # Nothing here asks for the backward pass that the loss would use.
        ("fast", {"init": "svd", "allocation": "uniform", "steps": 0}),
        ("default", {"init": "activation", "loss": "l1+logcos", "mode": "teacher", "format": "factored"}),
        ("default", {"init": "random", "allocation": "top-first", "loss": "mse", "mode": "teacher+student"}),
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
