"""``lillama plugin new``: it installs, is found, and passes its own tests; mistakes leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, environment, run_process


def test_a_new_plugin_installs_and_passes_its_own_tests(tmp_path: Path, run_cli: Callable[..., Ended]) -> None:
    folder, site = tmp_path / "made", tmp_path / "site"
    ended = run_cli("plugin", "new", "olmo-two", "--model-type", "olmo2", "-o", folder)
    assert ended.status == 0, ended
    assert "olmo2, decoder at model.layers" in ended.stdout
    install = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    subprocess.run([sys.executable, "-m", *install, str(site), str(folder)], check=True, timeout=120)
    env = environment(PYTHONPATH=str(site))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(tests, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    checked = run_process("plugins", env=env)
    assert "olmo-two  (lillama-olmo-two 0.1.0)" in checked.stdout
    # Under 30 lines, as the documentation promises.
    assert len((folder / "lillama_olmo_two.py").read_text().splitlines()) < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Olmo2",), "is no name for a plugin"),
        (("../olmo2",), "is no name for a plugin"),
        (("unheard",), "is not known to transformers"),
        (("mine", "--model-type", "lama"), "did you mean 'llama'?"),
        (("mine", "--model-type", "llama"), "is described already, by the architecture 'transformer'"),
        (("mine", "--model-type", "vit"), "is no causal language model of transformers"),
    ],
)
def test_what_cannot_be_described_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, run_cli: Callable[..., Ended]
) -> None:
    ended = run_cli("plugin", "new", *arguments, "-o", tmp_path / "made")
    assert (ended.status, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path, run_cli: Callable[..., Ended]) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    ended = run_cli("plugin", "new", "olmo2", "-o", tmp_path / "made")
    assert (ended.status, "exists already" in ended.stderr) == (2, True)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["mine.txt"]
