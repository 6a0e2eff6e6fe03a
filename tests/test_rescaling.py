"""What parts of a model cost: predicted by energies, measured by divergence, and what becomes of the ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lillama_core import Recipe, Request, compress, load_recipe
from lillama_core.allocation import Spectrum
from lillama_core.architecture import Block, find_blocks
from lillama_core.blocks import BlockRunner, Parent
from lillama_core.initialization import Decomposition
from lillama_core.modality import Samples
from lillama_core.models import find_architecture
from lillama_core.plan import RankPlan
from lillama_core.preparation import make_plan, prepare
from lillama_core.profile import Profile
from lillama_core.record import RunRecord
from lillama_core.rescaling import PARTS, Part, measure_parts, parts_of, scales_of
from lillama_core.weights import ResidentSource

CPU = torch.device("cpu")


@pytest.mark.parametrize(("blocks", "parts"), [(1, 10), (4, 10), (10, 10), (12, 10), (30, 10), (31, 4)])
def test_parts_are_about_equal_runs(blocks: int, parts: int) -> None:
    numbers: list[Any] = list(range(blocks))
    found = parts_of(numbers, parts)
    assert [n for part in found for n in part] == numbers
    assert len(found) == min(blocks, parts)
    lengths = {len(part) for part in found}
    assert max(lengths) - min(lengths) <= 1


def part(names: str, predicted: float, measured: float) -> Part:
    blocks: list[Any] = [SimpleNamespace(name=name) for name in names]
    return Part(blocks, predicted, measured)


def test_a_part_of_which_nothing_is_left_out_counts_as_the_others() -> None:
    found = scales_of([part("ab", 2.0, 6.0), part("c", 0.0, 0.0), part("d", 8.0, 4.0)])
    assert found == {"a": 3.0, "b": 3.0, "c": 1.0, "d": 0.5}
    assert scales_of([part("ab", 0.0, 0.0)]) == {}


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=PARTS + 2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_measured_is_the_divergence_of_the_whole_model_with_that_part_changed(tmp_path: Path) -> None:
    model = tiny_llama()
    architecture = find_architecture(model.config)
    blocks = find_blocks(architecture, model)["decoder"]
    parent, source = Parent(model, architecture, blocks), ResidentSource(model, CPU)
    profile = Profile(tmp_path)
    energies = torch.arange(10.0, 0.0, -1.0)
    kept = {}
    for block in blocks:
        empty = torch.zeros(1, 1)
        found = Decomposition(Spectrum(energies * (1 + block.index), True), empty, empty, True)
        profile.save(block, {m.name: found for m in block.maps}, None, {})
        # One map of a block is left whole.
        kept |= {block.full_name(m): 7 for m in block.maps if m.name != "mlp.up_proj"}
    plan = RankPlan("pivoted", kept)

    def changed(block: Block) -> nn.Module:
        module = source.block(block)
        for parameter in module.parameters():
            parameter.mul_(1 - 0.02 * (1 + block.index))
        return module

    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    batches = [Samples({"input_ids": rows}) for rows in tokens.split(2)]
    recorded = [parent.record(batch.inputs) for batch in batches]
    runner = BlockRunner(architecture, [calls for _, calls in recorded], CPU, None)
    stream = [hidden for hidden, _ in recorded]
    found = list(measure_parts(parent, source, runner, batches, stream, profile, plan, changed))

    assert [b.name for p in found for b in p.blocks] == [b.name for b in blocks]
    dense = model(tokens).logits.double().log_softmax(-1)
    for one in found:
        other = copy.deepcopy(model)
        for block in one.blocks:
            other.model.layers[block.index] = changed(block)
        logs = other(tokens).logits.double().log_softmax(-1)
        divergence = (dense.exp() * (dense - logs)).sum().item() / 4  # nats a row
        assert one.measured == pytest.approx(2 * divergence, rel=1e-3)
        maps = len(blocks[0].maps) - 1
        assert one.predicted == pytest.approx(sum((3 + 2 + 1) * (1 + b.index) * maps for b in one.blocks))


def test_a_block_that_counts_more_gets_higher_ranks(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=3)
    prepared = prepare(str(dense), load_recipe("fast").with_options({"stacks": ["decoder"], "reduction": 0.3}))
    profile = Profile(tmp_path / "profile")
    profile.folder.mkdir()
    for block in prepared.all_blocks:
        found = {}
        for map_ in block.maps:
            side = min(map_.out_features, map_.in_features)
            energies = torch.linspace(2.0, 0.1, side)
            found[map_.name] = Decomposition(Spectrum(energies, True), torch.zeros(1, 1), torch.zeros(1, 1), True)
        profile.save(block, found, None, {})
    first, *others = prepared.all_blocks

    def kept(scales: dict[str, float]) -> list[int]:
        plan = make_plan(prepared, "spectrum", profile, scales)
        return [
            sum(
                prepared.format.parameters(m.out_features, m.in_features, plan.ranks[block.full_name(m)])
                if block.full_name(m) in plan.ranks
                else m.parameters
                for m in block.maps
            )
            for block in prepared.all_blocks
        ]

    even, more = kept({}), kept({first.name: 4.0, **{b.name: 1.0 for b in others}})
    assert more[0] > even[0]
    assert sum(more) == pytest.approx(sum(even), rel=0.01)
    # Only quotients matter.
    assert kept(dict.fromkeys((b.name for b in prepared.all_blocks), 50.0)) == even


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

    without, with_ = run("without", replace(recipe, rescaling_tokens=0)), run("with", recipe)
    assert without.scales == {}
    written = json.loads((tmp_path / "with" / "lillama.json").read_text())
    assert list(written["scales"]) == [f"decoder.{i}" for i in range(3)]
    assert all(math.isfinite(s) and s > 0 for s in written["scales"].values())
    # Blocks of random weights are much alike: were one not, its maps would be spared.
    monkeypatch.setattr("lillama_core.engine.scales_of", lambda parts: {**scales_of(parts), "decoder.1": 1e3})
    spared = run("spared", recipe).plan["ranks"]

    def removed(ranks: dict[str, int]) -> int:
        """How many maps of block 1 are low rank."""
        return sum(".1." in name for name in ranks)

    assert removed(spared) < removed(with_.plan["ranks"])
