"""Estimates: formulas against what is counted, sizes as people write them, machines from files, and who is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUICK, TEXT, run_process
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import lillama_core
from lillama_benchmarks import estimate_table
from lillama_core.data.modality import Samples
from lillama_core.data.split import CalibrationSplit
from lillama_core.errors import UserError
from lillama_core.estimates.estimate import Estimate, estimate
from lillama_core.estimates.machine import Machine, machine_names, named_machine
from lillama_core.estimates.measure import _disk, this_machine
from lillama_core.estimates.memory import Memory
from lillama_core.estimates.phases import Phases
from lillama_core.estimates.shapes import remembered_numbers, split_rows
from lillama_core.estimates.sizes import parse_size, show_size
from lillama_core.estimates.work import Work
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.residency import Estimates, choose_residency, fits_for_sampling, sampled_rows
from lillama_core.pipeline.spec import prepare
from lillama_core.pipeline.stages.write import WriteStage
from lillama_core.recipe.model import Recipe
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

LARGE = {
    "name": "large",
    "host_memory": 1e12,
    "libraries": 5e8,
    "float32": 1e11,
    "float64": 1e11,
    "eigh": {64: 1e-3, 512: 0.1},
    "pivoting": 1e9,
    "bandwidth": 1e10,
    "kernel": 1e-5,
    "draw": 1e-8,
    "disk_write": 1e9,
    "disk_read": 1e9,
    "start": 5.0,
}
OPTIONS: dict[str, Any] = {
    "tokens": 1024,
    "sequence_length": 32,
    "sensitivity_tokens": 128,
    "steps": 3,
    "self_share": 0.0,
    "calibration": [str(TEXT)],
    "compute": "float32",
}


def machine(**changes: Any) -> Machine:
    return Machine(**{**LARGE, **changes})


def estimates(model: Path, of: Machine | None = None, **options: Any) -> Estimates:
    recipe = Recipe(**{k: v for k, v in {**OPTIONS, **options}.items() if v is not None})
    return Estimates.make(prepare(str(model), recipe), recipe, of or machine(), half=False)


def request(model: Path, output: Path, **options: Any) -> Request:
    return Request(str(model), output, Recipe(**OPTIONS), **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GB", 3_000_000_000), ("3GiB", 3 * 2**30), ("500MB", 500_000_000), (" 1.5 kib ", 1536), ("7", 7), (12, 12)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3XB", "nan", "inf", "0", "1e3GB", "9" * 40, True, None, "3 G B"])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match=r"^--max-memory must be "):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(1.234e9, "1.23 GB"), (56.7e9, "56.7 GB"), (412e6, "412 MB"), (5e3, "5 kB")]
)
def test_sizes_are_shown(size: float, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize("rows", [8, 9, 12, 32, 100])
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("held_out", [0.0, 0.0625, 0.5])
@pytest.mark.parametrize("chooses", [False, True])
def test_rows_are_split_as_a_run_splits_them(rows: int, batch: int, held_out: float, chooses: bool) -> None:
    split = CalibrationSplit.of(Samples({"input_ids": torch.zeros(rows, 4)}, {}, ""), batch, held_out, chooses)
    counted = tuple(sum(len(split.batches[i]) for i in part) for part in (split.fit, split.choose, split.report))
    assert split_rows(rows, batch, held_out, chooses) == counted


def test_shapes_are_those_of_the_model(tiny_model: Path) -> None:
    found, meta = estimates(tiny_model).model, prepare(str(tiny_model), Recipe(**OPTIONS)).meta
    assert found.parameters == sum(p.numel() for p in meta.parameters())
    layers = meta.get_submodule("model.layers")
    assert found.in_blocks == sum(p.numel() for p in layers.parameters())
    (block,) = {(b.parameters, b.length, b.width, b.input_squares) for b in found.blocks}
    # q, k and v read one tensor, gate and up another, o and down one each.
    assert block == (sum(p.numel() for p in layers[0].parameters()), 32, 32, 32**2 * 3 + 64**2)  # type: ignore[index]


def test_products_of_a_block_are_counted_as_it_runs(tiny_model: Path) -> None:
    block = estimates(tiny_model).model.blocks[0]
    maps = 2.0 * sum(m.parameters for m in block.maps) * block.length
    # Queries by keys, and scores by values.
    attention = 4.0 * block.length**2 * block.width
    assert maps < block.cost.forward.products <= 1.05 * (maps + attention)
    assert block.cost.graph > 4 * block.length * block.width


def test_what_cannot_run_without_numbers_is_counted_by_its_parameters(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = estimates(tiny_model).model.blocks[0].cost.forward.products

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no numbers")

    monkeypatch.setattr("lillama_core.estimates.probe._probe_block", fail)
    assert estimates(tiny_model).model.blocks[0].cost.forward.products == pytest.approx(counted, rel=0.1)


def test_an_estimate_leaves_no_graph_behind(tiny_model: Path) -> None:
    """One held by its own outputs is found by no collector."""

    def modes() -> int:
        gc.collect()
        return sum(type(found) is FakeTensorMode for found in gc.get_objects())

    before = modes()
    estimates(tiny_model)
    assert modes() <= before


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_experts_count_by_the_tokens_that_they_see(
    family: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    # The other's attention has experts, too, whose rows come sorted: how many each has is not known without numbers.
    sizes = {"kv_channels": 8, "num_key_value_heads": 4} if family == "jetmoe" else {}
    model = make_model(tmp_path / "m", family, num_local_experts=4, num_experts_per_tok=1, **sizes)
    block = estimates(model).model.blocks[0]
    experts = [m for m in block.maps if m.fraction < 1]
    assert {m.fraction for m in experts} == {0.25}
    active = 2.0 * block.length * sum(m.fraction * m.parameters for m in block.maps)
    attention = 4.0 * block.length**2 * block.width
    assert active < block.cost.forward.products < 1.1 * (active + attention)


def test_work_adds_up() -> None:
    a, b = Work(products=2.0, eigh={4: 1.0}, operations=3.0), Work(products=1.0, eigh={4: 1.0, 8: 2.0})
    assert (a + b).eigh == {4: 2.0, 8: 2.0}
    assert (a + b).products == 3.0
    assert (a * 2).eigh == {4: 2.0}
    done = a.on(rows=10, calls=5)
    assert (done.products, done.operations) == (20.0, 15.0)


def test_decompositions_between_measured_sizes_and_beyond() -> None:
    found = machine(eigh={100: 1.0, 200: 8.0})
    assert found.eigh_seconds(100) == 1.0
    assert found.eigh_seconds(141) == pytest.approx(1.41**3, rel=1e-6)
    assert found.eigh_seconds(400) == pytest.approx(64.0)
    assert found.eigh_seconds(50) == pytest.approx(0.125)
    assert found.seconds(Work(eigh={200: 2.0}, exact=1e11, starts=1.0), half=False) == pytest.approx(16 + 1 + 5)


def test_every_map_is_decomposed_once(tiny_model: Path) -> None:
    found = estimates(tiny_model)
    phases = Phases(found.model, found.job, streamed=False, accelerator=False).all()
    counted = sum(phases["backward"].eigh.values())
    assert counted == sum(b.count * len(b.maps) for b in found.model.blocks)
    assert not phases["forward"].eigh
    without = estimates(tiny_model, init="svd", allocation="uniform", loss="mse", sensitivity_tokens=None)
    alone = Phases(without.model, without.job, streamed=False, accelerator=False).all()
    assert sum(alone["forward"].eigh.values()) == counted
    assert alone["backward"] == alone["ranks"] == Work()


def test_what_a_decoder_reads_of_its_encoder_takes_memory(tmp_path: Path) -> None:
    made = make_tiny_model(registry().architectures_for("whisper")[0], "whisper", tmp_path / "m")
    spec, recipe = prepare(str(made.folder), made.recipe()), made.recipe()
    found = Estimates.make(spec, recipe, machine(), half=False)
    encoder, decoder = (next(b for b in found.model.blocks if b.stack == name) for name in ("encoder", "decoder"))
    states = 4 * spec.config.max_source_positions * spec.config.d_model
    assert (encoder.given, decoder.given) == (0, states)
    # Two frames of sound make a position.
    assert found.model.row >= 4 * spec.config.num_mel_bins * 2 * spec.config.max_source_positions
    memory, rows = Memory(found.model, found.job, False, False, 0.0), found.job.passed
    # What the encoder gave, a norm of it, and what enters the decoder.
    begins = found.job.batch * found.model.entering
    assert memory.recording(decoder).host == begins + rows * (2 * states + 4 * decoder.length * decoder.width)
    assert memory.recording(encoder).host == begins + rows * states
    # The first convolution gives a position for each frame, and so does what is made of it.
    assert found.model.entering >= 4 * states
    # While maps are watched what they read is held, such as the first norm of a block.
    assert encoder.cost.observed - encoder.cost.live >= states
    assert memory.peak().host == memory.always().host + max(held.host for held in memory.phases().values())


def test_files_of_a_run_are_as_large_as_estimated(tiny_model: Path, tmp_path: Path) -> None:
    sizes: dict[str, int] = {}
    run = WriteStage.run

    def weigh(self: Any, context: Any) -> None:
        for name, folder in (("states", context.directory.states), ("profile", context.directory.store)):
            sizes[name] = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        run(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriteStage, "run", weigh)
        lillama_core.compress(tiny_model, tmp_path / "out", **OPTIONS, quiet=True)
    found = estimates(tiny_model)
    block, job = found.model.blocks[0], found.job
    blocks = sum(b.count for b in found.model.blocks)
    states = 4 * (blocks + 1) * job.kept_rows(False) * block.length * block.width
    assert sizes["states"] == pytest.approx(states, rel=0.05)
    # Of triangles in eight strips the half and a sixteenth.
    triangles = 4 * sum(n * n * 9 / 16 for n in block.channels)
    vectors = blocks * (8 * block.side_squares + 4 * block.width**2 + triangles)
    assert block.channels
    vectors += sum(8 * band.side**2 for band in found.model.embedding)
    # Files of tiny maps are in part their headers and energies.
    assert vectors < sizes["profile"] < 1.35 * vectors
    assert found.of(False).disk >= states + vectors


def test_a_made_model_takes_the_memory_that_is_estimated(
    make_model: Callable[..., Path], tmp_path: Path, calibration_text: Path
) -> None:
    """In a process of its own: its peak is that of nothing else, and the text is a short one."""
    model = make_model(tmp_path / "m", hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    # What a processor's kernels for bfloat16 take differs from one to the next.
    options = ("--calibration", calibration_text, "--compute", "float32", *QUICK)
    done = run_process("compress", model, "-o", tmp_path / "out", *options, fresh=True)
    assert done.status == 0, done.stderr
    record = json.loads((tmp_path / "out" / "lillama.json").read_text())
    assert record["residency"] == "resident"
    assert record["residency_reason"] == "the model fits in memory"
    assert record["estimate"]["peak_memory_bytes"] == pytest.approx(record["peak_memory_bytes"], rel=0.25)
    # The record is written before its own writing is over.
    assert set(record["estimate"]["seconds"]) <= {*record["seconds"], "output"}


def test_the_model_is_streamed_where_it_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    found = estimates(tiny_model)
    resident, streamed = found.of(False), found.of(True)
    assert choose_residency(request(tiny_model, tmp_path / "o"), found).reason == "the model fits in memory"
    assert streamed.host < resident.host
    between = int((resident.host + streamed.host) / 2)
    chosen = choose_residency(request(tiny_model, tmp_path / "o", max_memory=between), found)
    assert chosen.streamed
    assert "--max-memory allows" in chosen.reason
    for stream in (True, False):
        chosen = choose_residency(request(tiny_model, tmp_path / "o", stream=stream), found)
        assert (chosen.streamed, chosen.name) == (stream, "streamed" if stream else "resident")
        assert "asks for it" in chosen.reason


def test_a_run_that_does_not_fit_is_refused_with_what_would(tiny_model: Path, tmp_path: Path) -> None:
    found = estimates(tiny_model)
    between = int((found.of(False).host + found.of(True).host) / 2)
    with pytest.raises(UserError, match=r"does not fit: it needs .*--max-memory allows .*; with --stream it fits$"):
        choose_residency(request(tiny_model, tmp_path / "o", stream=False, max_memory=between), found)
    with pytest.raises(UserError, match=r"does not fit: .*; raise --max-memory to "):
        choose_residency(request(tiny_model, tmp_path / "o", max_memory=1000), found)
    small = replace(found, machine=machine(host_memory=1e6))
    with pytest.raises(UserError, match=r"are available; neither .* it needs a larger machine$"):
        choose_residency(request(tiny_model, tmp_path / "o"), small)
    device = machine(accelerator=True, device_memory=1e12, link=1e10)
    graph = replace(found, machine=device)
    most = graph.of(True).device
    assert most is not None
    tight = replace(found, machine=machine(accelerator=True, device_memory=0.97 * most, link=1e10))
    with pytest.raises(UserError, match=r"of memory on the device, and .*; with --batch-size 1 it fits$"):
        choose_residency(request(tiny_model, tmp_path / "o"), tight)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_a_model_remembers_while_it_writes(family: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / family, family)
    found = estimates(folder, calibration=[], self_share=1.0)
    ids = torch.arange(2 * 7).view(2, 7)
    cache = AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) / ids.numel()
    assert found.model.remembered == numbers
    memory = Memory(found.model, found.job, streamed=False, accelerator=False, libraries=0.0)
    # Weights are in fp32 already, in which such small runs compute.
    kept = 4 * numbers * 32 * found.model.blocks[0].length
    scores = 32 * 4 * 3 * AutoConfig.from_pretrained(folder).vocab_size
    assert memory.writing() == pytest.approx(kept + scores)
    assert memory.phases()["calibration data"].host == memory.writing()
    named = estimates(folder, calibration=[str(TEXT)], self_share=0.0)
    assert "calibration data" not in Memory(named.model, named.job, False, False, 0.0).phases()
    # A state does not grow with what was written.
    assert remembered_numbers(CONFIG_MAPPING["mamba"]()) == 0


def test_text_of_its_own_needs_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    found = estimates(tiny_model, calibration=[], self_share=0.5)
    assert found.job.sampled == 32
    assert fits_for_sampling(found)
    small = replace(found, machine=machine(accelerator=True, device_memory=1e5, link=1e10))
    assert not fits_for_sampling(small)
    # As if blocks were tiny, and the whole model was not.
    fitting = replace(small, machine=machine(host_memory=1e12, libraries=1e12 - 1e4))
    assert not fits_for_sampling(fitting)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"calibration": []}, 32),
        ({"calibration": ["self"]}, 32),
        ({"calibration": ["a.txt"], "self_share": 0.25}, 8),
        ({"calibration": ["a.txt"], "self_share": 0.0}, 0),
        ({"calibration": ["a.txt", "self"]}, 16),
    ],
)
def test_rows_that_the_model_writes(options: dict[str, Any], rows: int) -> None:
    assert sampled_rows(Recipe(**options), 32) == rows


def test_a_full_disk_is_refused_before_loading(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = estimates(tiny_model)
    usage = dataclasses.make_dataclass("Usage", ["free"])(free=1000)
    monkeypatch.setattr("lillama_core.pipeline.residency.shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"^the run needs .* of disk, and 1 kB are free at .*--output on another disk"
    ) as e:
        choose_residency(request(tiny_model, tmp_path / "deep" / "o"), found)
    assert "; with --no-remove-channels" in str(e.value)


def test_the_command_line_refuses_and_leaves_nothing(run_cli: Any, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("compress", tiny_model, "-o", tmp_path / "out", "--calibration", TEXT, *QUICK)
    assert "raise --max-memory to" in run_cli(*arguments, "--max-memory", "1MB").error
    assert run_cli(*arguments, "--max-memory", "much").error.startswith("--max-memory must be a size such as 3GB")
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]


def test_python_takes_the_same_names(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raise max_memory= to"):
        lillama_core.compress(tiny_model, tmp_path / "out", max_memory="1MB", quiet=True, **OPTIONS)
    found = lillama_core.compress(tiny_model, tmp_path / "out", stream=True, quiet=True, **OPTIONS)
    assert found.record.residency == "streamed"
    assert found.record.residency_reason == "--stream asks for it"
    assert found.record.estimate is not None
    assert found.record.estimate["residency"] == "streamed"


def test_plan_shows_the_estimate(run_cli: Any, tiny_model: Path) -> None:
    arguments = ("plan", tiny_model, "--calibration", TEXT, *QUICK)
    shown = run_cli(*arguments, "--machine", "a100-80gb").stdout
    for line in ("estimate for a100-80gb, the model in memory", "host memory", "device memory", "disk", "  total"):
        assert line in shown
    found = json.loads(run_cli(*arguments, "--json").stdout)["estimate"]
    assert found["machine"] == "this machine"
    assert found["seconds"]["total"] == pytest.approx(
        sum(s for name, s in found["seconds"].items() if name not in ("total", "profile")), abs=0.1
    )
    refused = run_cli(*arguments, "--max-memory", "1MB").stdout
    assert "refused: " in refused
    assert "estimate for" not in run_cli(*arguments, "--no-estimate").stdout
    assert "--machine has no effect" in run_cli(*arguments, "--no-estimate", "--machine", "a100-80gb").error


def test_a_plan_needs_no_weights(run_cli: Any, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config-alone").mkdir()
    (tmp_path / "config-alone" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    whole, alone = (run_cli("plan", folder) for folder in (tiny_model, tmp_path / "config-alone"))
    assert alone.status == 0, alone
    assert alone.stdout.splitlines()[1:3] == whole.stdout.splitlines()[1:3]
    ended = run_cli("compress", tmp_path / "config-alone", "--output", tmp_path / "o")
    assert "has no .safetensors weights" in ended.error
    (tmp_path / "config-alone" / "pytorch_model.bin").write_bytes(b"")
    assert "a pickle, which is never loaded" in run_cli("plan", tmp_path / "config-alone").error


def test_the_table_of_large_models_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_table, "MODELS", {"Whisper-large": estimate_table.MODELS["Whisper-large"]})
    found = estimate_table.rows()
    page = (Path(__file__).parents[1] / "docs" / "estimates.md").read_text(encoding="utf-8")
    assert len(found) == 4
    for row in found:
        assert row in page


def test_named_machines_are_sound() -> None:
    for name in machine_names():
        found = named_machine(name)
        assert found.accelerator
        assert found.eigh_seconds(4096) > found.eigh_seconds(1024)
    assert named_machine("8xa100-80gb").devices == 8


def test_more_devices_take_less_time_and_the_same_memory_each(tiny_model: Path) -> None:
    found = estimates(tiny_model)
    one, eight = (estimate(found.model, found.job, named_machine(n), False) for n in ("a100-80gb", "8xa100-80gb"))
    assert eight.device == one.device
    assert eight.seconds["forward"] < one.seconds["forward"]
    assert eight.seconds["output"] == one.seconds["output"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_of_rates_is_read(tmp_path: Path) -> None:
    rates = {k: v for k, v in LARGE.items() if k != "name"}
    found = named_machine(write(tmp_path / "mine.yaml", yaml.safe_dump(rates)))
    assert found == machine(name="mine")
    # YAML 1.1 takes this for text.
    text = yaml.safe_dump({**rates, "float32": 0}).replace("float32: 0", "float32: 1e11")
    assert named_machine(write(tmp_path / "mine.yaml", text)) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"float32": -1}, "float32 must be more than 0"),
        ({"float32": float("inf")}, "float32 must be a finite number"),
        ({"float32": float("nan")}, "float32 must be"),
        ({"float32": "fast"}, "float32 must be a number"),
        ({"float32": True}, "float32 must be a number"),
        ({"devices": 0}, "devices must be"),
        ({"eigh": {}}, "eigh must be a mapping of sizes to seconds"),
        ({"eigh": {-4: 1.0}}, "eigh must be a mapping of sizes to seconds"),
        ({"eigh": {"big": 1.0}}, "eigh must be"),
        ({"eigh": 3}, "eigh must be"),
        ({"flaot32": 1}, "unknown key 'flaot32'; did you mean 'float32'"),
        ({"accelerator": True}, "device_memory and link must be given"),
        ({"start": None}, "start must be"),
    ],
)
def test_bad_rates_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rates = {k: v for k, v in {**LARGE, **change}.items() if k != "name"}
    with pytest.raises(UserError, match=message):
        named_machine(write(tmp_path / "mine.yaml", yaml.safe_dump(rates)))


@pytest.mark.parametrize(
    "text",
    ["", "- a", "3", "{", "a: 2024-99-99", "!!python/object/apply:os.system ['true']", "1: 2", "[" * 5000, "\0"],
)
def test_a_file_that_holds_no_rates_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^machine '.*mine.yaml'"):
        named_machine(write(tmp_path / "mine.yaml", text))


def test_machines_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no machine named 'a100-80g' \(there are: .*did you mean 'a100-80gb'"):
        named_machine("a100-80g")
    with pytest.raises(UserError, match="cannot be read"):
        named_machine(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="is no list of rates"):
        named_machine(write(tmp_path / "long.yaml", "a: 1\n" * 30_000))
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not YAML"):
        named_machine(str(tmp_path / "mine.yaml"))


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path))
    said: list[str] = []
    calls: list[int] = []

    def rates(device: torch.device) -> dict[str, Any]:
        calls.append(1)
        return {k: v for k, v in LARGE.items() if k not in ("name", "host_memory")}

    monkeypatch.setattr("lillama_core.estimates.measure.measure", rates)
    first = this_machine(torch.device("cpu"), said.append)
    second = this_machine(torch.device("cpu"), said.append)
    assert (first.float32, second.eigh) == (1e11, first.eigh)
    assert (len(calls), len(said)) == (1, 1)
    (file,) = tmp_path.rglob("*.json")
    # Anybody may have put a file there.
    for damaged in ("{", "[]", json.dumps({"eigh": {"1": -1}}), json.dumps({"eigh": {}})):
        file.write_text(damaged)
        assert this_machine(torch.device("cpu")).float32 == 1e11
    assert len(calls) == 5


def test_the_disk_is_measured_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "file" / "cache"))
    written, read = _disk(2**20)
    assert min(written, read) > 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"neither the cache '.*' can be written .* nor temporary files"):
        _disk(2**20)


def test_this_machine_has_rates() -> None:
    found = this_machine(torch.device("cpu"))
    assert found.host_memory > found.libraries > 1e8
    assert found.float32 > 1e8
    assert not found.accelerator


def test_an_estimate_is_plain_numbers() -> None:
    found = Estimate(True, {"forward": 1.0, "backward": 2.0}, 3.0, 4.0, None, 5.0).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["seconds"]["profile"] == 3.0
