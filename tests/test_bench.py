"""The comparison of speeds: what is counted, what is timed, what is said of it, and the command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended
from torch import nn
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.data.modality import modality_of
from lillama_core.data.workload import Meter, Workload, WorkloadOptions
from lillama_core.errors import UserError
from lillama_core.evaluation.turns import Clock
from lillama_core.formats import Factored
from lillama_core.speed.comparison import WARM_UP, Timed, Work, compare_speed
from lillama_core.speed.meters import Arithmetic, TensorMemory
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

Cli = Callable[..., Ended]
WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
"""Of the tiny model."""


def by_hand(queries: int, keys: int, heads: int) -> int:
    """Multiply-adds of the tiny Llama for ``queries`` new positions that look at ``keys``; ``heads`` logits rows."""
    size = WIDTH // HEADS
    maps = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * size + 3 * WIDTH * INNER
    attention = 2 * queries * keys * WIDTH
    return LAYERS * (queries * maps + attention) + heads * WIDTH * 384


def workloads(model: Any, **options: Any) -> dict[str, Workload]:
    architecture = registry().architectures_for(model.config.model_type)[0]
    found = modality_of(architecture).workloads(model.config, WorkloadOptions(**options))
    return {workload.name: workload for workload in found}


@torch.inference_mode()
def counted(model: Any, workload: Workload) -> tuple[int, int]:
    meter = Arithmetic()
    workload.run(model, meter)
    return meter.multiply_adds, meter.products


def test_the_arithmetic_is_that_of_the_maps_and_of_attention(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.set_attn_implementation("sdpa")
    works = workloads(model, lengths=(12,), new_tokens=5)
    reads, products = counted(model, works["prompts of 12 tokens"])
    assert reads == by_hand(12, 12, 1)
    assert products == LAYERS * (7 + 1) + 1
    # Behind a prompt that leaves room for it, in the cache.
    writes, products = counted(model, works["decoding"])
    prompt = 64 - 5
    assert writes == sum(by_hand(1, prompt + i, 1) for i in range(1, 5))
    assert products == 4 * (LAYERS * (7 + 1) + 1)
    assert works["decoding"].amount == 4


def test_rows_at_once_and_low_rank_maps_are_counted(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    works = workloads(model, lengths=(12,), batch_sizes=(1, 3))
    one, three = (counted(model, works[f"prompts of 12 tokens{more}"])[0] for more in ("", ", 3 at once"))
    assert three == 3 * one
    assert works["prompts of 12 tokens, 3 at once"].amount == 36
    block = model.model.layers[0].mlp
    block.up_proj = Factored().from_factors(torch.randn(INNER, 4), torch.randn(4, WIDTH), None)
    saved = 12 * (WIDTH * INNER - 4 * (WIDTH + INNER))
    assert counted(model, works["prompts of 12 tokens"])[0] == one - saved


def test_memory_is_that_of_the_tensors_that_live_at_once() -> None:
    meter, x = TensorMemory(), torch.zeros(1000)
    with torch.inference_mode():
        meter.begin()
        y = x + 1
        del y
        y = x + 1
        z = y * 2
        view = z[10:]
        del y, z, view
        meter.end()
    assert meter.bytes == 2 * 4000


def test_a_clock_counts_from_begin_to_end() -> None:
    clock = Clock(torch.device("cpu"))
    time.sleep(0.3)
    clock.begin()
    time.sleep(0.01)
    clock.end()
    assert 0.01 <= clock.seconds < 0.3


class Sleeper(nn.Module):
    """A model that takes so long."""

    device = torch.device("cpu")

    def __init__(self, seconds: float, calls: list[float]) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, calls

    def forward(self) -> None:
        self.calls.append(self.seconds)
        time.sleep(self.seconds)


def test_models_work_in_turns() -> None:
    calls: list[float] = []
    steps: list[str] = []

    def run(model: Any, meter: Meter) -> None:
        meter.begin()
        model()
        meter.end()

    quick, slow = Sleeper(0.01, calls), Sleeper(0.05, calls)
    (work,) = compare_speed(quick, slow, [Workload("naps", "naps", 1, run)], 4, steps.append)
    rounds = WARM_UP + 4
    timed = calls[: 2 * rounds]
    assert all(set(timed[i : i + 2]) == {0.01, 0.05} for i in range(0, 2 * rounds, 2))
    assert timed[:4] in ([0.05, 0.01, 0.01, 0.05], [0.01, 0.05, 0.05, 0.01])
    assert steps == ["naps"] * rounds
    assert len(work.model.seconds) == len(work.baseline.seconds) == 4
    assert 1.5 < work.speed_up[1] <= 5.1


def work(model: list[float], baseline: list[float], products: tuple[int, int] = (10, 10)) -> Work:
    return Work("naps", "naps", 1, Timed(model, 100, products[0], 0), Timed(baseline, 131, products[1], 0))


def test_the_verdict_says_which_and_why() -> None:
    assert work([1.0, 1.0], [1.15, 1.15]).verdict == (
        "naps: 1.15 times as fast (1.15 to 1.15); the arithmetic promises 1.31"
    )
    assert work([1.0, 1.0, 1.0], [0.9, 1.0, 1.2], (30, 10)).verdict == (
        "naps: not faster, 1.00 times as fast (0.95 to 1.10); the arithmetic promises 1.31,"
        " but the same work is 30 smaller products instead of 10"
    )
    assert work([2.0], [1.0]).verdict.startswith("naps: slower, 0.50 times as fast")
    # What keeps the promise needs no excuse.
    assert "but" not in work([1.0], [1.3], (30, 10)).verdict


def test_the_command_compares_with_a_dense_model_of_the_same_shapes(
    compressed: Path, run_cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "speed.json"
    done = run_cli(
        *("bench", compressed, "--lengths", "8,16", "--new-tokens", "4", "--repeats", "2", "--threads", "1"),
        *("--dtype", "bfloat16", "--json", file),
    )
    assert done.status == 0, done
    found = json.loads(file.read_text())
    assert [w["name"] for w in found["works"]] == ["prompts of 8 tokens", "prompts of 16 tokens", "decoding"]
    assert (found["dtype"], found["threads"]) == ("bfloat16", 1)
    assert all(w["verdict"] in done.stdout and len(w["model"]["seconds"]) == 2 for w in found["works"])
    record = json.loads((compressed / "lillama.json").read_text())
    # Two bytes a parameter; buffers (angles, permutations) beside them.
    assert 0 <= found["weights"][1] - 2 * record["parameters"]["parameters_before"] < 200
    assert found["weights"][0] < found["weights"][1]
    assert all(1 < w["promised"] < 3 for w in found["works"])


def test_the_dense_model_itself_promises_nothing(tiny_model: Path) -> None:
    found = lillama_core.bench(tiny_model, baseline=tiny_model, lengths=[8], new_tokens=3, repeats=1, quiet=True)
    assert [w.promised for w in found.works] == [1, 1]
    assert found.weights[0] == found.weights[1]
    assert "threads" in str(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "eight"], "--lengths must be whole numbers with commas between them, not 'eight'"),
        (["--lengths", "0"], "--lengths must be from 1 to 1,000,000, not 0"),
        (["--lengths", ","], "--lengths must name at least one number"),
        (["--new-tokens", "1"], "--new-tokens must be from 2 to 1,000,000, not 1"),
        (["--repeats", "0"], "--repeats must be from 1 to 1,000,000, not 0"),
        (["--threads", "0"], "--threads must be from 1 to 1,000,000, not 0"),
        (["--dtype", "int3"], "--dtype must be auto, float32, bfloat16, float16, not 'int3'"),
        (
            ["--json", "/no/such/folder/x.json"],
            "--json '/no/such/folder/x.json' cannot be written: '/no/such/folder' is no directory",
        ),
        (["--baseline", "/no/such/model"], "no model at '/no/such/model'"),
    ],
)
def test_mistakes_are_one_line(tiny_model: Path, run_cli: Cli, arguments: list[str], said: str) -> None:
    assert run_cli("bench", tiny_model, *arguments).error == said


def test_a_baseline_of_another_family_is_refused(
    tiny_model: Path, make_model: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    other = make_model(tmp_path / "other", "gpt2")
    assert "compare with the model that was compressed" in run_cli("bench", tiny_model, "--baseline", other).error
    with pytest.raises(UserError, match="lengths"):
        lillama_core.bench(tiny_model, lengths=[])


def test_speech_is_measured_by_its_encoder_and_its_decoder(tmp_path: Path) -> None:
    architecture = registry().architectures_for("whisper")[0]
    folder = make_tiny_model(architecture, "whisper", tmp_path).folder
    found = lillama_core.bench(folder, new_tokens=4, repeats=1, quiet=True)
    assert [w.name for w in found.works] == ["the encoder's passes", "decoding"]
    assert found.works[0].unit == "seconds of sound"
    assert all(w.promised == 1 and w.model.multiply_adds > 0 for w in found.works)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_evaluate_computes_in_what_it_is_told(
    run_cli: Cli, dtype: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    half = make_model(tmp_path / "half", dtype=torch.bfloat16)
    file = tmp_path / "numbers.json"
    done = run_cli("evaluate", half, "--windows", "2", "--sequence-length", "16", "--limit", "2", "--json", file,
                   "--dtype", dtype)  # fmt: skip
    assert done.status == 0, done
    (numbers,) = json.loads(file.read_text()).values()
    weights = next(m["value"] for m in numbers if m["name"] == "footprint/weights")
    model = AutoModelForCausalLM.from_pretrained(half)
    expected = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2) / 1e6
    assert expected <= weights < expected + 1e-3
