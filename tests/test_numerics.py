"""Weights and data at the edge of what numbers are: a good result or one clear line, and never NaN on disk.

Results that are as good as they can be: of weights that few factors hold exactly, the loss is next to nothing. The same
request gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, QUICK_ANYHOW, WEIGHTS_ONLY, Ended
from safetensors.torch import load_file

Cli = Callable[..., Ended]
MakeModel = Callable[..., Path]


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """The maps within the blocks."""
    return {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}


def every_map(change: Callable[[torch.Tensor], object]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        for weight in matrices(model).values():
            change(weight)

    return run


def one_map(change: Callable[[torch.Tensor], object], name: str = "up_proj") -> Callable[[Any], None]:
    def run(model: Any) -> None:
        for path, weight in matrices(model).items():
            if f"layers.1.mlp.{name}" in path or f"layers.1.self_attn.{name}" in path:
                change(weight)

    return run


def embedding(change: Callable[[torch.Tensor], object]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        change(model.model.embed_tokens.weight)

    return run


def low_rank(weight: torch.Tensor) -> None:
    weight.copy_(torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1])) / 10)


def one_large(value: float) -> Callable[[torch.Tensor], object]:
    def change(weight: torch.Tensor) -> None:
        weight[3, 5] = value

    return change


@dataclass(frozen=True)
class Case:
    """A change of a tiny model, and what compressing it must say; nothing: that it succeeds."""

    change: Callable[[Any], None]
    said: str = ""
    surely: bool = True
    """Whether it must; else rounding decides, which differs between processors, and it may succeed."""


USELESS = "has no effect on what its block gives"
CASES = {
    "every map of rank one": Case(every_map(low_rank)),
    "one map zero": Case(one_map(torch.Tensor.zero_)),
    "one map of attention zero": Case(one_map(torch.Tensor.zero_, "v_proj")),
    "every map zero": Case(every_map(torch.Tensor.zero_), USELESS),
    "every map constant": Case(every_map(lambda w: w.fill_(0.01))),
    "embedding zero": Case(embedding(torch.Tensor.zero_), USELESS),
    "embedding constant": Case(embedding(lambda w: w.fill_(0.5)), USELESS, surely=False),
    "embedding of rank one": Case(embedding(low_rank)),
    "half of the rows zero": Case(every_map(lambda w: w[::2].zero_())),
    "half of the columns zero": Case(every_map(lambda w: w[:, ::2].zero_())),
    "rows alike": Case(every_map(lambda w: w.copy_(w[:1].expand_as(w)))),
    "one number large": Case(one_map(one_large(1e6))),
    "every map times 1e4": Case(every_map(lambda w: w.mul_(1e4)), USELESS, surely=False),
    "one map times 1e15": Case(one_map(lambda w: w.mul_(1e15))),
    "one map times 1e30": Case(one_map(lambda w: w.mul_(1e30)), "infinite"),
    "every map times 1e-6": Case(every_map(lambda w: w.mul_(1e-6))),
    "every map times 1e-20": Case(every_map(lambda w: w.mul_(1e-20)), USELESS),
    "every map below the normal numbers": Case(every_map(lambda w: w.mul_(1e-39)), USELESS),
    "embedding times 1e-20": Case(embedding(lambda w: w.mul_(1e-20))),
    "embedding times 1e15": Case(embedding(lambda w: w.mul_(1e15))),
    "one number not a number": Case(one_map(one_large(float("nan"))), "holds NaN or infinite values"),
    "one number infinite": Case(one_map(one_large(float("inf"))), "holds NaN or infinite values"),
}
RECIPES = {"default": QUICK, "whitened": (*QUICK_ANYHOW, "--init", "whitened"), "weights alone": WEIGHTS_ONLY}


def check(ended: Ended, output: Path, said: str, surely: bool = True) -> None:
    """One line that says what is wrong and nothing written, or a directory without NaN."""
    if said and (surely or ended.status):
        assert ended.status in (1, 2), ended
        assert said in ended.stderr.splitlines()[-1]
    if ended.status:
        assert ended.stderr.splitlines()[-1].startswith("lillama: error: ")
        assert "Traceback" not in ended.stderr
        assert "Error: " not in ended.stderr
        assert not output.exists()
        return
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.isfinite(tensor.float()).all(), name
    # As JSON has it: neither NaN nor Infinity.
    json.loads((output / "lillama.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the record"))


@pytest.mark.parametrize(
    ("name", "recipe"), [(n, r) for i, n in enumerate(CASES) for r in RECIPES if r == "default" or i % 4 == 2]
)
def test_odd_weights(
    run_cli: Cli, make_model: MakeModel, calibration_text: Path, tmp_path: Path, name: str, recipe: str
) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    model = make_model(tmp_path / "odd", change=case.change)
    words = ("compress", model, "-o", tmp_path / "o", "--calibration", calibration_text, *RECIPES[recipe])
    ended = run_cli(*words)
    if not case.said:
        assert ended.status == 0, ended
    check(ended, tmp_path / "o", case.said, case.surely)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_a_product_overflows(
    run_cli: Cli, make_model: MakeModel, calibration_text: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model(tmp_path / "odd", dtype=dtype, change=one_map(lambda w: w.mul_(1e5)))
    check(
        run_cli("compress", model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK), tmp_path / "o", ""
    )


def test_calibration_of_one_token_over_and_over(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Every row is the same: all moments have the rank of a row."""
    (tmp_path / "a.txt").write_text(" the" * 3000)
    ended = run_cli("compress", tiny_model, "-o", tmp_path / "o", "--calibration", tmp_path / "a.txt", *QUICK)
    assert ended.status == 0, ended
    check(ended, tmp_path / "o", "")


def test_a_vocabulary_of_one(run_cli: Cli, make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    """Whatever is predicted is certain: nothing can be lost, and nothing says what matters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    odd = make_model(tmp_path / "odd", vocab_size=1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(odd)
    ended = run_cli("compress", odd, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK)
    check(ended, tmp_path / "o", USELESS)


def test_the_same_request_gives_the_same_bytes(
    run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """With the same number of threads; another number rounds sums otherwise, and may choose other ranks."""
    found = []
    for name in ("a", "b"):
        ended = run_cli("compress", tiny_model, "-o", tmp_path / name, "--calibration", calibration_text, *QUICK)
        assert ended.status == 0, ended
        found.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors"))})
    assert found[0] == found[1]
