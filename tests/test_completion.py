"""What a shell completes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, environment

Cli = Callable[..., Ended]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lillama com", ["plain,compress", "plain,completion"]),
        ("lillama compress m --resu", ["plain,--resume"]),
        ("lillama compress m --recipe f", ["plain,fast"]),
        ("lillama compress m --init w", ["plain,whitened", "plain,whitened-update"]),
        ("lillama compress m --schedule ", ["plain,cosine", "plain,constant"]),
        # An option whose value is not typed yet is no mistake.
        ("lillama compress m -o --overwrite --schedule co", ["plain,cosine", "plain,constant"]),
        ("lillama compress m -o ", ["dir,"]),
        ("lillama compress ./mod", ["file,./mod"]),
        ("lillama export m --to on", ["plain,onnx"]),
        ("lillama completion ", ["plain,bash", "plain,zsh", "plain,fish"]),
        ("lillama nothing plug", ["plain,plugins", "plain,plugin"]),
    ],
)
def test_words_are_completed(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, expected: list[str]) -> None:
    monkeypatch.setenv("_LILLAMA_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    done = run_cli()
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.split() == expected


def test_a_shell_is_told_what_commands_do(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LILLAMA_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "lillama verif")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run_cli().stdout.splitlines() == ["plain", "verify", "check a compressed directory without running it"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(run_cli: Cli, shell: str) -> None:
    done = run_cli("completion", shell)
    assert (done.status, done.stderr) == (0, "")
    assert f"_LILLAMA_COMPLETE={shell}_complete" in done.stdout


def test_another_shell(run_cli: Cli) -> None:
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in run_cli("completion", "tcsh").error


def test_bash_completes_without_torch(tmp_path: Path) -> None:
    """The script as bash runs it, with a lillama that says what it has loaded."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    program = tmp_path / "lillama"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nfrom lillama_core.cli.main import main\nstatus = main()\n"
        "loaded = sorted({'torch', 'transformers'} & set(sys.modules))\n"
        "pathlib.Path(__file__ + '.loaded').write_text(str(loaded))\n"
        "sys.exit(status)\n"
    )
    program.chmod(0o755)
    script = (
        f'eval "$({program} completion bash)"; COMP_WORDS=({program} compress m --recipe l); COMP_CWORD=4;'
        f" _lillama_completion {program}; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert (done.stdout.split(), done.stderr) == (["lillama", "lillama-repaired"], "")
    assert Path(f"{program}.loaded").read_text() == "[]"
