"""Channels taken out of experts: found in every layout, proved by trying, planned for, stored and loaded again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, Ended
from test_mixtral import FAMILIES as EVERY_FAMILY
from torch import nn
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.channels import are_channels, filled, layers_without, weight_of
from lillama_core.architecture.targets.expert_modules import LowRankExperts, gated, takes_turns
from lillama_core.architecture.targets.experts import ExpertsTarget, find_targets
from lillama_core.distillation.finished_blocks import factored_layers, narrowed
from lillama_core.errors import LillamaError
from lillama_core.formats import FactoredLinear
from lillama_core.initialization import Fisher, MapStatistics
from lillama_core.models.loading import load_config
from lillama_core.models.source import locate
from lillama_core.output.quantizer import LillamaConfig, TargetConfig
from lillama_core.output.shards import compressed_meta_model, quantization_of
from lillama_core.pipeline.spec import prepare
from lillama_core.statistics.store import DecompositionStore

Cli = Callable[..., Ended]
FAMILIES = {name: EVERY_FAMILY[name] for name in ("mixtral", "qwen2_moe", "gpt_oss")}
"""Qwen2's experts are narrower than the stream, with a net of another kind beside them; GPT-OSS has biases, transposed
matrices, and gate and values in turns. Each has four experts."""
REDUCTION = 0.3


@pytest.fixture(scope="module", params=FAMILIES)
def dense(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    def biased(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                nn.init.normal_(parameter, std=0.02)

    family = request.param
    return make_model(tmp_path_factory.mktemp(family) / "dense", family, change=biased, **FAMILIES[family])


TWO = pytest.mark.parametrize("dense", ["mixtral", "gpt_oss"], indirect=True)
"""Between them they have all that the third has."""


@pytest.fixture(scope="module")
def narrow(dense: Path, calibration_text: Path) -> Path:
    options: dict[str, Any] = {"tokens": 1024, "sequence_length": 32, "batch_size": 4, "self_share": 0.0}
    output = dense.parent / "small"
    lillama_core.compress(
        dense, output, calibration=calibration_text, quiet=True, recipe="fast", reduction=REDUCTION, **options
    )
    return output


def record_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "lillama.json").read_text())
    return found


def loaded(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def first_block(dense: Path) -> tuple[Block, nn.Module]:
    block = prepare(str(dense), lillama_core.load_recipe("fast")).blocks["decoder"][0]
    return block, loaded(dense).get_submodule(block.path).requires_grad_(False)


def masked(experts: Any, kept: torch.Tensor) -> Any:
    """A copy of dense experts in which the last matrices read the channels ``kept`` alone."""
    found = copy.deepcopy(experts)
    # [E, H, I], or [E, I, H] where matrices are transposed.
    channels = 1 if found.down_proj.shape[1] * 2 == found.gate_up_proj.shape[2] else 2
    silent = torch.ones(found.down_proj.shape[channels], dtype=torch.bool)
    silent[kept] = False
    found.down_proj.data.index_fill_(channels, silent.nonzero()[:, 0], 0.0)
    return found


def test_taking_out_equals_masking(dense: Path) -> None:
    block, module = first_block(dense)
    experts: Any = module.get_submodule("mlp.experts")
    nets = [c for c in block.channels if ".experts." in c.name]
    assert len(nets) == 4
    kept, layers = torch.tensor([1, 2, 5, 11]), dict[str, nn.Module]()
    for channels in nets:
        sink = weight_of(block, module, channels.sink)[:, kept]
        bias = getattr(experts, "down_proj_bias", None)
        own = None if bias is None else bias[int(channels.sink.name.rpartition(".")[2])]
        layers |= layers_without(block, module, channels, kept, sink, own)
    smaller = block.with_layers(module, layers)
    assert isinstance(smaller.get_submodule("mlp.experts"), LowRankExperts)
    assert module.get_submodule("mlp.experts") is experts
    torch.manual_seed(0)
    x, index = torch.randn(9, 32), torch.randint(0, 4, (9, 2))
    call = (x, index, torch.rand(9, 2))
    expected = masked(experts, kept)(*call)
    assert torch.allclose(smaller.get_submodule("mlp.experts")(*call), expected, atol=1e-6)
    assert not torch.allclose(experts(*call), expected, atol=1e-4)


def test_experts_are_tried_all_together(dense: Path) -> None:
    block, module = first_block(dense)
    assert [len(nets) for nets in block.nets] == ([1, 4] if len(block.channels) == 5 else [4])
    x = torch.randn(2, 6, 32)
    for nets in block.nets:
        sink = nets[0].sink.name.partition("mlp.")[2].partition(".")[0]
        part = block.target_of(nets[0].sink).name.removeprefix("mlp.") if sink == "experts" else "shared_expert"

        def run(changed: nn.Module, part: str = part) -> torch.Tensor:
            net = changed.get_submodule(f"mlp.{part}")
            if part != "experts":
                return net(x)
            return net(x.flatten(0, 1), torch.arange(12)[:, None] % 4, torch.ones(12, 1))

        assert are_channels(block, module, nets, run)


class Mixed(nn.Module):
    """Experts as transformers has them, but for a norm over the channels."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 20, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 10))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(gated(self.act_fn, gate_up), (gate_up.shape[-1] // 2,))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        found = torch.zeros_like(hidden_states)
        for k in range(top_k_index.shape[1]):
            for row, e in enumerate(top_k_index[:, k].tolist()):
                inner = self._apply_gate(self.gate_up_proj[e] @ hidden_states[row])
                found[row] += top_k_weights[row, k] * (self.down_proj[e] @ inner)
        return found


def test_experts_that_mix_channels_are_seen() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"experts": Mixed()}).requires_grad_(False)
    block = Block("stack", 0, "", (ExpertsTarget("experts", net["experts"]),))
    call = (torch.randn(5, 6), torch.randint(0, 2, (5, 1)), torch.rand(5, 1))
    (nets,) = block.nets
    assert not are_channels(block, net, nets, lambda changed: changed.get_submodule("experts")(*call))


def test_an_expert_of_which_a_map_is_left_out_keeps_its_channels(dense: Path) -> None:
    module = loaded(dense).model.layers[0]
    (experts,) = (t for t in find_targets(module, exclude=("mlp.experts.gate_up.1",)) if t.kind == "experts")
    assert [c.sink.name for c in experts.nets()] == ["mlp.experts.down.0", "mlp.experts.down.2", "mlp.experts.down.3"]


def test_how_a_gate_finds_its_numbers_is_found_by_trying() -> None:
    assert not takes_turns(lambda x: gated(torch.sigmoid, x))
    assert takes_turns(lambda x: torch.sigmoid(x[..., ::2]) * (x[..., 1::2] + 1))


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_zeros_stand_for_channels_that_are_gone(runs: int) -> None:
    tensor = torch.arange(1.0, 1 + 2 * runs)[:, None].expand(-1, 4)
    found = filled(tensor, 5 * runs, runs)
    assert found.shape == (5 * runs, 4)
    for run in range(runs):
        assert found[5 * run : 5 * run + 5, 0].tolist() == [2.0 * run + 1, 2.0 * run + 2, 0, 0, 0]


def least_error(metric: torch.Tensor, W: torch.Tensor, H: torch.Tensor, kept: list[int]) -> float:
    """The smallest tr((W - W')^T F (W - W') H) of all W' that read ``kept`` alone, by least squares."""
    L, C = np.linalg.cholesky(metric.numpy()), np.linalg.cholesky(H.numpy())
    target = L.T @ W.numpy() @ C
    best = np.linalg.lstsq(C[kept].T, target.T, rcond=None)[0].T
    return float(((target - best @ C[kept]) ** 2).sum())


@pytest.mark.parametrize("out", [4, 9], ids=["wide", "tall"])
def test_a_narrow_expert_is_weighed_as_a_wide_one(out: int) -> None:
    """Of a map with more outputs than inputs only W^T F W is known."""
    torch.manual_seed(0)
    size, damping = 6, 0.1
    W = torch.randn(out, size, dtype=torch.float64)
    h = torch.randn(200, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    g = torch.randn(200, out, dtype=torch.float64) @ torch.randn(out, out, dtype=torch.float64)
    H, F = h.T @ h / 200, g.T @ g / 200
    scale = float(F.diagonal().mean())
    statistics = MapStatistics(H, W.T @ F @ W if out > size else F, scale, 1.0)
    found = Fisher().eliminate(W, statistics)
    assert found is not None
    ridged = H + damping * H.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    metric = F + damping * scale * torch.eye(out, dtype=torch.float64)
    for count, error in zip(found.curve.counts.tolist(), found.curve.errors.tolist(), strict=True):
        expected = least_error(metric, W, ridged, found.kept(count).tolist())
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_factors_follow_the_channels_that_are_gone(dense: Path, tmp_path: Path) -> None:
    """At full rank factors of a smaller map give that map, on whichever side their vectors are."""
    block, module = first_block(dense)
    store, initializer, generator = DecompositionStore(tmp_path), Fisher(), torch.Generator().manual_seed(0)

    def moment(size: int) -> torch.Tensor:
        rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        return rows.T @ rows / len(rows)

    found, curves, counts, sides = {}, {}, {}, set[bool]()
    nets = {c.sink.name: c for c in block.channels}
    for map_ in block.maps:
        weight = weight_of(block, module, map_)
        tall = map_.out_features > map_.in_features
        F = moment(map_.out_features)
        metric = weight.double().T @ F @ weight.double() if tall else F
        statistics = MapStatistics(moment(map_.in_features), metric, float(F.diagonal().mean()), 1.0)
        found[map_.name] = initializer.decompose(weight, statistics)
        if map_.name in nets:
            sides.add(tall)
            eliminated = initializer.eliminate(weight, statistics)
            assert eliminated is not None
            name = nets[map_.name].name
            store.save_elimination(block, name, eliminated)
            curves[name], counts[name] = eliminated.curve, int(eliminated.curve.counts[3])
    assert sides == ({False} if "mixtral" in str(dense) else {True} if "gpt_oss" in str(dense) else {False, True})
    store.save(block, found, curves=curves)
    ranks = {m.name: m.full_rank for m in block.maps}
    smaller = narrowed(block, module, counts, store)
    layers = factored_layers(block, module, smaller, ranks, counts, store, initializer, 0)
    for map_ in block.maps:
        expected, layer = weight_of(block, smaller, map_), layers[map_.name]
        assert isinstance(layer, FactoredLinear)
        assert layer.weight.shape == expected.shape
        assert torch.allclose(layer.weight, expected, atol=1e-4 * float(expected.abs().max())), map_.name


def test_a_result_has_the_parameters_that_were_planned(narrow: Path) -> None:
    record, model = record_of(narrow), loaded(narrow)
    taken = {path: count for path, count in record["plan"]["channels"].items() if ".experts." in path}
    assert taken
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]["parameters_after"]
    for path, count in taken.items():
        home, _, number = path.removesuffix(".channels").rpartition(".down.")
        experts = model.get_submodule(home)
        assert experts.down_maps[int(number)].in_features == count
        assert experts.gate_up_maps[int(number)].out_features == 2 * count
    assert json.loads((narrow / "config.json").read_text())["quantization_config"]["version"] == 3


@TWO
def test_a_result_is_saved_loaded_exported_and_held_in_few_bits(
    narrow: Path, dense: Path, tmp_path: Path, run_cli: Cli
) -> None:
    ids = torch.arange(12)[None]
    model = loaded(narrow)
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(loaded(tmp_path / "again")(ids).logits, logits)
        assert run_cli("verify", narrow).status == 0
        assert run_cli("export", narrow, "--to", "dense", "--output", tmp_path / "plain").status == 0
        plain = loaded(tmp_path / "plain")
        assert {n: p.shape for n, p in plain.named_parameters()} == {
            n: p.shape for n, p in loaded(dense).named_parameters()
        }
        assert torch.allclose(plain(ids).logits, logits, atol=1e-4)
        assert run_cli("export", narrow, "--to", "standalone", "--output", tmp_path / "alone").status == 0
        alone = loaded(tmp_path / "alone", trust_remote_code=True)
        assert torch.allclose(alone(ids).logits, logits, atol=1e-5)
        assert run_cli("quantize", narrow, "--output", tmp_path / "bits").status == 0
        few = loaded(tmp_path / "bits")(ids).logits
    assert (few - logits).norm() < 0.1 * logits.norm()


@TWO
def test_what_is_smaller_is_healed(narrow: Path, dense: Path, calibration_text: Path, tmp_path: Path) -> None:
    before = loaded(narrow).state_dict()
    lillama_core.finetune(
        narrow, tmp_path / "healed", teacher=dense, calibration=calibration_text, quiet=True, self_share=0.0,
        tokens=1024, sequence_length=32, batch_size=4, learning_rate=1e-5, train="factors",
    )  # fmt: skip
    after = loaded(tmp_path / "healed").state_dict()
    plan = record_of(narrow)["plan"]
    alone = [p.removesuffix(".channels") for p in plan["channels"] if p.removesuffix(".channels") not in plan["ranks"]]
    matrices = [p.replace(".down.", ".down_maps.") for p in alone if ".experts." in p]
    assert matrices
    for path in matrices:
        # No token may have come to an expert.
        assert before[f"{path}.weight"].shape == after[f"{path}.weight"].shape
    assert any(not torch.equal(before[f"{p}.weight"], after[f"{p}.weight"]) for p in matrices)


@pytest.mark.parametrize("dense", ["mixtral"], indirect=True)
def test_streamed_equals_resident(dense: Path, calibration_text: Path, tmp_path: Path, run_cli: Cli) -> None:
    options = ("--calibration", calibration_text, *QUICK, "--recipe", "fast", "--reduction", str(REDUCTION))
    for how in ("--stream", "--no-stream"):
        ended = run_cli("compress", dense, "--output", tmp_path / how[2:], *options, how)
        assert ended.status == 0, ended
    assert record_of(tmp_path / "stream")["plan"]["channels"]
    same = [loaded(tmp_path / name).state_dict() for name in ("stream", "no-stream")]
    assert same[0].keys() == same[1].keys()
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "experts", "shapes": {"down.0": [3, 3]}},
        {"kind": "experts", "format": "factored", "rank": 2, "shapes": {}},
        {"kind": "experts", "format": "factored", "ranks": {}, "shapes": [3, 3]},
        {"kind": "experts", "format": "factored", "ranks": {}, "shapes": {"down.0": [3]}},
        {"kind": "experts", "format": "factored", "ranks": {}, "shapes": {"down.0": [3, -1]}},
        {"kind": "experts", "format": "factored", "ranks": {}, "shapes": {"down.0": [4, 3]}, "runs": 2},
    ],
)
def test_a_config_with_wrong_shapes_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(LillamaError):
        TargetConfig.parse("mlp.experts", entry)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"down.0": [32, 4000]}, "has to be smaller"),
        ({"down.9": [32, 4]}, "has no map 'down.9'"),
    ],
)
def test_a_config_of_other_experts_is_refused(shapes: dict[str, list[int]], said: str, narrow: Path) -> None:
    config = load_config(locate(str(narrow)), allow_compressed=True)
    sites = quantization_of(config)["sites"]
    sites["model.layers.0.mlp.experts"]["shapes"] = shapes
    del config.quantization_config
    with pytest.raises(LillamaError, match=said):
        compressed_meta_model(find_architecture(config), config, LillamaConfig(sites, 3))
