"""Mixtures of experts from transformers: whole runs, their files, and where their tokens go."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import QUICK, WEIGHTS_ONLY, Ended, environment
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lillama_core import EvaluationOptions, LillamaError, Subject
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.expert_modules import LowRankExperts
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.models.loading import count_parameters
from lillama_core.output.quantizer import LillamaConfig, LillamaHfQuantizer
from lillama_core.strategies import make
from lillama_plugins.mixtral.routing import Routing, agreement, choices, token_shares

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    # The first layer has a plain MLP and no router.
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "mlp_only_layers": [0],
    },
    # Biases, transposed matrices, a gate of its own, and a router with another name.
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
}
SVD = WEIGHTS_ONLY
"""Options that leave out what the core does alike for every family."""


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense(family)``: a random model of two layers whose experts matter as much as its attention."""
    made: dict[str, Path] = {}

    def grow(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "head" not in name:
                parameter.mul_(8)

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("moe") / family
            made[family] = make_model(folder, family, change=grow, **FAMILIES[family])
        return made[family]

    return get


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 384, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_rank_equals_dense_and_generates_the_same(family: str, dense: Callable[[str], Path]) -> None:
    model = load(dense(family))
    compressed = copy.deepcopy(model)
    blocks = find_blocks(find_architecture(model.config), compressed)["decoder"]
    names = set()
    for block in blocks:
        module = compressed.get_submodule(block.path)
        for target in block.targets:
            layers = {}
            for map_ in target.maps:
                names.add(map_.name)
                U, S, Vt = torch.linalg.svd(target.weight(module, map_).double().detach(), full_matrices=False)
                bias = target.bias(module, map_)
                layers[map_.name] = make("formats", "factored").from_factors((U * S).float(), Vt.float(), bias)
            target.replace(module, layers)
    assert not any("gate" in name.split(".") or "shared_expert_gate" in name for name in names)
    assert ("mlp.shared_expert.up_proj" in names) == (family == "qwen2_moe")
    with torch.no_grad():
        torch.testing.assert_close(compressed(tokens()).logits, model(tokens()).logits, rtol=1e-3, atol=1e-3)
        compressed.train()
        torch.testing.assert_close(compressed(tokens()).logits, model(tokens()).logits, rtol=1e-3, atol=1e-3)
    compressed.eval()
    ids = torch.ones_like(tokens())
    found = [m.generate(tokens(), attention_mask=ids, max_new_tokens=6, do_sample=False) for m in (compressed, model)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", ()),
        ("qwen2_moe", (*SVD, "--format", "factored")),
        ("qwen3_moe", ()),
        ("olmoe", SVD),
        ("gpt_oss", ("--exclude", "mlp.experts.down.1")),
        ("mixtral", ("--share-experts", "--format", "factored")),
        ("mixtral", ("--share-experts", "--format", "pivoted", *SVD)),
        ("mixtral", ("--exclude", "self_attn.*", "--exclude", "mlp.experts.down.*", *SVD)),
    ],
)
def test_compress_load_save_again_and_fail_without_lillama(
    family: str,
    options: tuple[str, ...],
    dense: Callable[[str], Path],
    calibration_text: Path,
    tmp_path: Path,
    run_cli: Callable[..., Ended],
) -> None:
    out = tmp_path / "out"
    done = run_cli("compress", dense(family), "-o", out, "--reduction", "0.2", "--calibration", calibration_text,
                   *(options if "svd" in options else (*QUICK, *options)))  # fmt: skip
    # The run itself has loaded the result in a fresh process and compared outputs.
    assert done.status == 0, done
    record = json.loads((out / "lillama.json").read_text())
    loaded = load(out)
    assert count_parameters(loaded) == record["parameters"]["parameters_after"]
    ranks = {n: r for n, r in record["plan"]["ranks"].items() if ".experts." in n}
    counts = {n: c for n, c in record["plan"]["channels"].items() if ".experts." in n}
    assert ranks or counts
    # Some more than others, some not at all.
    untouched = [n for n in record["shapes"] if ".experts." in n and n not in ranks and f"{n}.channels" not in counts]
    assert untouched or len({*ranks.values(), *counts.values()}) > 1 or "svd" in options
    kinds = {entry["kind"] for entry in loaded.config.quantization_config.targets.values()}
    assert ("shared-experts" if "--share-experts" in options else "experts") in kinds

    # The names of the fused parameters, as the family has them on disk, go to matrices of two dimensions.
    with safe_open(str(out / "model.safetensors"), "pt") as file:
        fused = [k for k in file.keys() if k.endswith((".gate_up_proj", ".experts.down_proj"))]  # noqa: SIM118
        assert len(fused) >= 2
        assert {len(file.get_slice(k).get_shape()) for k in fused} == {2}
    for folder in ("again", "once-more"):
        loaded.save_pretrained(tmp_path / folder)
        again = load(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)
        loaded = again
    assert (tmp_path / "once-more/model.safetensors").stat().st_size == (out / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def compressed(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A Mixtral whose second router never picks the last expert, compressed; and the lines that the run printed."""

    def starve(model: Any) -> None:
        # Logits are linear in the hidden states: of x, x, -x, -x and 0 the last is never among the two largest.
        gate = model.model.layers[1].mlp.gate.weight
        gate.copy_(torch.stack([gate[0], gate[0], -gate[0], -gate[0], 0 * gate[0]]))

    spoilt = make_model(
        tmp_path_factory.mktemp("spoilt") / "mixtral",
        "mixtral",
        change=starve,
        intermediate_size=48,
        num_local_experts=5,
    )
    out = spoilt.parent / "out"
    command = [sys.executable, "-m", "lillama_core", "compress", str(spoilt), "-o", str(out), *QUICK]
    command += ["--calibration", str(calibration_text), "--reduction", "0.2", "--format", "factored"]
    done = warm.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done
    return out, (done.stdout + done.stderr).splitlines()


def test_a_loader_without_lillama_stops(compressed: tuple[Path, list[str]]) -> None:
    script = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(compressed[0])!r})\n"
        "print('loaded')"
    )
    done = warm.run(
        [sys.executable, "-c", script], plain=True, capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "RuntimeError" in done.stderr


def test_an_expert_that_no_token_reached_is_named_and_survives(compressed: tuple[Path, list[str]]) -> None:
    out, lines = compressed
    record = json.loads((out / "lillama.json").read_text())
    seen = record["rows_seen"]
    starved = [name for name, rows in seen.items() if not rows]
    assert starved == [f"model.layers.1.mlp.experts.{part}.4" for part in ("gate_up", "down")]
    assert len(seen) == 2 * 2 * 5
    (line,) = [text for text in lines if "saw no row" in text]
    assert line.startswith("2 maps of experts saw no row")
    assert starved[0] in line
    # Each token goes to two experts.
    tokens = record["data"]["parts"]["fit"]["rows"] * 32
    for part in ("gate_up", "down"):
        counted = [seen[f"model.layers.0.mlp.experts.{part}.{e}"] for e in range(5)]
        assert sum(counted) == 2 * tokens
    experts = load(out).model.layers[1].mlp.experts
    assert isinstance(experts, LowRankExperts)
    for layer in (experts.gate_up_maps[4], experts.down_maps[4]):
        assert torch.isfinite(layer.weight).all()
    assert "mlp.experts.gate_up" in (out / "report.html").read_text()


def test_plan_shows_experts_as_ranges_and_counts_what_a_token_uses(
    dense: Callable[[str], Path], run_cli: Callable[..., Ended]
) -> None:
    done = run_cli("plan", dense("mixtral"), "--reduction", "0.2")
    assert done.status == 0
    rows = [line for line in done.stdout.splitlines() if "mlp.experts" in line]
    assert len(rows) == 2
    numbers = next(line for line in done.stdout.splitlines() if line.startswith("multiply-adds")).replace(",", "")
    attention, expert = 32 * 32 * 2 + 32 * 16 * 2, 96 * 32 + 32 * 48
    # The head, which is tied to the embedding, is multiplied by as well.
    head = 384 * 32
    assert str(2 * (attention + 2 * expert) + head) in numbers


def test_share_experts_wants_experts(tiny_model: Path, run_cli: Callable[..., Ended]) -> None:
    assert "has no experts" in run_cli("plan", tiny_model, "--share-experts").error


def test_layers_without_a_router_are_found_too(dense: Callable[[str], Path]) -> None:
    model = load(dense("qwen3_moe"))
    first, second = find_blocks(find_architecture(model.config), model, choice=MapChoice())["decoder"]
    assert [m.name for m in first.maps if m.name.startswith("mlp")] == [
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert sum(m.name.startswith("mlp.experts") for m in second.maps) == 8


def test_routing_is_counted_and_compared(
    dense: Callable[[str], Path], tiny_tokenizer: Any, calibration_text: Path, tmp_path: Path
) -> None:
    model = load(dense("mixtral"))
    options = EvaluationOptions(data=str(calibration_text), sequence_length=32, windows=3, details=tmp_path / "1-dense")
    first = Subject("dense", model, tiny_tokenizer)
    (share,) = Routing().measure(first, options, lambda line: None)
    assert share.name == "routing/smallest_share"
    shares = torch.tensor(first.notes["tokens_per_expert"])
    torch.testing.assert_close(shares.sum(1), torch.full((2,), 2.0))
    assert share.value == pytest.approx(100 * shares.min().item())
    # By hand, from the router's own weights and the states that enter it.
    chosen = first.notes["routing"]
    entering: list[torch.Tensor] = []
    gate = model.model.layers[0].mlp.gate
    with gate.register_forward_pre_hook(lambda _, x: entering.append(x[0])), torch.no_grad():
        from lillama_core.data.sources import Source
        from lillama_core.data.text.calibration import load_text_windows

        rows = load_text_windows(Source(str(calibration_text)), tiny_tokenizer, 32, 3)
        for row in rows:
            model(row[None])
    expected = (torch.cat(entering) @ gate.weight.T).topk(2).indices
    assert torch.equal(chosen[0].long().sort(-1).values, expected.sort(-1).values)

    same = Routing().measure(Subject("same", model, tiny_tokenizer, baseline=first), options, lambda line: None)
    assert [m.value for m in same if m.name == "routing/agreement"] == [100.0]
    # What was written says the same; other text of the same length is no ground for a comparison.
    known = Subject("1-dense", None, None, notes=Routing().load_saved(tmp_path / "1-dense"))
    kept_apart = Routing().measure(Subject("same", model, tiny_tokenizer, baseline=known), options, print)
    assert kept_apart == same
    known.notes["routed_tokens"] += 1
    lines: list[str] = []
    (alone,) = Routing().measure(Subject("same", model, tiny_tokenizer, baseline=known), options, lines.append)
    assert alone == share
    assert lines[-1].endswith("not compared")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.neg_()
    other = Routing().measure(Subject("other", model, tiny_tokenizer, baseline=first), options, lambda line: None)
    (found,) = [m.value for m in other if m.name == "routing/agreement"]
    now, experts = choices(model, rows, torch.device("cpu"))
    assert experts == 4
    kept = [
        len(set(a) & set(b)) / 2 for a, b in zip(now.view(-1, 2).tolist(), chosen.view(-1, 2).tolist(), strict=True)
    ]
    assert found == pytest.approx(100 * sum(kept) / len(kept))
    assert found < 60


def test_a_family_member_without_experts_has_no_routing(
    make_model: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path
) -> None:
    settings = {**FAMILIES["qwen3_moe"], "mlp_only_layers": [0, 1]}
    subject = Subject("dense", load(make_model(tmp_path / "all-dense", "qwen3_moe", **settings)), tiny_tokenizer)
    options = EvaluationOptions(data=str(calibration_text), sequence_length=32, windows=1)
    assert Routing().measure(subject, options, lambda line: None) == []


def test_a_config_that_shares_experts_in_a_format_that_cannot_is_refused() -> None:
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=4, num_local_experts=2, num_hidden_layers=1, vocab_size=16,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    entry = {"kind": "shared-experts", "format": "pivoted", "ranks": {"gate_up": 2, "down": 2}}
    quantizer = LillamaHfQuantizer(LillamaConfig({"model.layers.0.mlp.experts": entry}), pre_quantized=True)
    with pytest.raises(LillamaError, match="pivoted"):
        quantizer._process_model_before_weight_loading(model)


def test_shares_and_agreement_of_a_small_table() -> None:
    chosen = torch.tensor([[[0, 1], [1, 2]]])
    assert token_shares(chosen, 4).tolist() == [[0.5, 1.0, 0.5, 0.0]]
    assert agreement(chosen, torch.tensor([[[1, 0], [0, 2]]])) == 0.75
