"""``lillama reproduce``: a run is repeated from its record, and what differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, run_process, tree
from safetensors.torch import load_file, save_file

import lillama_core

Cli = Callable[..., Ended]


def edited(folder: Path, **changes: Any) -> Path:
    """``folder`` with a record that says ``changes``; a mapping goes over the one that is there."""
    path = folder / "lillama.json"
    record = json.loads(path.read_text())
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) and record[key] else value
    path.write_text(json.dumps(record))
    return folder


@pytest.fixture
def finished(compressed: Path, tmp_path: Path) -> Path:
    """A finished directory that the test may spoil."""
    return Path(shutil.copytree(compressed, tmp_path / "small"))


def test_the_same_run_gives_the_same_bytes(
    finished: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """From the record alone, beside the model and the data; other versions are told where they change nothing."""
    edited(finished, versions={"torch": "1.0"})
    (finished / "model.safetensors").unlink()
    shutil.copy(calibration_text, tmp_path)
    done = run_process("reproduce", "small", "--quiet", cwd=tmp_path)
    assert done.status == 0, done
    assert done.stdout.splitlines() == [
        f"conditions  versions: torch (1.0 -> {torch.__version__})",
        "same bytes  6 files",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"small", tiny_model.name, calibration_text.name}


def test_what_differs_is_named(finished: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    weights = load_file(finished / "model.safetensors")
    changed = min(weights)
    weights[changed].view(-1)[0] += 0.5
    highest = float(weights[changed].abs().max())
    save_file(weights, finished / "model.safetensors", {"format": "pt"})
    edited(finished, data={"sha256": "ab" * 32}, plan={"format": "factored"}, machine={"threads": 99})
    where = ("--model", tiny_model, "--calibration", calibration_text)
    done = run_process("reproduce", finished, "--output", tmp_path / "new", *where)
    assert done.status == 3, done
    assert "same bytes" not in done.stdout
    for said in (
        f"conditions  data: SHA-256 {'ab' * 32} -> ",
        "conditions  machine: threads (99 -> 1)",
        "result      plan: format: factored -> pivoted",
        "result      file: model.safetensors is not what was written",
        "result      file: model.safetensors: SHA-256 ",
        f"result      tensor: {changed}: by up to 0.5, where the largest number is {highest:.3g}\n",
    ):
        assert said in done.stdout
    assert done.stdout.count("result      tensor: ") == 1
    assert "config.json" not in done.stdout
    assert (tmp_path / "new" / "lillama.json").is_file()


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"model": "elsewhere"}, (), "names the model 'elsewhere', which is not here; say where by --model"),
        ({"model_fingerprint": "ab" * 32}, (), "is not the one that"),
        ({"healing": [{}]}, (), "was trained by 'lillama finetune'"),
        ({"quantization": {"bits": 8}}, (), "was quantised after its compression"),
        ({"quantization": {"bits": 8, "target_size": 60}}, (), "README.md says by which commands both are made"),
        ({"data": {"sources": {"data": {"kind": "texts"}}}}, (), "objects of a Python program"),
        ({"recipe": {"tokns": 3}}, (), "unknown key 'tokns'; did you mean 'tokens'?"),
        ({"recipe": {"calibration": ["none.txt"]}}, (), "none.txt"),
        ({"architecture": "transfomer"}, (), "no architecture named 'transfomer'"),
        ({}, ("--overwrite",), "--overwrite does nothing without --output"),
        ({}, ("--output", "small"), "exists; pass --overwrite"),
    ],
)
def test_a_run_that_cannot_be_repeated(
    run_cli: Cli,
    finished: Path,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(calibration_text, tmp_path)
    edited(finished, **changes)
    before = tree(tmp_path)
    assert expected in run_cli("reproduce", "small", *options).error
    assert tree(tmp_path) == before


def test_what_is_no_record(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    assert "lillama.json' cannot be read" in run_cli("reproduce", tiny_model).error
    assert "lillama.json' cannot be read" in run_cli("reproduce", tmp_path / "nowhere").error


def test_python_reproduces_too(finished: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"model": tiny_model, "calibration": calibration_text, "quiet": True}
    found = lillama_core.reproduce(finished, **where)
    assert found.differences == []
    assert found.files >= 6
    edited(finished, plan={"format": "factored"})
    found = lillama_core.reproduce(finished, output=tmp_path / "new", **where)
    assert found.differences
    assert (tmp_path / "new" / "model.safetensors").is_file()
    with pytest.raises(lillama_core.UserError, match="overwrite=True does nothing without output="):
        lillama_core.reproduce(finished, overwrite=True, **where)
