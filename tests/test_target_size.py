"""A size in place of a reduction: bits as far as they go, ranks for the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.errors import UserError
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.quantize import QuantizeRequest
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.to_size import Way, way_to
from lillama_core.recipe.model import Recipe

Cli = Callable[..., Ended]

FEW: dict[str, Any] = {
    "recipe": {"recipe": "fast", "sensitivity_tokens": 128}, "tokens": 1024, "sequence_length": 32, "batch_size": 4,
    "self_share": 0.0, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return make_model(folder, hidden_size=96, intermediate_size=160, dtype=torch.float16)


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def way(model: Path, target: int) -> Way:
    return way_to(Request(str(model), model / "never", Recipe()), target)


def test_ranks_are_lowered_only_below_what_four_bits_take(dense: Path, tmp_path: Path) -> None:
    lillama_core.quantize(dense, tmp_path / "least", bits=4, embedding_bits=4, quiet=True)
    least = bytes_of(tmp_path / "least")
    # Headers are counted from above.
    assert way(dense, least + 8000).reduction == 0
    # A quarter less, and what headers and groups that are not full take besides.
    assert 0.25 < way(dense, int(0.75 * least)).reduction < 0.7
    assert way(dense, bytes_of(dense) - 1).reduction == 0
    with pytest.raises(UserError, match="is nothing to do: the weights take"):
        way(dense, 2 * bytes_of(dense))
    with pytest.raises(UserError, match=r"cannot be met: a reduction of .* is more than the linear maps .* can give"):
        way(dense, 12_000)


@pytest.mark.parametrize("part", [0.75, 0.9, 1.3])
def test_what_comes_out_fits(part: float, dense: Path, calibration_text: Path, tmp_path: Path) -> None:
    lillama_core.quantize(dense, tmp_path / "least", bits=4, embedding_bits=4, quiet=True)
    target = int(part * bytes_of(tmp_path / "least"))
    found = lillama_core.compress(dense, tmp_path / "small", calibration=calibration_text, target_size=target, **FEW)
    assert bytes_of(tmp_path / "small") <= target
    assert bytes_of(tmp_path / "small") > 0.85 * target
    record = json.loads((tmp_path / "small" / "lillama.json").read_text())
    assert record["quantization"]["target_size"] == target
    assert record["quantization"]["with_feedback"] > 0
    assert str(calibration_text.parent) not in json.dumps(record)
    assert bool(record["plan"].get("ranks")) == (part < 1)
    assert "parameters" in repr(found)
    assert found._repr_html_()
    seconds = record["seconds"]
    assert seconds["total"] >= record["quantization"]["seconds"] == seconds.get("quantization", seconds["total"])
    if part < 1:
        again = f"lillama quantize OUTPUT --output OUTPUT2 --target-size {target} --calibration calibration.txt"
        assert again in (tmp_path / "small" / "README.md").read_text()
        assert sum(s for name, s in seconds.items() if name in ("blocks", "quantization")) <= seconds["total"]
    ids = torch.tensor([[5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(model(ids).logits, found.model(ids).logits)
    assert not list(tmp_path.glob("small.*"))


def test_a_failing_second_step_leaves_the_first_one(
    dense: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lillama_core.pipeline import to_size

    def full(*_: Any) -> None:
        raise lillama_core.LillamaError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(to_size, "quantize", full)
        with pytest.raises(lillama_core.LillamaError, match=r"is full; the model before .* '.*low-rank'"):
            lillama_core.compress(dense, tmp_path / "small", calibration=calibration_text, target_size="60KB", **FEW)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small.low-rank")
    written = (tmp_path / "small.low-rank" / "lillama.json").stat().st_mtime_ns

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(to_size, "compress", never)
    assert written
    # As a rounding leaves it that was killed.
    (tmp_path / "small.partial" / "result").mkdir(parents=True)
    (tmp_path / "small.partial" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is of another request"):
        lillama_core.compress(
            dense, tmp_path / "small", calibration=calibration_text, target_size="59KB", resume=True, **FEW
        )
    lillama_core.compress(
        dense, tmp_path / "small", calibration=calibration_text, target_size="60KB", resume=True, **FEW
    )
    assert bytes_of(tmp_path / "small") <= 60_000
    assert not list(tmp_path.glob("small.*"))


def test_an_overwriting_run_goes_on_from_either_step(
    dense: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lillama_core.pipeline import to_size

    output, low_rank = tmp_path / "small", tmp_path / "small.low-rank"
    output.mkdir()
    (output / "lillama.json").write_text("old")

    def start(request: Request, *_: Any) -> None:
        RunDirectory(request.output).open({}, request.overwrite)
        raise lillama_core.LillamaError("stopped in the first step")

    def finish(request: Request, *_: Any) -> None:
        shutil.rmtree(tmp_path / "small.low-rank.partial")
        low_rank.mkdir()
        (low_rank / "lillama.json").write_text("{}")

    def begin(request: QuantizeRequest, *_: Any) -> None:
        RunDirectory(request.output).check(request.overwrite, False)
        raise lillama_core.LillamaError("stopped before the second step")

    def run(**options: Any) -> None:
        lillama_core.compress(dense, output, calibration=calibration_text, target_size="60KB", **FEW, **options)

    monkeypatch.setattr(to_size, "_check_same", lambda *_: None)
    monkeypatch.setattr(to_size, "quantize", begin)
    monkeypatch.setattr(to_size, "compress", start)
    with pytest.raises(UserError, match="is finished: there is nothing to resume"):
        run(resume=True)
    with pytest.raises(lillama_core.LillamaError, match="in the first step"):
        run(overwrite=True)
    with pytest.raises(UserError, match="exists; pass overwrite=True to replace it, or resume=True to go on"):
        run()
    monkeypatch.setattr(to_size, "compress", finish)
    for _ in range(2):
        with pytest.raises(lillama_core.LillamaError, match="before the second step"):
            run(resume=True)
        monkeypatch.setattr(to_size, "compress", None)
    assert (output / "lillama.json").read_text() == "old"


def test_ranks_of_a_wide_model_fill_groups(make_model: Callable[..., Path], tmp_path: Path) -> None:
    wide = make_model(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=1, dtype=torch.float16)
    found = way(wide, 230_000)
    assert found.recipe.allocation.options["rank_multiple"] == 32
    narrow = Request(str(wide), tmp_path / "never", Recipe(allocation={"name": "spectrum", "rank_multiple": 24}))
    assert way_to(narrow, 230_000).recipe.allocation.options["rank_multiple"] == 96


def test_a_number_of_parameters(dense: Path, run_cli: Cli) -> None:
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(dense).parameters())
    ended = run_cli("plan", dense, "--target-parameters", "90K", "--json", "--no-estimate")
    assert ended.status == 0, ended
    after = json.loads(ended.stdout)["parameters_after"]
    assert 89_000 < after <= 90_000
    by_stack = run_cli(
        "plan", dense, "--target-parameters", "0.09M", "--stacks", "decoder", "--json", "--no-estimate",
        "--no-compress-embeddings",
    )  # fmt: skip
    assert 89_000 < json.loads(by_stack.stdout)["parameters_after"] <= 90_000
    for wrong, message in (
        (f"{total}", f"is nothing to do: the model has {total:,}"),
        ("100", "is more than the linear maps of the model can give"),
        ("many", "--target-parameters must be a whole number"),
        ("-5", "--target-parameters"),
    ):
        assert message in run_cli("plan", dense, "--target-parameters", wrong).error
    ended = run_cli("plan", dense, "--target-parameters", "90K", "--reduction", "0.2")
    assert "--reduction does nothing: --target-parameters says" in ended.error


@pytest.mark.parametrize("option", [("--reduction", "0.3"), ("--format", "pivoted"), ("--target-speedup", "1.2")])
def test_options_that_leave_no_choice(option: tuple[str, str], dense: Path, tmp_path: Path, run_cli: Cli) -> None:
    ended = run_cli("compress", dense, "--output", tmp_path / "small", "--target-size", "60KB", *option)
    assert ended.error.startswith(f"{option[0]} does nothing: --target-size says")


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("stream", True, "stream=True"),
        ("stream", False, "no_stream=True"),
        ("max_memory", "1GB", "max_memory="),
        ("track", "tensorboard", "track="),
        ("exclude", ["mlp.up_proj"], "exclude"),
        ("init", {"name": "fisher", "input_damping": 1e-4}, "init"),
    ],
)
def test_options_that_rounding_alone_does_not_read(
    option: str, value: Any, name: str, dense: Path, tmp_path: Path
) -> None:
    few = {**FEW, "compress_embeddings": False, option: value}
    with pytest.raises(UserError, match=rf"{name}.* does nothing: this target_size= is reached by bits alone"):
        lillama_core.compress(dense, tmp_path / "small", target_size=bytes_of(dense) - 1, **few)


def test_the_dtype_counts_where_bits_suffice(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    few = {**FEW, "calibration": calibration_text, "dtype": "float16"}
    with pytest.raises(UserError, match=r"nothing to do: the weights take .* in float16$"):
        lillama_core.compress(tiny_model, tmp_path / "small", target_size="110KB", **few)
    found = lillama_core.compress(tiny_model, tmp_path / "small", target_size="60KB", **few)
    assert {t.dtype for t in load_file(tmp_path / "small" / "model.safetensors").values()} == {
        torch.float16,
        torch.uint8,
    }
    assert found.record.dtype == "float16"
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float16"


def test_a_dry_run_says_how(dense: Path, calibration_text: Path, tmp_path: Path, run_cli: Cli) -> None:
    options = ("--calibration", calibration_text, "--self-share", "0", "--tokens", "1024", "--sequence-length", "32")
    ended = run_cli("compress", dense, "--output", tmp_path / "small", "--target-size", "60KB", "--dry-run", *options)
    assert ended.status == 0, ended
    assert ended.stdout.startswith("--target-size: weights in 8 and 4 bits, ")
    assert "factored" in ended.stdout
    bits = ("compress", dense, "--target-size", str(bytes_of(dense) - 1), "--dry-run", *options)
    ended = run_cli(*bits, "--output", tmp_path / "small")
    assert (ended.status, len(ended.stdout.splitlines())) == (0, 1), ended
    # What suffices in bits is checked as a run does it, too.
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "thesis.txt").touch()
    assert "exists" in run_cli(*bits, "--output", tmp_path / "old").error
    for wrong, said in (("--calibration", "none.txt"), ("--tokenizer", "nowhere"), ("--device", "cuda:99")):
        assert said in run_cli(*bits, "--output", tmp_path / "small", wrong, said).error
    ended = run_cli("compress", dense, "--output", tmp_path / "small", "--target-size", "cheap", *options)
    assert "--target-size" in ended.error
