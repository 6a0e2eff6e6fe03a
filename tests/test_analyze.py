"""What ``lillama analyze`` predicts: numbers of matrices by definition, and losses that can be measured."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Ended
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.allocation.effective_rank import effective_rank, stable_rank

Cli = Callable[..., Ended]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_ranks_lie_between_one_and_all(values: list[float]) -> None:
    energies = torch.tensor(values, dtype=torch.float64)
    if energies.max() <= 1e-12:
        return
    for rank in (stable_rank(energies), effective_rank(energies)):
        assert 1 - 1e-9 <= rank <= len(values) + 1e-9


def test_ranks_of_matrices_that_are_known() -> None:
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.tensor([5.0, 0, 0])) == effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0
    # Singular values 3 and 1: parts 3/4 and 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([9.0, 1.0])) == pytest.approx(math.exp(entropy))
    assert stable_rank(torch.tensor([9.0, 1.0])) == pytest.approx(10 / 9)


def test_a_model_is_analysed(tiny_model: Path, calibration_text: Path, tmp_path: Path, run_cli: Cli) -> None:
    files = tmp_path / "maps.json", tmp_path / "losses.svg"
    before = sorted(tmp_path.iterdir())
    ended = run_cli(
        "analyze", tiny_model, "--calibration", calibration_text, *QUICK[:-4], "--self-share", "0",
        "--json", files[0], "--plot", files[1],
    )  # fmt: skip
    assert ended.status == 0, ended
    assert "predicted loss" in ended.stdout
    assert "self_attn.q_proj" in ended.stdout
    assert sorted(set(tmp_path.iterdir()) - set(before)) == sorted(files)
    found = json.loads(files[0].read_text())
    assert found["unit"] == "nats a prediction"
    losses = [size["loss"] for size in found["sizes"]]
    assert len(losses) >= 4
    assert losses == sorted(losses)
    assert losses[0] > 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for m in found["maps"]:
        weight = model.get_submodule(m["name"]).weight
        assert list(weight.shape) == m["shape"]
        norms = torch.linalg.matrix_norm(weight), torch.linalg.matrix_norm(weight, 2)
        assert m["stable_rank"] == pytest.approx((norms[0] / norms[1]).item() ** 2, rel=1e-4)
        assert m["losses"]["0.75"] <= m["losses"]["0.5"] <= m["losses"]["0.25"]
    assert len(found["maps"]) == 14
    assert ET.parse(files[1]).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init", "svd"), "needs losses that are predicted"),
        (("--allocation", "uniform"), "needs losses that are predicted"),
        (("--target-speedup", "1.2"), "looks at sizes"),
        (("--json", "."), "--json"),
    ],
)
def test_what_cannot_be_analysed(options: tuple[str, ...], message: str, tiny_model: Path, run_cli: Cli) -> None:
    assert message in run_cli("analyze", tiny_model, *options).error


def test_python_analyses_too(tiny_model: Path, calibration_text: Path) -> None:
    options = {"tokens": 1024, "sequence_length": 32, "batch_size": 4, "sensitivity_tokens": 128, "self_share": 0.0}
    found = lillama_core.analyze(tiny_model, calibration=calibration_text, quiet=True, **options)
    assert [size.reduction for size in found.sizes] == sorted(size.reduction for size in found.sizes)
    assert "predicted loss" in repr(found)
    assert found.to_dict()["maps"]
    with pytest.raises(lillama_core.UserError, match=r"analyze\(\) has no option 'stram'; did you mean 'stream'"):
        lillama_core.analyze(tiny_model, stram=True)
