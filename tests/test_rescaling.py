"""What parts of a model cost: predicted by energies, measured by divergence, and what becomes of the ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lillama_core import Recipe, load_recipe
from lillama_core.allocation import ChannelCurve, Spectrum
from lillama_core.architecture.blocks import Block, find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.channels import Channels
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.data.modality import Samples
from lillama_core.initialization import Decomposition
from lillama_core.output.record import RunRecord
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.spec import make_plan, prepare
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.loss_calibration import (
    Ablation,
    StackErrors,
    kinds_of,
    parts_of,
    predicted_errors,
    safe_ratio,
)
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.progress import Progress

CPU = torch.device("cpu")


@pytest.mark.parametrize(("blocks", "parts"), [(1, 10), (4, 10), (10, 10), (12, 10), (30, 10), (31, 4)])
def test_parts_are_about_equal_runs(blocks: int, parts: int) -> None:
    numbers: list[Any] = list(range(blocks))
    found = parts_of(numbers, parts)
    assert [n for part in found for n in part] == numbers
    assert len(found) == min(blocks, parts)
    lengths = {len(part) for part in found}
    assert max(lengths) - min(lengths) <= 1


PARTS = 10


def test_kinds_do_not_count_experts() -> None:
    ranks = {"a": {"mlp.experts.0.up": 1, "q": 2}, "b": {"mlp.experts.11.up": 3, "q2.1x": 4}}
    assert kinds_of(ranks) == ["mlp.experts.*.up", "q", "q2.1x"]


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=PARTS + 2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_scales_are_quotients_of_what_the_whole_model_does() -> None:
    model = tiny_llama()
    architecture = find_architecture(model.config)
    blocks = find_blocks(architecture, model)["decoder"]
    parent, source = StackHarness(model, architecture, blocks), ResidentSource(model, CPU)
    # One map of each block is left whole, and one block altogether; the energies say what they like.
    whole, spared = "mlp.up_proj", blocks[4].name
    ranks = {b.name: {m.name: 7 for m in b.maps if m.name != whole} for b in blocks if b.name != spared}
    left_out = {
        b.name: {name: 0.1 * (1 + b.index) * (1 + i) for i, name in enumerate(ranks.get(b.name, {}))} for b in blocks
    }

    def low_rank(block: Block, dense: nn.Module, mine: Mapping[str, int]) -> nn.Module:
        module = copy.deepcopy(dense)
        for name in mine:
            module.get_submodule(name).weight.mul_(1 - 0.02 * (1 + block.index))
        return module

    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    batches = [Samples({"input_ids": rows}) for rows in tokens.split(2)]
    activations = ActivationStore(Recorder(architecture, CPU, None), batches)
    tell = {name: lambda mine, known=known: {n: known[n] for n in mine} for name, known in left_out.items()}
    errors = StackErrors(blocks, ranks, tell)
    variants = errors.variants(PARTS)
    ablation = Ablation([parent], source, activations, low_rank, Progress("quiet"))
    scales = errors.scales(PARTS, ablation.costs(variants))

    dense = model(tokens).logits.double().log_softmax(-1)

    def cost(changes: dict[str, dict[str, int]]) -> float:
        other = copy.deepcopy(model)
        for block in blocks:
            if block.name in changes:
                other.model.layers[block.index] = low_rank(block, source.block(block), changes[block.name])
        logs = other(tokens).logits.double().log_softmax(-1)
        return 2 * (dense.exp() * (dense - logs)).sum().item() / 4  # nats a row

    # Twelve blocks in ten runs: two of them are of two blocks.
    runs = [[b.name for b in run] for run in parts_of(blocks, PARTS)]
    costs = [cost({name: ranks[name] for name in run if name in ranks}) for run in runs]
    sums = [sum(sum(left_out[name].values()) for name in run) for run in runs]
    assert [spared] in runs
    of_block = {
        name: c / s if s else sum(costs) / sum(sums)
        for run, c, s in zip(runs, costs, sums, strict=True)
        for name in run
    }
    assert [len(run) for run in runs].count(2) == 2
    for kind in ranks[blocks[0].name]:
        expected = sum(of_block[name] * left_out[name][kind] for name in ranks)
        of_kind = cost({name: {kind: 7} for name in ranks}) / expected
        for block in blocks:
            path = f"model.layers.{block.index}.{kind}"
            assert scales[path] == pytest.approx(of_block[block.name] * of_kind, rel=1e-2)
    # Of a kind that was never low rank only the block is known.
    assert scales[f"model.layers.5.{whole}"] == pytest.approx(of_block[blocks[5].name], rel=1e-2)
    assert [v.name for v in variants] == [run[-1] for run in runs] + list(ranks[blocks[0].name])


def test_errors_of_maps_are_those_of_the_channels_that_stay() -> None:
    """As the allocator counts them; where a variant takes no channels out, all of a map's errors are."""
    up, gate = (TargetLinear(name, 4, 3) for name in ("up", "gate"))
    net = Channels((up, gate), TargetLinear("down", 3, 4))
    energies = Spectrum(torch.tensor([4.0, 2.0, 1.0]), True)
    spectra = {"up": energies, "gate": energies, "down": energies, "other": energies}
    curves = {net.name: ChannelCurve(torch.tensor([2, 4]), torch.tensor([5.0, 0.0]), torch.tensor([0.5, 1.0]))}
    ranks = {"up": 1, "down": 2, "other": 1}
    assert predicted_errors(spectra, curves, [net], ranks) == {"up": 3.0, "down": 1.0, "other": 3.0}
    narrow = predicted_errors(spectra, curves, [net], {**ranks, net.name: 2})
    assert narrow == {"up": 1.5, "down": 0.5, "other": 3.0, net.name: 5.0}


def test_where_nothing_is_left_out_nothing_is_scaled() -> None:
    assert safe_ratio(0.0, 2.0, 5.0) == safe_ratio(2.0, 0.0, 5.0) == safe_ratio(math.nan, 2.0, 5.0) == 5.0
    assert safe_ratio(3.0, 2.0, 5.0) == 1.5


def test_a_block_that_counts_more_gets_higher_ranks(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=3)
    prepared = prepare(str(dense), load_recipe("fast").with_options({"stacks": ["decoder"], "reduction": 0.3}))
    store = DecompositionStore(tmp_path / "profile")
    store.folder.mkdir()
    for block in prepared.all_blocks:
        found = {}
        for map_ in block.maps:
            side = min(map_.out_features, map_.in_features)
            squared_singular_values = torch.linspace(2.0, 0.1, side)
            found[map_.name] = Decomposition(
                Spectrum(squared_singular_values, True), torch.zeros(1, 1), torch.zeros(1, 1), True
            )
        store.save(block, found)
    paths = {b.name: [b.full_name(m) for m in b.maps] for b in prepared.all_blocks}
    first, *others = paths

    def kept(scales: dict[str, float]) -> list[int]:
        plan = make_plan(prepared, "spectrum", store, scales)
        return [
            sum(
                prepared.format.parameters(m.out_features, m.in_features, plan.ranks[block.full_name(m)])
                if block.full_name(m) in plan.ranks
                else m.parameters
                for m in block.maps
            )
            for block in prepared.all_blocks
        ]

    ones = dict.fromkeys((p for name in others for p in paths[name]), 1.0)
    even, more = kept({}), kept({**dict.fromkeys(paths[first], 4.0), **ones})
    assert more[0] > even[0]
    assert sum(more) == pytest.approx(sum(even), rel=0.01)
    # Only quotients matter.
    assert kept(dict.fromkeys((p for of_block in paths.values() for p in of_block), 50.0)) == even


def test_a_run_measures_every_part_and_says_so(
    tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=3)
    recipe = load_recipe("fast").with_options(
        {
            **{"stacks": ["decoder"], "reduction": 0.3, "tokens": 512, "sequence_length": 32, "self_share": 0.0},
            **{"sensitivity_tokens": 256, "rescaling_tokens": 256, "compute": "float32"},
            **{"calibration": [str(calibration_text)]},
        }
    )

    def run(name: str, chosen: Recipe) -> RunRecord:
        return compress(Request(str(dense), tmp_path / name, chosen), "quiet")

    without, with_ = run("without", recipe.with_options({"rescaling_tokens": 0})), run("with", recipe)
    assert without.scales == {}
    written = json.loads((tmp_path / "with" / "lillama.json").read_text())
    channels = {f"model.layers.{i}.mlp.down_proj.channels" for i in range(3)}
    assert written["scales"].keys() == written["shapes"].keys() | channels
    assert all(math.isfinite(s) and s > 0 for s in written["scales"].values())
    # Blocks of random weights are much alike: were one not, its maps would be spared.

    scales = StackErrors.scales

    def spare(*measured: Any) -> dict[str, float]:
        return {name: 1e3 * scale if ".1." in name else scale for name, scale in scales(*measured).items()}

    monkeypatch.setattr(StackErrors, "scales", spare)
    spared = run("spared", recipe).plan["ranks"]

    def removed(ranks: dict[str, int]) -> int:
        """How many maps of block 1 are low rank."""
        return sum(".1." in name for name in ranks)

    assert removed(spared) < removed(with_.plan["ranks"])
