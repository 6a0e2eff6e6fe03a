"""Weights in 4 bits that are rounded for what they read: the rounding by itself, and block by block in a model."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WEIGHTS_ONLY, Ended
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama_core
from lillama_core.data.shipped import SPEECH_SETS
from lillama_core.errors import UserError
from lillama_core.pipeline.calibrated import relative_error
from lillama_core.quantization.choice import Candidate, fewest_errors
from lillama_core.quantization.feedback import DAMPING, inverse_factor, quantize_with_feedback
from lillama_core.quantization.modules import QuantizedLinear
from lillama_core.quantization.packing import GROUP, Packing
from lillama_core.quantization.rounding import quantize, round_rows
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

Cli = Callable[..., Ended]
DATA: dict[str, Any] = {"tokens": 2048, "sequence_length": 32}


def correlated(columns: int, rows: int = 4096) -> torch.Tensor:
    """Vectors whose parts hang together, of very different sizes [rows, columns]."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, columns // 3 + 1, generator=generator) @ torch.randn(
        columns // 3 + 1, columns, generator=generator
    )
    return (mixed + 0.3 * torch.randn(rows, columns, generator=generator)) * torch.logspace(-1, 1, columns)


def error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    difference = (weight - rounded).double()
    return float(((difference @ moment.double()) * difference).sum())


def surgeon(weight: np.ndarray, moment: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same rounding by its definition: the inverse of what is left of H anew for every column, all in fp64."""
    w, columns = weight.astype(np.float64), weight.shape[1]
    H = moment.astype(np.float64) + DAMPING * np.trace(moment) / columns * np.eye(columns)
    found, left = np.zeros_like(w), list(range(columns))
    for j in sorted(left, key=lambda j: -moment[j, j]):
        scale = scales[:, j // GROUP]
        found[:, j] = np.clip(np.round(w[:, j] / scale), -8, 7) * scale
        inverse = np.linalg.inv(H[np.ix_(left, left)])[left.index(j)]
        w[:, left] -= np.outer((w[:, j] - found[:, j]) / inverse[left.index(j)], inverse)
        left.remove(j)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(5, 70), (3, 32), (4, 7), (1, 1)])
def test_it_is_optimal_brain_surgery_column_by_column(rows: int, columns: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(rows, columns), correlated(columns)
    moment = x.T @ x / len(x)
    packing = Packing(rows, columns, 4)
    found = packing.dense(quantize_with_feedback(weight, moment, packing), torch.float32)
    scales = round_rows(weight, 4, moment.diagonal())[1].float().numpy()
    np.testing.assert_allclose(found.numpy(), surgeon(weight.numpy(), moment.numpy(), scales), rtol=1e-4, atol=1e-4)


def test_outputs_are_closer_than_by_plain_rounding() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(64, 160), correlated(160)
    moment = x.T @ x / len(x)
    packing, plain = quantize(weight, 4)
    best = packing.dense(quantize_with_feedback(weight, moment, packing), torch.float32)
    assert error(weight, best, moment) < 0.5 * error(weight, packing.dense(plain, torch.float32), moment)


def test_scales_let_what_counts_be_close() -> None:
    torch.manual_seed(1)
    weight, importance = torch.randn(64, 70), torch.logspace(-3, 3, 70)[torch.randperm(70)]
    importance[3] = 0

    def weighted(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rounded = codes * scales.float().repeat_interleave(GROUP, dim=1)[:, :70]
        return ((rounded - weight).square() * importance).sum()

    assert weighted(*round_rows(weight, 4, importance)) < 0.8 * weighted(*round_rows(weight, 4))
    codes, scales = round_rows(weight, 4, torch.zeros(70))
    assert torch.equal(codes, round_rows(weight, 4)[0])
    assert torch.equal(scales, round_rows(weight, 4)[1])


@pytest.mark.parametrize("moment", [torch.eye(96), torch.zeros(96, 96), 1e-30 * torch.eye(96), 1e30 * torch.eye(96)])
def test_inputs_that_do_not_hang_together_leave_plain_rounding(moment: torch.Tensor) -> None:
    torch.manual_seed(1)
    weight = torch.randn(20, 96)
    weight[3] = 0
    packing, plain = quantize(weight, 4)
    found = quantize_with_feedback(weight, moment, packing)
    torch.testing.assert_close(packing.dense(found, torch.float32), packing.dense(plain, torch.float32))


def test_the_factor_is_of_the_inverse() -> None:
    x = correlated(50, 60)
    moment = x.T @ x / len(x)
    U = inverse_factor(moment).double()
    assert torch.equal(U, U.triu())
    damped = moment.double() + DAMPING * moment.diagonal().mean() * torch.eye(50)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(50, dtype=torch.float64), rtol=0, atol=2e-3)


def divergence(model: Any, dense: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        said, wanted = (m(tokens).logits.double().log_softmax(-1) for m in (model, dense))
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


def test_a_model_predicts_more_like_the_dense_one(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    folder = make_model(
        tmp_path / "dense", hidden_size=96, intermediate_size=160, initializer_range=0.2, dtype=torch.float16
    )
    before = (folder / "model.safetensors").read_bytes()
    lillama_core.quantize(folder, tmp_path / "plain", bits=4, quiet=True)
    found = lillama_core.quantize(
        folder, tmp_path / "small", bits=4, calibration=calibration_text, quiet=True, tokens=8192, sequence_length=64
    )
    assert (folder / "model.safetensors").read_bytes() == before
    # Seven maps in each of two blocks; the table is in 8 bits.
    assert (found.with_feedback, found.matrices) == (14, {"4": 14, "8": 1})
    assert found.calibration is not None
    assert found.calibration["tokens"] == 8192
    dense, plain, small = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("dense", "plain", "small")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(calibration_text.read_text()[-20000:], return_tensors="pt").input_ids[:, -512:].view(8, 64)
    assert divergence(small, dense, tokens) < 0.9 * divergence(plain, dense, tokens)
    # What is not in few bits is what it was, bit for bit.
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert stored.dtype == torch.float16
    assert torch.equal(stored.model.norm.weight, original.model.norm.weight)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(stored.get_parameter(norm), original.get_parameter(norm))
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == (
        tmp_path / "plain" / "model.safetensors"
    ).stat().st_size


def test_a_later_block_is_rounded_for_what_the_rounded_ones_give(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """With the first block left as it is, the second gets other inputs, and other codes."""
    folder = make_model(tmp_path / "dense", hidden_size=64, intermediate_size=96, initializer_range=0.3)
    for name, exclude in (("both", ()), ("second", ("model.layers.0",))):
        lillama_core.quantize(
            folder, tmp_path / name, bits=4, calibration=calibration_text, exclude=exclude, quiet=True, **DATA
        )
    both, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("both", "second"))
    path = "model.layers.1.mlp.down_proj"
    assert not torch.equal(both.get_submodule(path).packed, second.get_submodule(path).packed)


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "whisper"])
def test_other_families_are_rounded_by_blocks(model_type: str, calibration_text: Path, tmp_path: Path) -> None:
    architecture = registry().architectures_for(model_type)[0]
    folder = make_tiny_model(architecture, model_type, tmp_path / "dense").folder
    speech = model_type == "whisper"
    data = {"samples": 8} if speech else DATA
    source = SPEECH_SETS["synthetic"] if speech else calibration_text
    # The fresh process that loads it compares the outputs.
    found = lillama_core.quantize(folder, tmp_path / "small", bits=4, calibration=source, quiet=True, **data)
    held = [m for m in lillama_core.load(tmp_path / "small").modules() if isinstance(m, QuantizedLinear)]
    fours = sum(m.packing.bits == 4 for m in held)
    assert found.with_feedback == fours == found.matrices["4"] > 5


def test_factors_are_rounded_for_what_they_read(
    compressed: Path, calibration_text: Path, run_cli: Cli, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    done = run_cli(
        "quantize", compressed, "--output", small, "--bits", "4", "--calibration", calibration_text,
        "--tokens", "2048", "--sequence-length", "32",
    )  # fmt: skip
    assert done.status == 0, done
    assert "with feedback" in done.stdout
    record = json.loads((small / "lillama.json").read_text())["quantization"]
    assert record["with_feedback"] > 0
    assert record["calibration"]["tokens"] == 2048
    assert [told["path"] for told in record["calibration"]["sources"].values()] == ["calibration.txt"]
    assert (
        "\nlillama quantize OUTPUT --output OUTPUT2 --bits 4 --calibration calibration.txt --tokens 2048"
        " --sequence-length 32\n```" in (small / "README.md").read_text()
    )
    assert str(calibration_text.parent) not in (small / "lillama.json").read_text()
    assert run_cli("verify", small).status == 0


def fixed_candidates(seed: int) -> tuple[dict[str, Candidate], int]:
    generator = random.Random(seed)
    found = {
        str(i): Candidate(more := generator.randint(1, 20), generator.randint(1, more), generator.random())
        for i in range(8)
    }
    least, most = (sum(getattr(c, n) for c in found.values()) for n in ("bytes_less", "bytes_more"))
    return found, generator.randint(least, most)


@pytest.mark.parametrize("seed", range(40))
def test_a_choice_of_bits_fits_and_is_near_the_best_there_is(seed: int) -> None:
    candidates, limit = fixed_candidates(seed)

    def size(taken: set[str]) -> int:
        return sum(c.bytes_less if n in taken else c.bytes_more for n, c in candidates.items())

    def cost(taken: set[str]) -> float:
        return sum(candidates[n].error for n in taken)

    found = fewest_errors(candidates, limit)
    assert size(found) <= limit
    assert all(size(found - {name}) > limit for name in found if candidates[name].error > 0)
    every = [set(c) for k in range(9) for c in itertools.combinations(candidates, k)]
    best = min(cost(taken) for taken in every if size(taken) <= limit)
    # The bound of the knapsack's relaxation: at most one more than what is best.
    assert cost(found) <= best + max(c.error for c in candidates.values())
    with pytest.raises(ValueError, match="needed"):
        fewest_errors(candidates, sum(c.bytes_less for c in candidates.values()) - 1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_files_fit_into_a_size(
    calibrated: bool, make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "dense", hidden_size=96, intermediate_size=160, dtype=torch.float16)
    data = {"calibration": calibration_text, **DATA} if calibrated else {}
    sizes = {}
    for bits in (8, 4):
        lillama_core.quantize(folder, tmp_path / str(bits), bits=bits, quiet=True)
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    between = (sizes[8] + sizes[4]) // 2
    found = lillama_core.quantize(folder, tmp_path / "fits", target_size=between, quiet=True, **data)
    assert 0.9 * between < found.bytes_after <= between
    assert set(found.matrices) == {"4", "8"}
    assert found.with_feedback == (found.matrices["4"] if calibrated else 0)
    said = json.loads((tmp_path / "fits" / "config.json").read_text())["quantization_config"]["quantization"]["bits"]
    assert "model.embed_tokens" in said["8"]
    assert "in 4 and 8 bits" in (tmp_path / "fits" / "README.md").read_text()
    roomy = lillama_core.quantize(folder, tmp_path / "roomy", target_size=sizes[8] + 5000, quiet=True, **data)
    assert set(roomy.matrices) == {"8"}


def test_a_low_rank_model_fits_into_a_size(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "dense", hidden_size=96, intermediate_size=160, dtype=torch.float16)
    options = dict(zip([o[2:].replace("-", "_") for o in WEIGHTS_ONLY[::2]], WEIGHTS_ONLY[1::2], strict=True))
    lillama_core.compress(
        folder, tmp_path / "low", calibration=calibration_text, quiet=True,
        **{**options, "recipe": "fast", "format": "factored", "reduction": 0.3},
    )  # fmt: skip
    sizes = {}
    for bits in (8, 4):
        lillama_core.quantize(tmp_path / "low", tmp_path / str(bits), bits=bits, quiet=True)
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    # What is said of the headers beforehand is an upper bound.
    target = sizes[4] + 6000
    assert target < sizes[8]
    found = lillama_core.quantize(
        tmp_path / "low", tmp_path / "fits", target_size=target, calibration=calibration_text, quiet=True, **DATA
    )
    assert found.bytes_after <= target
    assert found.with_feedback > 0
    assert set(found.matrices) == {"4", "8"}


def test_tables_are_the_last_to_go(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dense", hidden_size=96, intermediate_size=160, dtype=torch.float16)
    lillama_core.quantize(folder, tmp_path / "least", bits=4, embedding_bits=4, quiet=True)
    least = (tmp_path / "least" / "model.safetensors").stat().st_size
    found = lillama_core.quantize(folder, tmp_path / "fits", target_size=least + 8000, quiet=True)
    assert found.bytes_after <= least + 8000
    said = json.loads((tmp_path / "fits" / "config.json").read_text())["quantization_config"]["quantization"]["bits"]
    assert "model.embed_tokens" in said["4"]
    for size, message in (
        (least // 2, "cannot be met: in 4 bits throughout .* takes ranks away"),
        (10**9, "as they are"),
    ):
        with pytest.raises(UserError, match=message):
            lillama_core.quantize(folder, tmp_path / "never", target_size=size, quiet=True)
    assert not list(tmp_path.glob("never*"))


def test_what_rounding_costs_is_relative_to_what_is_read() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(16, 64), correlated(64)
    moment = x.T @ x / len(x)
    packing, packed = quantize(weight, 4, moment.diagonal())
    outputs, lost = x @ weight.T, x @ (weight - packing.dense(packed, torch.float32)).T
    expected = lost.square().sum() / outputs.square().sum()
    assert relative_error(weight, moment) == pytest.approx(expected.item(), rel=1e-3)
    # A power of two changes no digit.
    assert relative_error(1024 * weight, moment) == pytest.approx(expected.item(), rel=1e-3)
    assert relative_error(torch.zeros(16, 64), moment) == 0
    assert relative_error(weight, None) == pytest.approx(relative_error(weight, 7 * torch.eye(64)), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "4096"], "--tokens does nothing without --calibration"),
        (["--device", "cpu"], "--device does nothing without --calibration"),
        (["--calibration", "no-such-file.txt", "--bits", "4"], "no-such-file.txt"),
        (["--calibration", "TEXT"], "--calibration does nothing in 8 bits"),
        (["--calibration", "TEXT", "--embedding-bits", "4"], "--calibration does nothing in 8 bits"),
        (["--calibration", "TEXT", "--bits", "4", "--tokens", "0"], "tokens"),
        (["--target-size", "1MB", "--bits", "4"], "--bits is not allowed with --target-size"),
        (["--target-size", "1MB", "--embedding-bits", "4"], "--embedding-bits is not allowed with --target-size"),
        (["--target-size", "small"], "--target-size must be a size such as"),
        (["--target-size", "1kB"], "in 4 bits throughout"),
    ],
)
def test_mistakes_are_one_line(
    tiny_model: Path, calibration_text: Path, run_cli: Cli, tmp_path: Path, arguments: list[str], said: str
) -> None:
    words = [str(calibration_text) if word == "TEXT" else word for word in arguments]
    assert said in run_cli("quantize", tiny_model, "-o", tmp_path / "new", *words).error
    assert not list(tmp_path.glob("*new*"))


def test_mistakes_from_python(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no option 'token'.*tokens"):
        lillama_core.quantize(tiny_model, tmp_path / "new", bits=4, calibration=calibration_text, token=5)
    with pytest.raises(UserError, match="samples= does nothing without"):
        lillama_core.quantize(tiny_model, tmp_path / "new", bits=4, samples=5)
    assert not list(tmp_path.glob("*new*"))
