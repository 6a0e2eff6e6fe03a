"""Who works on the cells of a suite: the same rows from this process, from Ray, and from cells that were run alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ended, command, environment, run_process

from lillama_benchmarks.cells import CellFailed, SuiteRunner, _command, cells_of
from lillama_benchmarks.engines.in_turns import InTurns
from lillama_benchmarks.engines.on_ray import OnRay, work
from lillama_benchmarks.methods import find_methods
from lillama_benchmarks.results import CELL_FILE, DENSE, FILE, Result, append, collect, read, write_alone
from lillama_benchmarks.suites import SuiteModel
from lillama_core.errors import UserError

ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def request_(_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A suite of two models; one of them says that it is a model, and has weights that are none."""
    broken = Path(shutil.copytree(_tiny_model, tmp_path_factory.mktemp("broken") / "broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    return ("benchmark", "--suite", "smoke", "--models", f"tiny-llama,{broken}", "--methods", "svd", "--output")


@pytest.fixture(scope="module")
def in_turns(request_: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the suite's results are without any engine's options."""
    out = tmp_path_factory.mktemp("in-turns") / "out"
    done = run_process(*request_, out, "--jobs", "1")
    assert (done.status, done.stderr) == (1, ""), done
    assert "2 of 4 cells succeeded" in done.stdout
    return out


def rows_of(folder: Path) -> dict[tuple[str, str, float], dict[str, Any]]:
    """The results without what is measured anew each time: seconds, memory, and speeds."""
    rows = {}
    for key, result in sorted(read(folder).items()):
        metrics = {
            m["name"]: m["value"] for m in result.metrics if not m["name"].startswith(("speed/", "footprint/peak"))
        }
        rows[key] = {**vars(result), "metrics": metrics, "seconds": None, "peak_memory_bytes": None}
    return rows


# Options


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "rya"], "no engine named 'rya' (there are: in-turns, ray); did you mean 'ray'?"),
        (["--retries", "0"], "--retries does nothing with the engine in-turns: it is for --engine ray"),
        (["--engine", "in-turns", "--ray-address", "a:1"], "--ray-address does nothing with the engine in-turns"),
        (["--engine", "ray", "--jobs", "2"], "--jobs does nothing with the engine ray: it is for --engine in-turns"),
        (["--jobs", "0"], "--jobs must be from 1 to 1,000, not 0"),
        (["--only", "tiny-llama/dense", "--engine", "ray"], "--engine does nothing with --only"),
        (["--list", "--device", "cpu"], "--device does nothing with --list"),
        (["--collect", "--resume"], "--resume does nothing with --collect"),
        (["--collect", "--list"], "--collect does nothing with --list"),
        (["--collect"], "holds no results to collect"),
        (["--only", "tiny-llama/dens"], "no cell named 'tiny-llama/dens'"),
        (["--models", "tiny-llama", "--only", "tiny-llama/fast-0.2"], "run that first, with --only"),
    ],
)
def test_bad_requests(arguments: list[str], complaint: str, run_cli: Callable[..., Ended], tmp_path: Path) -> None:
    assert complaint in run_cli("benchmark", "--suite", "smoke", *arguments, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cpus-per-cell", "0"], "--cpus-per-cell must be at least 1, not 0"),
        (["--gpus-per-cell", "1.5"], "a part of one GPU or a whole number of them, not 1.5"),
        (["--gpus-per-cell", "nan"], "a part of one GPU or a whole number of them, not nan"),
        (["--gpus-per-cell", "-1"], "a part of one GPU or a whole number of them, not -1"),
        (["--retries", "-1"], "--retries must be at least 0, not -1"),
        (["--device", "cuda"], "needs --gpus-per-cell"),
        (["--device", "cuda:1", "--gpus-per-cell", "1"], "is for Ray to choose"),
        (["--device", "cpu", "--gpus-per-cell", "1"], "asks for GPUs that --device cpu does not use"),
        (["--ray-address", "nowhere"], "takes HOST:PORT, such as 10.0.0.1:6379; not 'nowhere'"),
        (["--ray-address", "127.0.0.1:1"], "no Ray answers at --ray-address '127.0.0.1:1'"),
    ],
)
def test_bad_requests_of_ray(
    arguments: list[str], complaint: str, run_cli: Callable[..., Ended], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert complaint in run_cli("benchmark", "--suite", "smoke", "--engine", "ray", *arguments, "-o", out).error
    assert not out.exists()


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
    with pytest.raises(UserError, match=re.escape("pip install 'lillama[ray]'")):
        OnRay("smoke", tmp_path).check()


def test_ray_is_imported_only_when_it_is_chosen() -> None:
    code = "import sys, lillama_benchmarks.command, lillama_benchmarks.engines.on_ray; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# In turns


def test_in_turns_the_models_own_cells_follow_each_other(tmp_path: Path) -> None:
    """Models that cannot be made: what matters is the order, and that one's failure is its own."""

    def broken() -> Path:
        raise RuntimeError("no such wheel")

    cells = cells_of([SuiteModel("a", broken), SuiteModel("b", broken)], find_methods(("svd", "fast")), (0.1,))
    assert [c.name for c in cells] == [
        *("a/dense", "a/svd-0.1", "a/fast-0.1"),
        *("b/dense", "b/svd-0.1", "b/fast-0.1"),
    ]
    for jobs in (1, 2):
        kept: list[Result] = []
        InTurns(SuiteRunner(tmp_path), jobs).run(cells, kept.append)
        assert sorted(r.key for r in kept) == sorted(c.key for c in cells)
        for name in "ab":
            assert [r.key for r in kept if r.model == name] == [c.key for c in cells if c.model.name == name]
        assert {r.error for r in kept} == {"no such wheel"}


@pytest.mark.parametrize("how", ["by the signal", "with its last words"])
def test_a_command_that_was_interrupted_has_not_failed(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the suite itself has not heard of it yet."""
    script = tmp_path / "python"
    end = "kill -INT $$" if how == "by the signal" else "echo 'lillama: error: interrupted' >&2; exit 1"
    script.write_text(f"#!/bin/sh\n{end}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    # Where this process was told to ignore it, its children would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        _command(SuiteRunner(tmp_path), tmp_path / "log", "compress")
    script.write_text("#!/bin/sh\necho 'lillama: error: no memory' >&2; exit 1\n")
    with pytest.raises(CellFailed, match="compress: no memory"):
        _command(SuiteRunner(tmp_path), tmp_path / "log", "compress")


# Single cells


def test_results_of_single_cells_are_read_and_collected(tmp_path: Path) -> None:
    older = Result("m", "", "svd", 0.2, error="older")
    append(tmp_path, older)
    made = {name: Result("m", "", *key) for name, key in
            {"dense": (DENSE, 0.0), "fast-0.2": ("fast", 0.2), "svd-0.2": ("svd", 0.2)}.items()}  # fmt: skip
    for name, result in made.items():
        (tmp_path / "cells" / "m" / name).mkdir(parents=True)
        write_alone(tmp_path / "cells" / "m" / name, result)
    assert read(tmp_path) == {r.key: r for r in made.values()}
    collect(tmp_path, [made["dense"].key, made["svd-0.2"].key])
    assert not list(tmp_path.glob(f"cells/*/*/{CELL_FILE}"))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(r["method"], r["error"]) for r in lines] == [
        *(("svd", "older"), ("dense", None), ("svd", None), ("fast", None))
    ]
    assert read(tmp_path) == {r.key: r for r in made.values()}
    (tmp_path / "cells" / "m" / "dense" / CELL_FILE).write_text("half a l")
    with pytest.raises(UserError, match=r"dense.result\.json' is not a result of this suite"):
        read(tmp_path)


def test_single_cells_make_the_rows_of_a_run(
    request_: tuple[str, ...],
    in_turns: Path,
    run_cli: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an array of SLURM does it: a list, its cells one by one, and the pages."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    listed = run_cli(*request_, out, "--list", "--resume").stdout.split()
    assert listed == ["tiny-llama/dense", "tiny-llama/svd-0.2", "broken/dense", "broken/svd-0.2"]
    assert not out.exists()
    # One that succeeds and one that fails; each takes processes of its own.
    for cell in listed[::2]:
        assert run_cli(*request_, out, "--resume", "--only", cell).status == cell.startswith("broken")
    assert not (out / FILE).exists()
    assert run_cli(*request_, out, "--list", "--resume").stdout.split() == listed[1:]
    assert "is there already" in run_cli(*request_, out, "--resume", "--only", listed[0]).stdout
    done = run_cli(*request_, out, "--collect")
    assert done.status == 1, done
    assert (out / "results.html").is_file()
    found, expected = rows_of(out), rows_of(in_turns)
    assert len(found) == 2
    assert found == {key: expected[key] for key in found}


# Ray


@needs_ray
def test_an_interrupted_ray_leaves_nothing_and_goes_on_to_the_rows_of_a_run_in_turns(
    request_: tuple[str, ...], in_turns: Path, tmp_path: Path
) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    words = (*request_, out, "--engine", "ray", "--resume")
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment(TMPDIR=str(temporary)), start_new_session=True)  # fmt: skip
    log = out / "cells" / "tiny-llama" / "svd-0.2" / "compress.log"
    while not log.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said == "lillama: error: interrupted; what was finished is kept, --resume goes on from there\n"
    finished = read(out).keys()
    assert ("tiny-llama", DENSE, 0.0) in finished
    assert ("tiny-llama", "svd", 0.2) not in finished
    assert not list(log.parent.glob("model*"))
    assert [p.name for p in temporary.iterdir() if p.name.startswith("lillama-")] == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(out) not in running

    done = run_process(*words)
    assert (done.status, done.stderr) == (1, ""), done
    assert "2 of 4 cells succeeded" in done.stdout
    assert "model.safetensors" in (read(out)["broken", "svd", 0.2].error or "")
    assert (out / "cells" / "tiny-llama" / "svd-0.2" / "lillama.json").is_file()
    assert not list(out.glob("cells/*/*/model*"))
    assert (out / "results.html").is_file()
    assert rows_of(out) == rows_of(in_turns)


@pytest.mark.parametrize(
    ("asked", "refused"), [({"cpus": 9}, "9 CPUs and 0 GPUs"), ({"gpus": 1.0}, "1 CPUs and 1 GPUs")]
)
def test_more_than_a_node_has_is_refused(asked: dict[str, Any], refused: str, tmp_path: Path) -> None:
    """Of nodes as Ray lists them; the runs above ask a Ray that has room."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes)
    with pytest.raises(UserError) as caught:
        OnRay("smoke", tmp_path, **asked)._check_room(ray)
    said = f"no node of Ray has {refused} for a cell (there are: 8 CPUs, 0 GPUs; 0 CPUs, 0 GPUs); ask for less"
    assert str(caught.value) == said
    OnRay("smoke", tmp_path, cpus=8)._check_room(ray)


def test_what_a_worker_is_told_is_json_and_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))
    cell = cells_of([SuiteModel("gone", Path, directory=tmp_path / "gone")], find_methods(("svd",)), (0.1,))[1]
    order = OnRay("smoke", tmp_path / "out", cpus=3).order(cell)
    assert json.loads(json.dumps(order)) == order
    assert "secret" not in json.dumps(order)
    assert order["environment"]["LILLAMA_CACHE"] == str(tmp_path / "cache")
    assert (order["model"], order["method"], order["threads"], order["device"]) == (
        *(str(tmp_path / "gone"), "svd", 3, "cpu"),
    )
    with pytest.raises(UserError, match="no model named"):
        work(order)
