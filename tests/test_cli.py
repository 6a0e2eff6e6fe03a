"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, QUICK_ANYHOW, Ended, command, environment, tree

from lillama_core import Recipe, load_recipe

Cli = Callable[..., Ended]


def test_version(run_cli: Cli) -> None:
    assert run_cli("--version") == Ended(0, f"lillama {importlib.metadata.version('lillama')}\n", "")


def test_help(run_cli: Cli) -> None:
    done = run_cli("--help")
    assert (done.status, done.stderr) == (0, "")
    for name in ("compress", "plan", "evaluate", "plugins", "strategies"):
        assert name in done.stdout
        assert run_cli(name, "--help").status == 0


@pytest.mark.parametrize(
    "option",
    [
        *("--output", "--reduction", "--calibration", "--recipe", "--tokens", "--sequence-length", "--allocation"),
        *("--init", "--format", "--loss", "--mode", "--train", "--stacks", "--architecture", "--tokenizer", "--dtype"),
        *("--device", "--seed", "--trust-remote-code", "--overwrite", "--resume", "--quiet", "--verbose"),
    ],
)
def test_promised_options(run_cli: Cli, option: str) -> None:
    assert re.search(rf"{option}\b", run_cli("compress", "--help").stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "required: COMMAND"),
        (("compres", "m"), "'compres'"),
        (("compress",), "required: MODEL"),
        (("compress", "m"), "-o/--output"),
        (("compress", "m", "-o", "o", "--reductoin", "0.2"), "'--reductoin'; did you mean '--reduction'?"),
        (("compress", "m", "-o", "o", "--seq=5"), "unknown option '--seq'"),
        (("compress", "m", "-o", "o", "n"), "unknown argument 'n'"),
        (("compress", "m", "-o", "o", "--tokens", "many"), "--tokens must be a whole number, not 'many'"),
        (("compress", "m", "-o", "o", "--reduction", "a fifth"), "--reduction must be a number, not 'a fifth'"),
        (("compress", "m", "-o", "o", "--quiet", "--verbose"), "not allowed with"),
        (("compress", "m", "-o", "o", "--recipe"), "option --recipe needs a value"),
        (("compress", "m", "-o", "--overwrite"), "option -o needs a value"),
        (("plan", "m", "--init.input-damping"), "option --init.input-damping needs a value"),
        (("plan", "m", "--intit.input-damping", "1"), "unknown option '--intit.input-damping'"),
        (("plan", "m", "--output", "o"), "unknown option '--output'"),
        (("evaluate", "m", "--windows", "-1"), "--windows must be at least 0, not -1"),
        (("evaluate", "m", "--limit", "0"), "--limit must be at least 1, not 0"),
        (("evaluate", "m", "--shots", "-1"), "--shots must be at least 0, not -1"),
        (("evaluate", "m", "--sequence-length", "1"), "--sequence-length must be at least 2, not 1"),
        (("evaluate", "m", "--json", "nowhere/at/all.json"), "cannot be written"),
        (("evaluate", "./nowhere"), "no model at './nowhere'"),
        (("evaluate", "./nowhere", "--details", "transcripts"), "no model at './nowhere'"),
        (("evaluate", "m", "--details", "/dev/null/transcripts"), "'/dev/null' is no directory"),
        (("evaluate", "m", "--baseline", "./nowhere"), "no model at './nowhere'"),
        (("evaluate", "m", "--device", "gpu"), "--device must be"),
        (("plugins", "all"), "unknown argument 'all'"),
    ],
)
def test_wrong_commands(
    run_cli: Cli, arguments: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_cli(*arguments)
    assert expected in ended.error
    assert ended.stdout == ""
    assert tree(tmp_path) == {}


def test_data_for_an_evaluation_are_looked_for_before_the_model_is_loaded(run_cli: Cli, tiny_model: Path) -> None:
    ended = run_cli("evaluate", tiny_model, "--data", "nowhere.txt")
    assert "no such file" in ended.error
    assert "Measuring" not in ended.stderr


def test_compress_prints_results_on_stdout_and_progress_on_stderr(compressed: Path) -> None:
    """Neither is a terminal: plain lines."""
    stdout, stderr = ((compressed.parent / name).read_text() for name in ("stdout", "stderr"))
    assert [line.split()[0] for line in stdout.splitlines()] == ["parameters", "bytes", "perplexity", "time", "report"]
    record = json.loads((compressed / "lillama.json").read_text())
    assert f"{record['parameters']['parameters_after']:,}" in stdout
    assert stderr.startswith("Loading ")
    assert "Compressing decoder 2/2" in stderr
    for text in (stdout, stderr):
        assert "\x1b" not in text
        assert "\r" not in text
        assert "Warning" not in text


def test_verbose(run_cli: Cli, compressed: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    assert "calibration: 32 x 32 tokens from" not in (compressed.parent / "stderr").read_text()
    # The fewest steps that get that far.
    arguments = ("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK)
    verbose = run_cli(*arguments, "--verbose", "--steps", "0")
    assert verbose.status == 0
    assert "calibration: 32 x 32 tokens from" in verbose.stderr


PLANS: list[tuple[str, ...]] = [
    (),
    (
        "--allocation",
        "top-first",
        "--allocation.minimum-rank",
        "4",
        "--format",
        "factored",
        "--reduction",
        "0.37",
        "--stacks",
        "decoder",
    ),
]


@pytest.mark.parametrize("options", PLANS, ids=" ".join)
def test_plan_promises_what_the_run_gives(
    run_cli: Cli, compressed: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    plan = run_cli("plan", tiny_model, "--json", *options)
    assert (plan.status, plan.stderr) == (0, "")
    found = json.loads(plan.stdout)
    if options:
        compressed = tmp_path / "o"
        arguments = ("-o", compressed, "--calibration", calibration_text, *QUICK_ANYHOW, "--steps", "0", *options)
        assert run_cli("compress", tiny_model, *arguments).status == 0
    record = json.loads((compressed / "lillama.json").read_text())
    # Ranks are whole numbers: the plan's even ranks and those by spectrum end within a rank of the same budget. A rank
    # is a larger part of what is removed than of what is kept.
    for name, value in record["parameters"].items():
        assert found[name] == pytest.approx(value, rel=1e-2 if name == "reduction" else 2e-3), name
    assert found["dtype"] == record["dtype"]
    if found["note"] is None:
        assert {m["name"]: m["rank"] for m in found["maps"] if m["rank"]} == record["plan"]["ranks"]
    assert sum(m["parameters"] for m in found["maps"]) == found["multiply_adds_per_token_after"]


def test_plan_needs_the_config_and_shapes_alone(run_cli: Cli, tiny_model: Path) -> None:
    """Neither the tokenizer nor a single weight is read: weights full of NaN make no difference."""
    before = run_cli("plan", tiny_model)
    weights = tiny_model / "model.safetensors"
    raw = weights.read_bytes()
    header = int.from_bytes(raw[:8], "little") + 8
    weights.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))
    (tiny_model / "tokenizer.json").unlink()
    assert run_cli("plan", tiny_model) == before
    assert "mlp.up_proj" in before.stdout
    assert "note: allocation 'spectrum'" in before.stdout


def test_a_dry_run_checks_everything_and_writes_nothing(
    run_cli: Cli,
    compressed: Path,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("compress", tiny_model, "--output", tmp_path / "new", "--calibration", calibration_text, "--dry-run")
    done = run_cli(*words, "--reduction", "0.3")
    assert done.status == 0, done
    planned = run_cli("plan", tiny_model, "--reduction", "0.3", "--calibration", calibration_text)
    assert done.stdout.splitlines()[:3] == planned.stdout.splitlines()[:3]
    for wrong, said in (
        (("--calibration", tmp_path / "none.txt"), "none.txt"),
        (("--output", compressed), "exists"),
        (("--tokenizer", tmp_path / "none"), "tokenizer"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--max-memory", "1MB"), "raise --max-memory to"),
        (("--stream", "--self-share", "0", "--recipe", "best"), "--healing-epochs: the blocks are read from disk"),
    ):
        assert said in run_cli(*words, *wrong).error
    usage = dataclasses.make_dataclass("Usage", ["free"])(free=1000)
    monkeypatch.setattr("lillama_core.pipeline.residency.shutil.disk_usage", lambda path: usage)
    assert "of disk, and 1 kB are free" in run_cli(*words).error
    assert list(tmp_path.iterdir()) == [tiny_model]


def test_evaluate(run_cli: Cli, compressed: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done = run_cli(
        *("evaluate", compressed, "--baseline", tiny_model, "--data", calibration_text, "--windows", "2"),
        *("--sequence-length", "16", "--limit", "2", "--json", tmp_path / "numbers.json"),
    )
    assert done.status == 0, done
    header, _, first, *_ = done.stdout.splitlines()
    assert header.split() == ["metric", "tiny", "small", "change", "unit", "better"]
    assert first.startswith("perplexity ")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers) == 2
    assert done.stderr.splitlines()[0] == f"Measuring {tiny_model}"
    for measurements in numbers.values():
        assert {"perplexity"} < {m["name"] for m in measurements}


def test_evaluate_some_metrics(run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    words = ("evaluate", tiny_model, "--data", calibration_text, "--windows", "2", "--sequence-length", "16")
    assert run_cli(*words, "--metrics", "footprint,perplexity", "--json", tmp_path / "n.json").status == 0
    (measured,) = json.loads((tmp_path / "n.json").read_text()).values()
    assert [m["name"].partition("/")[0] for m in measured] == ["perplexity", *["footprint"] * 3]
    said = run_cli(*words, "--metrics", "perplexety").error
    assert said.startswith("no metric named 'perplexety' (there are: perplexity, accuracy, speed, footprint, answers)")
    assert said.endswith("did you mean 'perplexity'?")


def test_evaluate_too_little_text(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    assert "give more text" in run_cli("evaluate", tiny_model, "--data", tmp_path / "short.txt").error


def test_evaluate_unknown_task(run_cli: Cli, tiny_model: Path) -> None:
    pytest.importorskip("lm_eval")
    ended = run_cli("evaluate", tiny_model, "--tasks", "lillama_clozee", "--windows", "1", "--sequence-length", "16")
    assert "did you mean 'lillama_cloze'?" in ended.error


def test_reader_that_goes_away() -> None:
    """As with ``lillama plugins | head -0``."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("plugins"), stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


COMPRESS = "compress m -o out"


@pytest.mark.parametrize("command_", ["plan m", "plugins", "compress m -o out", "evaluate m"])
def test_every_command_shows_tracebacks_when_asked(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, command_: str
) -> None:
    """Errors advise it."""

    def fail(options: Any) -> int:
        raise ValueError("here")

    monkeypatch.setattr(f"lillama_core.cli.{command_.split()[0]}.run", fail)
    with pytest.raises(ValueError, match="here"):
        run_cli(*command_.split(), "--debug")


@pytest.mark.parametrize(
    ("words", "error", "expected"),
    [
        (COMPRESS, KeyboardInterrupt(), "interrupted; what was finished is kept, --resume goes on from there\n"),
        # Nothing is advised that the command does not have.
        ("evaluate m", KeyboardInterrupt(), "interrupted\n"),
        (COMPRESS, MemoryError(), "out of memory; lower --batch-size"),
        ("evaluate m", MemoryError(), "out of memory; free some memory, or lower --sequence-length\n"),
        ("plugins", MemoryError(), "out of memory; free some memory\n"),
        (COMPRESS, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto"), "out of memory; lower"),
        ("plugins", OSError(28, "No space left on device", "/there"), "No space left on device: /there"),
        ("plugins", ValueError("two\nlines"), "ValueError: two lines (--debug shows where)"),
    ],
)
def test_what_nobody_foresaw(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, error: BaseException, expected: str
) -> None:
    """One line and status 1, whatever a command raises."""

    def fail(options: Any) -> int:
        raise error

    command_, *rest = words.split()
    monkeypatch.setattr(f"lillama_core.cli.{command_}.run", fail)
    ended = run_cli(command_, *rest)
    assert ended.status == 1
    assert ended.stderr.startswith(f"lillama: error: {expected}")
    assert ended.stderr.count("\n") == 1


def test_settings_of_libraries_are_put_back(run_cli: Cli) -> None:
    """`main` may be called from a program that has its own ideas of logging."""
    import logging

    import transformers

    before = (transformers.utils.logging.get_verbosity(), logging.root.manager.disable)
    run_cli("plugins")
    run_cli("nothing")
    assert (transformers.utils.logging.get_verbosity(), logging.root.manager.disable) == before


def test_recipes_are_the_defaults_of_the_command_line() -> None:
    assert load_recipe("default") == Recipe()


# What can be chosen, and its options


def test_strategies_are_listed_with_their_options(run_cli: Cli) -> None:
    done = run_cli("strategies")
    assert (done.status, done.stderr) == (0, "")
    for words in ("--init.input-damping", "(default: 0.0001)", "--allocation.minimum-rank", "--loss.damping"):
        assert words in done.stdout
    by_slot = run_cli("strategies", "init").stdout
    assert by_slot == run_cli("strategies", "initializers").stdout
    assert "whitened" in by_slot
    assert "uniform" not in by_slot
    by_name = run_cli("strategies", "bottom-first").stdout
    assert "--allocation.rank-step" in by_name
    assert "spectrum" not in by_name
    assert "did you mean 'fisher'?" in run_cli("strategies", "fischer").error


@pytest.mark.parametrize(
    "arguments",
    [
        ("--allocation", "bottom-first", "--minimum-rank", "6", "--rank-step", "1"),
        ("--allocation", "bottom-first", "--allocation.minimum-rank", "6", "--allocation.rank-step=1"),
        ("--allocation.rank_step", "1", "--allocation", "bottom-first", "--allocation.minimum_rank=6"),
    ],
)
def test_options_of_a_strategy_reach_it(run_cli: Cli, tiny_model: Path, arguments: tuple[str, ...]) -> None:
    plan = json.loads(run_cli("plan", tiny_model, "--json", "--reduction", "20%", *arguments).stdout)
    assert plan["allocation"] == {"name": "bottom-first", "minimum_rank": 6, "rank_step": 1}
    ranks = [m["rank"] for m in plan["maps"] if m["rank"] is not None]
    assert min(ranks) == 6
    assert plan["reduction"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--init.input_dampng 3", "--init.input_dampng: 'fisher' has no such option; did you mean 'input_damping'?"),
        (
            "--init svd --init.input-damping 3",
            "'svd' has no such option; 'anchored', 'channel-size', 'fisher', 'nystrom', 'whitened'",
        ),
        ("--minimum-rank 8", "--minimum-rank: 'spectrum' has no such option; 'bottom-first' and 'top-first' have it"),
        ("--init.input-damping many", "--init.input-damping must be a number, not 'many'"),
        ("--init.input-damping 0", "--init.input-damping must be more than 0, not 0"),
        ("--allocation top-first --minimum-rank 0", "--minimum-rank must be at least 1, not 0"),
        ("--allocation top-first --minimum-rank 1.5", "--minimum-rank must be a whole number, not 1.5"),
        (
            "--allocation.rank-floor 0.3",
            "--allocation.rank-floor does nothing: the spectra of the initialiser 'fisher'",
        ),
        ("--init svd --correction-tokens 9", "--correction-tokens does nothing: the initialiser 'svd' makes no"),
        ("--allocation uniform --rescaling-tokens 9", "--rescaling-tokens does nothing: the allocator 'uniform' looks"),
        ("--init whitened --rescaling-tokens 9", "--rescaling-tokens does nothing: the initialiser 'whitened' needs"),
        ("--init svd --loss mse --sensitivity-tokens 9", "--sensitivity-tokens does nothing: the initialiser 'svd'"),
        ("--init svd --steps 0 --sensitivity-tokens 9", "--sensitivity-tokens does nothing: the initialiser 'svd'"),
        ("--steps 0 --learning-rate 1", "--learning-rate does nothing: with --steps 0 nothing is trained"),
        ("--recipe fast --train block", "--train does nothing: with --steps 0 nothing is trained"),
        ("--recipe fast --loss mse", "--loss does nothing: with --steps 0 nothing is trained"),
        ("--steps 0 --loss.damping 0.1", "--loss.damping does nothing: with --steps 0 nothing is trained"),
    ],
)
def test_options_that_nothing_reads(run_cli: Cli, tiny_model: Path, arguments: str, expected: str) -> None:
    assert expected in run_cli("plan", tiny_model, *arguments.split()).error


@pytest.mark.parametrize(
    "arguments",
    [
        "--recipe lillama --steps 0",
        "--recipe fast --init svd",
        "--recipe lillama --init fisher --allocation spectrum",
        "--init svd --correction-tokens 0 --rescaling-tokens 0",
        "--init svd --sensitivity-tokens 9",
        "--init whitened --loss mse --sensitivity-tokens 9 --compress-embeddings",
        "--init whitened --allocation.rank-floor 0.3",
        "--steps 0 --correction-tokens 9 --loss mse",
    ],
)
def test_options_that_are_read(run_cli: Cli, tiny_model: Path, arguments: str) -> None:
    """What a preset sets for what was replaced is nobody's mistake, nor is saying that something is not wanted."""
    ended = run_cli("plan", tiny_model, *arguments.split())
    assert (ended.status, ended.stderr) == (0, "")


# What starting up costs


WITHOUT = """
import resource, sys
from lillama_core.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(status, sorted({"torch", "transformers", "pydantic"} & set(sys.modules)), used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize(
    ("arguments", "allowed", "limit"),
    [(["--help"], ["pydantic"], 0.5), (["--version"], [], 0.5), (["compress", "--help"], ["pydantic"], 1.0)],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_help_is_quick(arguments: list[str], allowed: list[str], limit: float) -> None:
    """Neither torch nor transformers; CPU seconds, the smallest of three."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, env=environment(), check=True
        )
        status, rest = done.stdout.splitlines()[-1].split(" ", 1)
        loaded, _, used = rest.rpartition(" ")
        assert status == "0"
        assert set(ast.literal_eval(loaded)) <= set(allowed)
        seconds.append(float(used))
    assert min(seconds) < limit
