"""Weights in few bits: rounding, the layout, loading and saving by transformers, and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from conftest import WEIGHTS_ONLY, Ended, environment, tree
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.errors import LillamaError, UserError
from lillama_core.evaluation.metrics.decoding import parameter_count
from lillama_core.formats import FactoredLinear
from lillama_core.output.quantizer import parse_bits
from lillama_core.pipeline.quantize import level_factors
from lillama_core.quantization.modules import QuantizedLinear, product
from lillama_core.quantization.packing import Packing, packing_of
from lillama_core.quantization.rounding import quantize
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

Cli = Callable[..., Ended]
TOKENS = torch.arange(2, 34)[None]


def unpacked(stored: np.ndarray, rows: int, columns: int, bits: int) -> np.ndarray:
    """The matrix that bytes on disk stand for, read number by number as the layout says."""
    groups = 1 if bits == 8 else (columns + 31) // 32
    halves = stored[: 2 * rows * groups].view("<u2").astype("<u4") << 16
    scales = halves.view("<f4").reshape(rows, groups)
    codes = stored[(2 * rows * groups + 63) // 64 * 64 :].reshape(rows, -1)
    found = np.zeros((rows, columns), dtype=np.float32)
    for i in range(rows):
        for j in range(columns):
            if bits == 8:
                found[i, j] = scales[i, 0] * codes[i, j].astype(np.int8)
            else:
                group, place = divmod(j, 32)
                byte = codes[i, 16 * group + place % 16]
                found[i, j] = scales[i, group] * (int(byte >> 4 if place >= 16 else byte & 15) - 8)
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 64), (3, 33), (1, 1), (7, 95)])
def test_bytes_hold_what_the_layout_says(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packing, packed = quantize(weight, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packing.nbytes,)
    dense = packing.dense(packed, torch.float32)
    assert np.array_equal(dense.numpy(), unpacked(packed.numpy(), *shape, bits))
    ids = torch.tensor([[0, shape[0] - 1], [0, 0]])
    assert torch.equal(packing.some_rows(packed, ids, torch.float32), dense[ids])


def test_eight_bits_are_off_by_half_a_step_and_zeros_stay() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 50) * torch.logspace(-30, 3, 20)[:, None]
    weight[3] = 0
    packing, packed = quantize(weight, 8)
    dense = packing.dense(packed, torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    # The scale is rounded to bfloat16, by which the largest entry may be cut off.
    assert ((dense - weight).abs() <= largest * (0.5 / 127 + 2**-8)).all()
    assert torch.equal(dense[3], weight[3])


def test_four_bits_are_never_further_off_than_plain_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96) ** 3
    packing, packed = quantize(weight, 4)
    error = (packing.dense(packed, torch.float32) - weight).view(40, 3, 32).square().sum(-1)
    groups = weight.view(40, 3, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
    assert (error <= plain * (1 + 1e-5)).all()
    assert error.sum() < 0.9 * plain.sum()


def test_few_columns_take_the_bits_that_are_fewer_bytes() -> None:
    assert packing_of(torch.empty(10, 64), 4).bits == 4
    assert packing_of(torch.empty(10, 5), 4).bits == 8
    assert Packing(10, 64, 4).nbytes == 64 + 10 * 32


@pytest.mark.parametrize("columns", [64, 33, 8])
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_a_product_is_that_of_the_unpacked_matrix(columns: int, rows: int) -> None:
    """On a CPU in bfloat16 some of these shapes go through a kernel of their own."""
    torch.manual_seed(0)
    packing, packed = quantize(torch.randn(19, columns), 8)
    # A part of wider rows, as low-rank maps take it.
    x, bias = torch.randn(2, rows, columns + 9).bfloat16()[..., 9:], nn.Parameter(torch.randn(19).bfloat16())
    with torch.no_grad():
        found = product(x, packing, packed, bias)
        expected = x.float() @ packing.dense(packed, torch.float32).T + bias.float()
    assert found.shape == (2, rows, 19)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_gradients_reach_what_a_layer_reads() -> None:
    packing, packed = quantize(torch.randn(6, 32), 4)
    layer = QuantizedLinear(packing, packed, None, torch.float32)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def with_rounded_weights(model: Any, folder: Path) -> Any:
    """``model``, dense, with the matrices that the bytes in ``folder`` stand for, found by their names alone."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["quantization"]["bits"]
    bits = {path: int(b) for b, paths in said.items() for path in paths}
    with safe_open(folder / "model.safetensors", "np") as file:
        for path, b in bits.items():
            weight = model.get_submodule(path).weight
            transposed = type(model.get_submodule(path)).__name__ == "Conv1D"
            shape = tuple(weight.T.shape if transposed else weight.shape)
            found = torch.from_numpy(unpacked(file.get_tensor(f"{path}.weight"), *shape, b))
            weight.data.copy_(found.T if transposed else found)
    return model


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    ("gpt2", {}),
    ("gemma2", {"head_dim": 8}),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_a_dense_model_computes_with_the_rounded_weights(
    family: str, changes: dict[str, Any], bits: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "dense", family, initializer_range=0.3, **changes)
    found = lillama_core.quantize(folder, tmp_path / "small", bits=bits, embedding_bits=bits, quiet=True)
    assert found.bytes_after < (0.35 if bits == 8 else 0.25) * found.bytes_before
    expected = with_rounded_weights(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        # The order of the multiplications is another.
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert model(TOKENS).logits.std() > 0.01
    # Without its head.
    base = type(model.base_model).from_pretrained(tmp_path / "small")
    with torch.no_grad():
        states = expected.base_model(TOKENS).last_hidden_state
        torch.testing.assert_close(base(TOKENS).last_hidden_state, states, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def embedded(_tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with low-rank maps in the format ``factored``, and its table in bands."""
    output = tmp_path_factory.mktemp("embedded") / "small"
    options = dict(zip([o[2:].replace("-", "_") for o in WEIGHTS_ONLY[::2]], WEIGHTS_ONLY[1::2], strict=True))
    lillama_core.compress(
        _tiny_model, output, calibration=calibration_text, quiet=True,
        **{**options, "recipe": "fast", "format": "factored", "compress_embeddings": True, "reduction": 0.3},
    )  # fmt: skip
    return output


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("which", ["compressed", "embedded"])
def test_a_compressed_model_loads_generates_and_is_saved_again(
    which: str, bits: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(which)
    small = tmp_path / "small"
    lillama_core.quantize(folder, small, bits=bits, quiet=True)
    before, model = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, small))
    with torch.no_grad():
        was, found = before(TOKENS).logits, model(TOKENS).logits
    assert 0 < (found - was).norm() < (0.05 if bits == 8 else 0.5) * was.norm()
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 35)
    half = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    with torch.no_grad():
        assert half(TOKENS).logits.dtype == torch.bfloat16
        assert (half(TOKENS).logits - found).norm() < 0.05 * found.norm()
        # Cast after it was loaded, the bytes stand for the same numbers.
        torch.testing.assert_close(half.float()(TOKENS).logits, found, rtol=0.05, atol=0.05)
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(tmp_path / "again")
    (stored,) = {(f / "model.safetensors").read_bytes() for f in (small, tmp_path / "again")}
    assert stored
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)(TOKENS).logits
    assert torch.equal(again, found)


def test_factors_are_levelled_without_a_change_of_what_they_compute(embedded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).requires_grad_(False)
    maps = {path: m.weight for path, m in model.named_modules() if isinstance(m, FactoredLinear)}
    assert maps
    level_factors(model)
    for path, before in maps.items():
        module = model.get_submodule(path)
        torch.testing.assert_close(module.weight, before, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.up.weight.norm(dim=0), torch.ones(module.down.out_features))


def test_parameters_in_few_bits_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    lillama_core.quantize(tiny_model, tmp_path / "small", bits=4, quiet=True)
    dense, small = lillama_core.load(tiny_model), lillama_core.load(tmp_path / "small")
    assert parameter_count(small) == parameter_count(dense) == sum(p.numel() for p in dense.parameters())


def test_experts_are_taken_apart_but_their_router_is_left(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dense", "mixtral", num_local_experts=4, initializer_range=0.3)
    found = lillama_core.quantize(folder, tmp_path / "small", quiet=True)
    # 4 maps of attention and 2 x 4 of experts in each of two blocks, and the table.
    assert found.matrices == {"8": 2 * (4 + 8) + 1}
    dense, model = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "small"))
    with torch.no_grad():
        was, now = dense(TOKENS).logits, model(TOKENS).logits
    assert 0 < (now - was).norm() < 0.05 * was.norm()
    assert torch.equal(dense.model.layers[0].mlp.gate.weight, model.model.layers[0].mlp.gate.weight)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "small" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("model_type", ["whisper", "mamba"])
def test_other_families_are_quantised(model_type: str, tmp_path: Path) -> None:
    architecture = registry().architectures_for(model_type)[0]
    folder = make_tiny_model(architecture, model_type, tmp_path / "dense").folder
    # The fresh process that loads it compares the outputs.
    found = lillama_core.quantize(folder, tmp_path / "small", quiet=True)
    assert found.matrices["8"] > 4
    dense, small = lillama_core.load(folder), lillama_core.load(tmp_path / "small")
    assert sum(isinstance(m, QuantizedLinear) for m in small.modules()) > 3
    kept = {n: p for n, p in small.named_parameters() if p.is_floating_point()}
    assert kept
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in kept.items())


def test_the_command_leaves_a_directory_that_is_evaluated(compressed: Path, run_cli: Cli, tmp_path: Path) -> None:
    before, small = tree(compressed), tmp_path / "small"
    done = run_cli("quantize", compressed, "--output", small, "--bits", "4")
    assert done.status == 0, done
    assert tree(compressed) == before
    record = json.loads((small / "lillama.json").read_text())
    size = (small / "model.safetensors").stat().st_size
    assert record["quantization"]["bytes_after"] == record["bytes"]["compressed"] == size
    assert f"{size:,} bytes" in (small / "README.md").read_text()
    assert "in 4 bits" in done.stdout
    done = run_cli("evaluate", small, "--windows", "2", "--sequence-length", "16", "--limit", "2", "-q")
    assert done.status == 0
    assert "perplexity" in done.stdout
    assert "exists" in run_cli("quantize", compressed, "--output", small).error
    assert run_cli("quantize", compressed, "--output", small, "--overwrite", "-q").status == 0
    assert json.loads((small / "lillama.json").read_text())["quantization"]["bits"] == 8


def test_a_dense_result_has_a_card_and_keeps_what_is_left_out(tiny_model: Path, run_cli: Cli, tmp_path: Path) -> None:
    small = tmp_path / "small"
    out = ("model.layers.0", "model.embed_tokens")
    done = run_cli("quantize", tiny_model, "-o", small, *(word for name in out for word in ("--exclude", name)), "-q")
    assert done.status == 0, done
    dense, model = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny_model, small))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(dense.get_parameter(name), model.get_parameter(name))
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)
    assert "in 8 bits" in (small / "README.md").read_text()
    assert str(tmp_path) not in (small / "README.md").read_text() + (small / "lillama.json").read_text()
    assert "there is no compression to repeat" in run_cli("reproduce", small).error


def test_what_an_ended_run_leaves(
    tiny_model: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing where it ends by itself, even by Ctrl-C; what a killed one has left is replaced, not gone on with."""

    def ended(*_: Any) -> None:
        assert (tmp_path / "small.partial" / "result" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lillama_core.pipeline.quantize.check_reload", ended)
        with pytest.raises(KeyboardInterrupt):
            lillama_core.quantize(tiny_model, tmp_path / "small", quiet=True)
    assert not list(tmp_path.glob("small*"))
    (tmp_path / "small.partial").mkdir()
    (tmp_path / "small.partial" / "run.json").write_text("{}")
    assert run_cli("quantize", tiny_model, "-o", tmp_path / "small").error.endswith("; pass --overwrite to start anew")
    with pytest.raises(UserError, match=r"; pass overwrite=True to start anew$"):
        lillama_core.quantize(tiny_model, tmp_path / "small")
    lillama_core.quantize(tiny_model, tmp_path / "small", overwrite=True, quiet=True)
    assert not list(tmp_path.glob("small.*"))


def test_transformers_alone_refuses(tiny_model: Path, tmp_path: Path) -> None:
    lillama_core.quantize(tiny_model, tmp_path / "small", quiet=True)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "small")]
    done = warm.run(command, plain=True, capture_output=True, text=True, env=environment())
    assert done.returncode != 0
    assert "mismatch" in done.stderr


def test_what_is_quantised_is_not_compressed_trained_or_quantised_again(
    compressed: Path, calibration_text: Path, run_cli: Cli, tmp_path: Path
) -> None:
    small, new = tmp_path / "small", tmp_path / "new"
    assert run_cli("quantize", compressed, "-o", small, "-q").status == 0
    assert "quantised already" in run_cli("quantize", small, "-o", new).error
    assert "is already compressed" in run_cli("compress", small, "-o", new, "--calibration", calibration_text).error
    said = run_cli("finetune", small, "-o", new, "--objective", "lm", "--data", calibration_text).error
    assert "is quantised" in said
    assert not new.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "3"], "--bits must be 8 or 4, not 3"),
        (["--embedding-bits", "16"], "--embedding-bits must be 8 or 4, not 16"),
        (["--exclude", "model.layers.9"], "--exclude model.layers.9: the model has no such module"),
        (["--exclude", "model"], "has no linear layer or table whose weights could be held in few bits"),
    ],
)
def test_mistakes_are_one_line(tiny_model: Path, run_cli: Cli, tmp_path: Path, arguments: list[str], said: str) -> None:
    more = ["--exclude", "lm_head"] if arguments[-1] == "model" else []
    assert said in run_cli("quantize", tiny_model, "-o", tmp_path / "new", *arguments, *more).error
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {},
        {"group": 32},
        {"group": 64, "bits": {"8": []}},
        {"group": 32, "bits": {"3": []}},
        {"group": 32, "bits": {"8": "model"}},
        {"group": 32, "bits": {"8": [1]}},
        {"group": 32, "bits": [8]},
    ],
)
def test_an_entry_of_a_config_that_says_nonsense_is_refused(entry: Any) -> None:
    with pytest.raises(LillamaError, match=r"quantised model|lists of paths"):
        parse_bits(entry)


def test_a_config_that_names_what_holds_no_matrix_is_refused(tiny_model: Path, tmp_path: Path, run_cli: Cli) -> None:
    small = tmp_path / "small"
    lillama_core.quantize(tiny_model, small, quiet=True)
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["quantization"]["bits"]["8"].append("model.norm")
    (small / "config.json").write_text(json.dumps(config))
    done = run_cli("bench", small)
    assert (done.status, "'model.norm' is a LlamaRMSNorm" in done.stderr) == (2, True)
    with pytest.raises(UserError, match="norm"):
        lillama_core.load(small)
