"""A run that was stopped goes on from its last finished block, and ends as if it had not been stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import QUICK, Ended, command, environment, run_process, tree

from lillama_core.cli.main import main
from lillama_core.errors import LillamaError, UserError
from lillama_core.output.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

Cli = Callable[..., Ended]
BLOCKS = 3


@dataclass
class Setting:
    """What the runs of this module have in common."""

    model: Path
    text: Path
    finished: Path
    """An output that was never interrupted."""

    def arguments(self, output: Path) -> list[str]:
        # Enough steps that a signal finds the block still at work.
        return [
            *("compress", str(self.model), "-o", str(output), "--calibration", str(self.text)),
            *(*QUICK, "--steps", "25", "--self-share", "0.5"),
        ]


@pytest.fixture(scope="module")
def setting(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    folder = tmp_path_factory.mktemp("resume")
    found = Setting(
        make_model(folder / "model", num_hidden_layers=BLOCKS),
        Path(shutil.copy(calibration_text, folder / "text.txt")),
        folder / "finished",
    )
    done = run_process(*found.arguments(found.finished), fresh=True)
    assert done.status == 0, done
    return found


def start_until(arguments: list[str], appears: Path) -> warm.Process:
    """Start a run and stop it, still alive, when ``appears`` does."""
    process = warm.start(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 120
    while not appears.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    return process


def end(process: warm.Process, number: signal.Signals) -> Ended:
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=60)
    return Ended(process.returncode, stdout, stderr)


def same_model(found: Path, expected: Path) -> None:
    names = sorted(p.name for p in expected.iterdir())
    assert sorted(p.name for p in found.iterdir()) == names
    weights = [n for n in names if n.endswith(".safetensors")]
    assert weights
    for name in [*weights, "config.json", "tokenizer.json"]:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def unfinished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out.partial`` of a run that was killed after its first block; and what was seen on the way."""
    folder = tmp_path_factory.mktemp("unfinished")
    process = start_until(
        setting.arguments(folder / "out"), folder / "out.partial" / "blocks" / "decoder-0.safetensors"
    )
    try:
        before = tree(folder)
        # From another process, this one, while the first lives.
        for flags in ([], ["--resume"], ["--overwrite"]):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                status = main([*setting.arguments(folder / "out"), *flags])
            assert (status, said.getvalue()) == (2, f"lillama: error: another run is writing to '{folder}/out'\n")
        assert tree(folder) == before
    finally:
        ended = end(process, signal.SIGKILL)
    assert ended.status == -signal.SIGKILL
    assert sorted(p.name for p in (folder / "out.partial" / "blocks").glob("*.safetensors")) == [
        "decoder-0.safetensors"
    ]
    assert not (folder / "out").exists()
    return folder


@pytest.fixture
def killed(unfinished: Path, tmp_path: Path) -> Path:
    """A copy of it; the path of the output."""
    # The lock file included, which a killed process leaves behind.
    shutil.copytree(unfinished, tmp_path / "here")
    assert (tmp_path / "here" / ".out.lock").exists()
    return tmp_path / "here" / "out"


def test_killed_run_goes_on(setting: Setting, killed: Path) -> None:
    block = killed.parent / "out.partial" / "blocks" / "decoder-0.safetensors"
    written = block.stat().st_mtime_ns
    process = start_until([*setting.arguments(killed), "--resume"], block.with_name("decoder-1.safetensors"))
    # Not done again.
    assert block.stat().st_mtime_ns == written
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    same_model(killed, setting.finished)
    assert [p.name for p in killed.parent.iterdir()] == ["out"]
    record, expected = (json.loads((p / "lillama.json").read_text()) for p in (killed, setting.finished))
    assert record["resumed"] is True
    assert expected["resumed"] is False
    assert record["blocks"] == expected["blocks"]
    assert record["fidelity"] == expected["fidelity"]
    assert "parameters" in stdout


def test_interrupted_from_the_keyboard(setting: Setting, tmp_path: Path) -> None:
    process = start_until(setting.arguments(tmp_path / "out"), tmp_path / "out.partial" / "blocks" / "decoder-0.json")
    ended = end(process, signal.SIGINT)
    assert ended.status == 1, ended
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last == "lillama: error: interrupted; what was finished is kept, --resume goes on from there"
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_killed_while_writing_the_result(setting: Setting, tmp_path: Path) -> None:
    process = start_until(setting.arguments(tmp_path / "out"), tmp_path / "out.partial" / "result" / "config.json")
    end(process, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    done = run_process(*setting.arguments(tmp_path / "out"), "--resume")
    assert done.status == 0, done
    same_model(tmp_path / "out", setting.finished)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupted_overwriting(setting: Setting, tmp_path: Path, run_cli: Cli) -> None:
    """The old output stays until the new one is complete, and --resume still knows that it is to be replaced."""
    output = tmp_path / "out"
    shutil.copytree(setting.finished, output)
    (output / "lillama.json").write_text("{}")
    before = tree(output)
    arguments = setting.arguments(output)
    process = start_until([*arguments, "--overwrite"], tmp_path / "out.partial" / "blocks" / "decoder-0.safetensors")
    end(process, signal.SIGKILL)
    assert tree(output) == before
    said = run_cli(*arguments).error
    assert "--overwrite" in said
    assert "--resume" in said
    done = run_process(*arguments, "--resume")
    assert done.status == 0, done
    same_model(output, setting.finished)
    assert (output / "lillama.json").read_text() != "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unfinished_run_wants_a_decision(setting: Setting, killed: Path, run_cli: Cli) -> None:
    before = tree(killed.parent)
    said = run_cli(*setting.arguments(killed)).error
    assert "pass --resume to go on or --overwrite to start anew" in said
    assert tree(killed.parent) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("--reduction", "0.3"), "it differs in reduction (0.2 -> 0.3);"),
        (("--steps", "26", "--loss", "mse"), "it differs in loss (sensitivity -> mse), steps (25 -> 26);"),
        (("--compute", "bfloat16"), "compute (auto -> bfloat16)"),
    ],
)
def test_resuming_with_another_recipe(
    setting: Setting, killed: Path, run_cli: Cli, changes: tuple[str, ...], expected: str
) -> None:
    before = tree(killed.parent / "out.partial")
    assert expected in run_cli(*setting.arguments(killed), *changes, "--resume").error
    assert tree(killed.parent / "out.partial") == before


def test_resuming_with_other_data(setting: Setting, killed: Path, run_cli: Cli) -> None:
    """The same name, other words."""
    text = setting.text.read_text(encoding="utf-8")
    before = tree(killed.parent / "out.partial")
    setting.text.write_text(text.replace("the", "ten"), encoding="utf-8")
    try:
        assert "it differs in the data;" in run_cli(*setting.arguments(killed), "--resume").error
    finally:
        setting.text.write_text(text, encoding="utf-8")
    assert tree(killed.parent / "out.partial") == before


def test_resuming_with_another_model(
    setting: Setting, killed: Path, run_cli: Cli, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1

    other = Setting(
        make_model(tmp_path / "other", num_hidden_layers=BLOCKS, change=change), setting.text, setting.finished
    )
    before = tree(killed.parent / "out.partial")
    assert "it differs in the model;" in run_cli(*other.arguments(killed), "--resume").error
    assert tree(killed.parent / "out.partial") == before


def test_resuming_what_is_finished(setting: Setting, run_cli: Cli) -> None:
    before = tree(setting.finished)
    said = run_cli(*setting.arguments(setting.finished), "--resume").error
    assert "is finished: there is nothing to resume" in said
    assert tree(setting.finished) == before


def test_damaged_notes(setting: Setting, killed: Path, run_cli: Cli) -> None:
    (killed.parent / "out.partial" / "run.json").write_text("{")
    said = run_cli(*setting.arguments(killed), "--resume").error
    assert "is damaged" in said
    assert "--overwrite" in said


def test_damaged_block(setting: Setting, killed: Path, run_cli: Cli) -> None:
    block = killed.parent / "out.partial" / "blocks" / "decoder-0.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    ended = run_cli(*setting.arguments(killed), "--resume")
    assert ended.status == 1
    assert "decoder-0.safetensors' is damaged" in ended.stderr.splitlines()[-1]
    assert "--overwrite" in ended.stderr.splitlines()[-1]


def test_lock_within_one_process(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "a" / "out"), RunDirectory(tmp_path / "a" / "out")
    with first.locked(), pytest.raises(UserError, match="another run is writing"), second.locked():
        pytest.fail("both hold the lock")
    with second.locked():
        pass
    # Neither the lock nor the folder that was made for it stays.
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "out")
    directory.open({"model": "x"}, overwrite=False)
    directory.result.mkdir()
    (directory.result / "lillama.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("words")
    with pytest.raises(LillamaError, match="has appeared since this run began; move it away, and --resume"):
        directory.publish()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "words"
    (tmp_path / "out" / "thesis.txt").unlink()
    (tmp_path / "out").rmdir()
    directory.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_nobody_knows_which_run_are_not_used(tmp_path: Path) -> None:
    """As when removing an old run was interrupted after the note of its start."""
    directory = RunDirectory(tmp_path / "out")
    directory.open({"model": "x"}, overwrite=False)
    (directory.blocks / "decoder-0.safetensors").write_text("old")
    (directory.path / "run.json").unlink()
    directory.open({"model": "y"}, overwrite=False)
    assert not list(directory.blocks.iterdir())
