"""Channels taken out of feed-forward nets: found, ordered, refitted, planned for, stored and loaded again."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK_ANYHOW, Ended
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lillama_core
from lillama_core import load_recipe
from lillama_core.allocation import AllocationRequest, ChannelCurve, Spectrum
from lillama_core.allocation.nets import lower_hull, net_points
from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan, kept_parameters
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.channels import are_channels, layers_without, weight_of
from lillama_core.architecture.targets.linear import LinearTarget, linear_targets, plain_modules
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import LillamaError
from lillama_core.initialization import Decomposition, Fisher, MapStatistics
from lillama_core.initialization.elimination import eliminate, step_of
from lillama_core.models.loading import load_config, meta_model
from lillama_core.models.source import locate
from lillama_core.output.quantizer import LillamaConfig, TargetConfig
from lillama_core.output.shards import compressed_meta_model, quantization_of
from lillama_core.pipeline.spec import prepare
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import make

Cli = Callable[..., Ended]


class Net(nn.Module):
    """A feed-forward net with, or without, a gate."""

    def __init__(self, width: int, size: int, *, gate: bool = False, between: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, size), nn.Linear(size, width)
        self.gate = nn.Linear(width, size) if gate else None
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.up(x))
        h = h if self.gate is None else h * torch.sigmoid(self.gate(x))
        found: torch.Tensor = self.down(h if self.between is None else self.between(h))
        return found


def block_of(module: nn.Module) -> Block:
    return Block("stack", 0, "", tuple(linear_targets(module)), plain_modules(module))


@pytest.mark.parametrize("gate", [False, True])
def test_channels_are_found_by_shapes_and_proved_by_trying(gate: bool) -> None:
    torch.manual_seed(0)
    net = Net(6, 10, gate=gate).requires_grad_(False)
    block, x = block_of(net), torch.randn(2, 5, 6)
    (channels,) = block.channels
    assert [m.name for m in channels.sources] == (["up", "gate"] if gate else ["up"])
    assert (channels.sink.name, channels.name, channels.size) == ("down", "down.channels", 10)
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert are_channels(block, net, [channels], lambda module: module(x))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


class Fused(nn.Module):
    """Gate and values of ten channels from one map: one after the other, or in turns."""

    def __init__(self, in_turns: bool) -> None:
        super().__init__()
        self.gate_up, self.down, self.in_turns = nn.Linear(6, 20), nn.Linear(10, 6), in_turns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.in_turns else both.chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("in_turns", [False, True])
def test_gate_and_values_of_one_map_are_two_runs_of_channels(in_turns: bool) -> None:
    torch.manual_seed(0)
    net = Fused(in_turns).requires_grad_(False)
    block, x = block_of(net), torch.randn(2, 5, 6)
    (channels,) = block.channels
    assert (channels.size, channels.runs) == (10, 2)
    assert are_channels(block, net, [channels], lambda module: module(x)) != in_turns
    if not in_turns:
        kept = torch.tensor([0, 3, 7])
        small = copy.deepcopy(net)
        block.put(small, layers_without(block, net, channels, kept, net.down.weight[:, kept], net.down.bias))
        gate, up = net.gate_up(x).chunk(2, -1)
        inner = (torch.nn.functional.silu(gate) * up)[..., kept]
        assert torch.allclose(small(x), inner @ net.down.weight[:, kept].T + net.down.bias, atol=1e-6)


def test_a_map_beside_other_weights_is_no_net() -> None:
    """As the mixer of a state-space model."""
    net = Fused(False)
    net.decay = nn.Parameter(torch.ones(10))
    assert block_of(net).channels == ()


@pytest.mark.parametrize("between", [nn.LayerNorm(10), nn.Softmax(-1), nn.Unflatten(-1, (5, 2))], ids=type)
def test_what_mixes_channels_is_seen(between: nn.Module) -> None:
    torch.manual_seed(0)
    if isinstance(between, nn.Unflatten):
        between = nn.Sequential(between, nn.Flatten(-2), nn.RMSNorm(10))
    net = Net(6, 10, between=between).requires_grad_(False)
    (channels,) = block_of(net).channels
    x = torch.randn(2, 5, 6)
    assert not are_channels(block_of(net), net, [channels], lambda module: module(x))


def test_a_gate_that_is_left_out_keeps_its_channels() -> None:
    torch.manual_seed(0)
    net = Net(6, 10, gate=True).requires_grad_(False)
    block = Block("stack", 0, "", tuple(linear_targets(net, exclude=("gate",))))
    (channels,) = block.channels
    assert not are_channels(block, net, [channels], lambda module: module(torch.randn(2, 5, 6)))


@pytest.mark.parametrize(
    ("model_type", "sinks"),
    [
        ("llama", {"mlp.down_proj"}),
        ("gpt2", {"mlp.c_proj"}),
        ("opt", {"fc2"}),
        ("whisper", {"fc2"}),
        ("phi3", {"mlp.down_proj"}),
        ("glm4", {"mlp.down_proj"}),
        ("mamba", set()),
    ],
)
def test_families_have_the_channels_that_one_expects(model_type: str, sinks: set[str]) -> None:
    config = CONFIG_MAPPING[model_type]()
    architecture = find_architecture(config)
    blocks = find_blocks(architecture, meta_model(config, architecture))
    assert {c.sink.name for of in blocks.values() for block in of for c in block.channels} == sinks


def problem(size: int, out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [out, size], H [size, size] and the weighted W."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    W = torch.randn(out, size, generator=generator, dtype=torch.float64)
    L = torch.randn(out, out, generator=generator, dtype=torch.float64)
    return W, rows.T @ rows / len(rows), L.T @ W


def least_error(weighted: torch.Tensor, H: torch.Tensor, kept: list[int]) -> float:
    """The smallest |L^T (W - W') C|^2 of all W' that read ``kept`` alone, by least squares."""
    C = np.linalg.cholesky(H.numpy())
    target = weighted.numpy() @ C
    best = np.linalg.lstsq(C[kept].T, target.T, rcond=None)[0].T
    return float(((target - best @ C[kept]) ** 2).sum())


@given(size=st.integers(5, 9), out=st.integers(2, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_cheapest_channel_goes_first_and_the_rest_is_refitted(size: int, out: int, seed: int) -> None:
    W, H, weighted = problem(size, out, seed)
    found = eliminate(H, torch.linalg.cholesky(H), weighted)
    assert sorted(found.order.tolist()) == list(range(size))
    kept = list(range(size))
    for count in range(size - 1, max(1, size // 4) - 1, -1):
        errors = {c: least_error(weighted, H, [k for k in kept if k != c]) for c in kept}
        kept.remove(min(errors, key=lambda c: errors[c]))
        assert found.kept(count).tolist() == kept
        (error,) = found.curve.errors[found.curve.counts == count].tolist()
        assert error == pytest.approx(least_error(weighted, H, kept), rel=1e-4)
        refit, _ = found.refit(W, None, count)
        expected = W @ H[:, kept] @ torch.linalg.inv(H[kept][:, kept])
        assert torch.allclose(refit.double(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert found.curve.counts.tolist() == list(range(max(1, size // 4), size + 1))
    assert found.curve.errors[-1] == 0
    assert found.curve.shares[-1] == 1


@pytest.mark.parametrize("size", [3, 8, 37])
def test_what_refits_a_map_comes_back_from_disk(size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = block_of(Net(2, size))
    (channels,) = block.channels
    W, H, weighted = problem(size, 2, 0)
    kept = eliminate(H, torch.linalg.cholesky(H), weighted)
    store = DecompositionStore(tmp_path)
    apart = Decomposition(Spectrum(torch.ones(2), True), W, W, True)
    store.save_elimination(block, channels.name, kept)
    store.save(block, {m.name: apart for m in block.maps}, curves={channels.name: kept.curve})
    found = store.elimination(block, channels.name)
    assert torch.equal(found.root, kept.root)
    assert torch.equal(found.order, kept.order)
    assert torch.equal(found.curve.errors, kept.curve.errors)
    held = sum(t.numel() for k, t in load_file(next(tmp_path.glob("*-channels*"))).items() if k.startswith("root"))
    assert held <= size * (size + 1) / 2 + size * size / 8


def test_counts_of_a_wide_net_are_multiples() -> None:
    assert [step_of(size) for size in (40, 96, 1536, 11008, 14336)] == [1, 2, 32, 128, 256]
    _, H, weighted = problem(100, 4, 0)
    counts = eliminate(H, torch.linalg.cholesky(H), weighted).curve.counts.tolist()
    assert counts == [*range(26, 100, 2), 100] or counts == [*range(24, 100, 2), 100]


def test_a_bias_takes_up_what_channels_give_on_average() -> None:
    torch.manual_seed(0)
    h = torch.randn(4000, 8) * torch.linspace(0.02, 0.2, 8) + torch.linspace(3, -3, 8)
    W, b = torch.randn(3, 8), torch.randn(3)
    statistics = MapStatistics(h.T @ h / len(h), torch.eye(3), 1.0, 1.0, h.mean(0), has_bias=True)
    found = Fisher().eliminate(W, statistics)
    assert found is not None
    refit, bias = found.refit(W, b, 4)
    assert bias is not None
    kept = found.kept(4)
    given, wanted = h[:, kept] @ refit.T + bias, h @ W.T + b
    assert torch.allclose(given.mean(0), wanted.mean(0), atol=1e-3)
    # Without the shift the means alone would be an error many times as large.
    assert (given - wanted).square().mean() < 0.1 * ((h[:, kept] @ refit.T + b) - wanted).square().mean()


def net_maps(width: int, size: int) -> list[PlannedMap]:
    shapes = {"up": (size, width), "gate": (size, width), "down": (width, size)}
    return [
        PlannedMap(name, "s", 0, TargetLinear(name, *shape), *(("", "c") if name == "down" else ("c", "")))
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
def test_the_hull_of_a_net_is_that_of_all_its_states(format_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    maps, size = net_maps(5, 7), 7
    curve = ChannelCurve(torch.arange(4, 8), torch.tensor([1.5, 0.7, 0.2, 0.0]), torch.tensor([0.8, 0.9, 0.95, 1.0]))
    tails = {}
    for m in maps:
        energies = torch.rand(5, generator=generator).sort(descending=True).values
        tails[m.name] = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    asked = AllocationRequest(maps, Budget(105, 105, 20), make("formats", format_name), {}, {"c": curve})
    hull = net_points(asked, "c", curve, maps, tails, 1)
    states = []
    for count, lost, share in zip(curve.counts.tolist(), curve.errors.tolist(), curve.shares.tolist(), strict=True):
        left = [m.without({"c": count} if count < size else {}) for m in maps]
        choices = [[*asked.ranks(m), None] for m in left]
        for ranks in itertools.product(*choices):
            plan = RankPlan(format_name, {m.name: r for m, r in zip(maps, ranks, strict=True) if r}, {"c": count})
            error = lost + sum(share * tails[m.name][r] for m, r in zip(maps, ranks, strict=True) if r)
            states.append((kept_parameters(maps, plan, asked.format), error))
    for point in hull:
        assert point.error == pytest.approx(min(e for c, e in states if c <= point.cost))
    # No state lies below the hull.
    for a, b in itertools.pairwise(hull):
        for cost, error in states:
            if a.cost <= cost <= b.cost:
                line = a.error + (b.error - a.error) * (cost - a.cost) / (b.cost - a.cost)
                assert error >= line - 1e-9
    assert lower_hull(hull) == hull
    assert (hull[-1].cost, hull[-1].error) == (105, 0.0)


def test_spectrum_takes_channels_where_they_are_cheap() -> None:
    maps = net_maps(8, 20)
    spectra = {m.name: Spectrum(torch.ones(8), comparable=True) for m in maps}
    counts = torch.arange(10, 21)
    free = ChannelCurve(counts, torch.zeros(11), torch.ones(11))
    budget = Budget(480, 480, 200)
    asked = AllocationRequest(maps, budget, make("formats", "pivoted"), spectra, {"c": free})
    plan = make("allocators", "spectrum").allocate(asked)
    assert plan.ranks == {}
    assert plan.channels == {"c": 10}
    assert kept_parameters(maps, plan, asked.format) == 240
    dear = AllocationRequest(
        maps, budget, asked.format, spectra, {"c": ChannelCurve(counts, 99.0 * (20 - counts), torch.ones(11))}
    )
    plan = make("allocators", "spectrum").allocate(dear)
    assert plan.channels == {}
    assert plan.ranks


@pytest.fixture(scope="module", params=["llama", "phi3"])
def dense(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With gate and values as maps of their own, and in one map."""
    more = {"pad_token_id": 0} if request.param == "phi3" else {}
    return make_model(tmp_path_factory.mktemp("channels") / "dense", request.param, intermediate_size=96, **more)


@pytest.fixture(scope="module")
def narrow(dense: Path, calibration_text: Path) -> Path:
    """What is left of a tiny Llama without some channels and ranks."""
    options: dict[str, Any] = {"tokens": 1024, "sequence_length": 32, "batch_size": 4, "self_share": 0.0}
    output = dense.parent / "small"
    lillama_core.compress(
        dense, output, calibration=calibration_text, quiet=True, recipe="fast", reduction=0.35, **options
    )
    return output


def record_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "lillama.json").read_text())
    return found


def test_a_result_has_the_parameters_that_were_planned(narrow: Path) -> None:
    record = record_of(narrow)
    assert record["plan"]["channels"]
    model = AutoModelForCausalLM.from_pretrained(narrow)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]["parameters_after"]
    for path, count in record["plan"]["channels"].items():
        mlp = model.get_submodule(path.removesuffix(".down_proj.channels"))
        assert mlp.down_proj.in_features == count < 96
        if hasattr(mlp, "gate_up_proj"):
            assert mlp.gate_up_proj.out_features == 2 * count
        else:
            assert mlp.gate_proj.out_features == mlp.up_proj.out_features == count
    sites = json.loads((narrow / "config.json").read_text())["quantization_config"]
    assert sites["version"] == 3


def test_a_result_is_saved_loaded_exported_and_held_in_few_bits(narrow: Path, tmp_path: Path, run_cli: Cli) -> None:
    ids = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(narrow)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, logits)
    assert run_cli("verify", narrow).status == 0
    assert run_cli("export", narrow, "--to", "dense", "--output", tmp_path / "plain").status == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.intermediate_size == 96
    assert torch.allclose(plain(ids).logits, logits, atol=1e-4)
    assert run_cli("export", narrow, "--to", "standalone", "--output", tmp_path / "alone").status == 0
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    assert torch.allclose(alone(ids).logits, logits, atol=1e-5)
    assert run_cli("quantize", narrow, "--output", tmp_path / "bits").status == 0
    few = AutoModelForCausalLM.from_pretrained(tmp_path / "bits")(ids).logits
    assert (few - logits).norm() < 0.1 * logits.norm()


def test_what_is_smaller_is_healed(narrow: Path, dense: Path, calibration_text: Path, tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(narrow).state_dict()
    lillama_core.finetune(
        narrow, tmp_path / "healed", teacher=dense, calibration=calibration_text, quiet=True, self_share=0.0,
        tokens=1024, sequence_length=32, batch_size=4, learning_rate=1e-3, train="factors",
    )  # fmt: skip
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "healed").state_dict()
    smaller = [path.removesuffix(".channels") for path in record_of(narrow)["plan"]["channels"]]
    assert smaller
    for path in smaller:
        for name in (k for k in before if k.startswith(path)):
            assert before[name].shape == after[name].shape
            assert not torch.equal(before[name], after[name]), name


def test_taking_out_equals_masking(dense: Path) -> None:
    prepared = prepare(str(dense), load_recipe("fast"))
    model = AutoModelForCausalLM.from_pretrained(dense).requires_grad_(False)
    block = prepared.blocks["decoder"][0]
    (channels,) = block.channels
    module, kept = model.model.layers[0], torch.tensor([1, 2, 5, 30])
    W = weight_of(block, module, channels.sink)
    smaller = block.with_layers(module, layers_without(block, module, channels, kept, 2 * W[:, kept], None))
    x = torch.randn(2, 4, W.shape[0])
    module.mlp.down_proj.weight.data = torch.zeros_like(W).index_copy(1, kept, 2 * W[:, kept])
    assert torch.allclose(smaller.mlp(x), module.mlp(x), atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_map_of_full_rank_takes_new_numbers_in_its_own_layout(transposed: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(3, 5) if transposed else nn.Linear(5, 3)).requires_grad_(False)
    (target,) = linear_targets(net)
    assert isinstance(target, LinearTarget)
    W, b, x = torch.randn(3, 5), torch.randn(3), torch.randn(4, 5)
    before, (map_,) = net(x), target.maps
    layer = target.rewritten(net, W, b)
    assert torch.equal(net(x), before)
    target.replace(net, {map_.name: layer})
    assert torch.allclose(net(x), x @ W.T + b, atol=1e-6)
    assert torch.equal(target.weight(net, map_), W)
    assert type(layer) is type(net[0])


def test_channels_stay_on_request(dense: Path, calibration_text: Path, tmp_path: Path, run_cli: Cli) -> None:
    options = (
        "--calibration",
        calibration_text,
        *QUICK_ANYHOW,
        "--recipe",
        "fast",
        "--steps",
        "0",
        "--reduction",
        "0.35",
    )
    ended = run_cli("compress", dense, "--output", tmp_path / "small", *options, "--no-remove-channels")
    assert ended.status == 0, ended
    assert record_of(tmp_path / "small")["plan"]["channels"] == {}
    uniform = ("--remove-channels", "--allocation", "uniform")
    ended = run_cli("compress", dense, "--output", tmp_path / "no", *options, *uniform)
    assert "--remove-channels does nothing: the allocator 'uniform'" in ended.error


def test_a_model_without_such_nets_says_so(make_model: Callable[..., Path], tmp_path: Path, run_cli: Cli) -> None:
    mixers = make_model(tmp_path / "mixers", "mamba")
    ended = run_cli("plan", mixers, "--remove-channels", "--reduction", "0.2")
    assert "has a net of linear maps that could lose channels" in ended.error
    assert run_cli("plan", mixers, "--reduction", "0.2").status == 0


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "linear", "shape": [3]},
        {"kind": "linear", "shape": [0, 3]},
        {"kind": "linear", "shape": [True, 3]},
        {"kind": "linear", "shape": "3x3"},
        {"kind": "linear", "shape": [3, 3], "ranks": {}},
        {"kind": "linear"},
        {"kind": "linear", "shape": [4, 3], "runs": 3},
        {"kind": "linear", "shape": [4, 3], "runs": 0},
        {"kind": "linear", "shape": [4, 3], "runs": True},
        {"kind": "linear", "format": "factored", "rank": 2, "runs": 2},
    ],
)
def test_a_config_with_a_wrong_shape_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(LillamaError):
        TargetConfig.parse("mlp.up_proj", entry)


def test_only_a_linear_layer_may_be_smaller(narrow: Path) -> None:
    config = load_config(locate(str(narrow)), allow_compressed=True)
    sites = {"model.embed_tokens": {"kind": "banded-embedding", "shape": [8, 8]}}
    del config.quantization_config
    with pytest.raises(LillamaError, match="cannot have the shape"):
        compressed_meta_model(find_architecture(config), config, LillamaConfig(sites, 3))


@pytest.mark.parametrize("shape", [[200, 32], [96, 32], [96, 64], [48, 33]])
def test_a_config_with_a_larger_shape_is_refused(shape: list[int], narrow: Path) -> None:
    config = load_config(locate(str(narrow)), allow_compressed=True)
    sites = quantization_of(config)["sites"]
    # Of another kind of net: rows and columns the other way round.
    sites["model.layers.0.mlp.down_proj"] = {"kind": "linear", "shape": shape[::-1]}
    del config.quantization_config
    with pytest.raises(LillamaError, match="cannot have the shape"):
        compressed_meta_model(find_architecture(config), config, LillamaConfig(sites, 3))
