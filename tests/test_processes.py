"""Several processes of one job, started by torchrun: they come to what one process comes to, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import warm
from conftest import QUICK_ANYHOW, Ended, command, environment
from safetensors.torch import load_file
from torch.distributed import TCPStore

from lillama_core.cli.main import main
from lillama_core.data.modality import Samples
from lillama_core.data.split import CalibrationSplit
from lillama_core.errors import UserError
from lillama_core.system.processes import ALONE, World, world_of_environment
from lillama_registry import registry
from lillama_testing import make_tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun and signals as Linux has them")

OPTIONS = (*QUICK_ANYHOW, "--correction-tokens", "512", "--sensitivity-tokens", "512", "-q")
MEASURED = ("--rescaling-tokens", "512")


def torchrun(processes: int, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        + [str(a) for a in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONWARNINGS="ignore"),
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    stdout, stderr = process.communicate(timeout=120)
    return Ended(process.returncode, stdout, stderr)


def lines(found: Ended) -> list[str]:
    """What lillama says of a failure, without what torchrun adds."""
    return [line for line in found.stderr.splitlines() if line.startswith("lillama: error: ")]


def job(arguments: Sequence[list[str]]) -> Ended:
    """A process for each of ``arguments``, told what torchrun tells its own, but forked: they load nothing."""
    # As torchrun's own it outlives the processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size = str(len(arguments))
    told = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
        **{"TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    processes = [
        warm.start(
            command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(PYTHONWARNINGS="ignore", RANK=str(rank), LOCAL_RANK=str(rank), **told),
        )
        for rank, words in enumerate(arguments)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    stdout, stderr = ("".join(texts) for texts in zip(*said, strict=True))
    return Ended(max(abs(process.wait()) for process in processes), stdout, stderr)


def arguments_of(model: Path, output: Path, *more: str | Path) -> list[str]:
    # In bfloat16 the same sums in another order differ by more than what is allowed here.
    return ["compress", str(model), "-o", str(output), "--compute", "float32", *OPTIONS, *map(str, more)]


def record_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "lillama.json").read_text())
    return found


def assert_close(several: Path, one: Path, processes: int, weights_too: bool = True) -> None:
    """The ranks of one process but for ties, and predictions and weights but for rounding."""
    found, expected = record_of(several), record_of(one)
    assert (found["processes"], expected["processes"]) == (processes, 1)
    assert found["data"] == expected["data"]
    ranks = found["plan"]["ranks"]
    other = [name for name in expected["shapes"] if ranks.get(name) != expected["plan"]["ranks"].get(name)]
    assert len(other) <= 0.02 * len(expected["shapes"]), other
    assert found["fidelity"]["tokens"] == expected["fidelity"]["tokens"]
    for name in ("perplexity_after", "divergence", "relative_error"):
        assert found["fidelity"][name] == pytest.approx(expected["fidelity"][name], rel=5e-3), name
    if weights_too and not other:
        weights, as_one = (load_file(folder / "model.safetensors") for folder in (several, one))
        for name, tensor in as_one.items():
            assert (weights[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


def grow(model: Any) -> None:
    """Let the blocks matter as much as the embedding."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name and "head" not in name:
            parameter.mul_(8)


@pytest.fixture(scope="module")
def llama(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str | Path]]:
    """A model of three blocks, and options: a share of text of its own, which the main process samples."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    options = ["--calibration", calibration_text, "--self-share", "0.25", "--steps", "25", *MEASURED]
    return make_model(folder, num_hidden_layers=3, change=grow), options


@pytest.fixture(scope="module")
def two(llama: tuple[Path, list[str | Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of it."""
    model, options = llama
    output = tmp_path_factory.mktemp("two") / "small"
    done = ended(torchrun(2, "-m", "lillama_core", *arguments_of(model, output, *options)))
    assert done.status == 0, lines(done) or done
    assert done.stdout.count("perplexity") == 1, done
    return output


def test_two_processes_come_to_what_one_comes_to(
    llama: tuple[Path, list[str | Path]], two: Path, tmp_path: Path
) -> None:
    model, options = llama
    assert main(arguments_of(model, tmp_path / "one", *options)) == 0
    assert_close(two, tmp_path / "one", 2)


def test_three_processes_share_experts_speech_and_batches_of_two(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """Of a batch of two rows one of three processes has none, and some experts see rows in some of them only."""
    mixtral = make_model(tmp_path / "mixtral", "mixtral", change=grow, intermediate_size=48, num_local_experts=4)
    (architecture,) = registry().architectures_for("whisper")
    whisper = make_tiny_model(architecture, "whisper", tmp_path / "whisper")
    stacks = [f"--stacks={stack}" for stack in architecture.stacks]

    def runs(folder: Path) -> list[list[str]]:
        text = ("--calibration", calibration_text, "--batch-size", "2", "--compress-embeddings", *MEASURED)
        # What this random model predicts hardly depends on its maps: measured losses would be those of rounding.
        sound = ("--calibration", whisper.calibration[0], "--samples", "20", "--allocation", "uniform", *stacks)
        return [
            arguments_of(mixtral, folder / "mixtral", *text),
            arguments_of(whisper.folder, folder / "whisper", *sound),
        ]

    one, three = tmp_path / "one", tmp_path / "three"
    for alone, shared in zip(runs(one), runs(three), strict=True):
        assert main(alone) == 0
        done = job([shared] * 3)
        assert done.status == 0, lines(done) or done
    assert_close(three / "mixtral", one / "mixtral", 3)
    # In a map of which half the energies are those of rounding, any row may become the pivot.
    assert_close(three / "whisper", one / "whisper", 3, weights_too=False)


@pytest.mark.parametrize(
    "strategies",
    [
        ("--init", "nystrom", "--allocation", "block-influence", "--format", "factored"),
        ("--init", "output-pca", "--allocation", "bayesian-search", "--allocation.trials", "3", "--format", "factored"),
    ],
    ids=["influences", "divergences"],
)
def test_an_allocator_that_runs_the_model_sees_the_rows_of_all_processes(
    strategies: tuple[str, ...], make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """Three processes share five rows that are measured on: of the last batch of two one of them has none."""
    model = make_model(tmp_path / "model", num_hidden_layers=3, change=grow)

    def arguments(output: Path) -> list[str]:
        words = (
            *(
                "compress",
                model,
                "-o",
                output,
                "--recipe",
                "fast",
                "--compute",
                "float32",
                "--quiet",
                "--self-share",
                "0",
            ),
            *("--calibration", calibration_text, "--tokens", "1024", "--sequence-length", "32"),
            *("--rescaling-tokens", "160", "--reduction", "0.3", *strategies),
        )
        return [str(word) for word in words]

    one, three = tmp_path / "one", tmp_path / "three"
    assert main(arguments(one)) == 0
    done = job([arguments(three)] * 3)
    assert done.status == 0, lines(done) or done
    found, expected = record_of(three)["plan"], record_of(one)["plan"]
    assert found["channels"].keys() == expected["channels"].keys()
    # A last bit may decide a tie.
    for kind in ("channels", "ranks"):
        assert all(abs(found[kind].get(name, 0) - number) <= 1 for name, number in expected[kind].items()), kind


def process_of(torchrun_: subprocess.Popen[str], rank: int) -> psutil.Process:
    found = psutil.Process(torchrun_.pid).children()
    return next(p for p in found if p.environ().get("RANK") == str(rank))


def test_a_process_that_dies_ends_the_job_and_it_resumes_to_the_same_bytes(
    llama: tuple[Path, list[str | Path]], two: Path, tmp_path: Path
) -> None:
    model, options = llama
    arguments = arguments_of(model, tmp_path / "small", *options)
    partial = tmp_path / "small.partial"
    process = torchrun(2, "-m", "lillama_core", *arguments)
    deadline = time.monotonic() + 60
    # While gradients go down.
    while not (partial / "gradients" / "process-1" / "decoder-2.safetensors").exists():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process_of(process, 1).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    found = ended(process)
    assert time.monotonic() - killed < 20
    assert found.status == 1
    (line,) = lines(found)
    assert "another process of this job has ended" in line
    assert "--resume goes on from there" in line
    assert not (tmp_path / "small").exists()
    # Another number of processes does not go on with it.
    found = main_in(arguments, "--resume")
    assert found.status == 2
    assert "it differs in processes (2 -> 1)" in found.stderr
    done = job([[*arguments, "--resume"]] * 2)
    assert done.status == 0, lines(done) or done
    assert record_of(tmp_path / "small")["plan"] == record_of(two)["plan"]
    names = [p.name for p in two.glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "small" / name).read_bytes() == (two / name).read_bytes(), name


def main_in(arguments: list[str], *more: str) -> Ended:
    """The command line within this process."""
    import io

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([*arguments, *more])
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def test_processes_that_see_different_models_are_refused(
    llama: tuple[Path, list[str | Path]], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, options = llama
    shutil.copytree(model, tmp_path / "model-0")
    make_model(tmp_path / "model-1", num_hidden_layers=3)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = job([arguments_of(tmp_path / f"model-{rank}", tmp_path / "small", *options) for rank in range(2)])
    assert done.status != 0
    assert lines(done) == ["lillama: error: process 1 differs from process 0 in the model; start all of them alike"]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_row_belongs_to_one_process(size: int) -> None:
    rows = torch.arange(22)[:, None]
    split = CalibrationSplit.of(Samples({"input_ids": rows}), 4, 0.2, chooses=True)
    own = [split.share(World(rank, size)) for rank in range(size)]
    for number, batch in enumerate(split.batches):
        found = torch.cat([of.batches[number].inputs["input_ids"] for of in own]).flatten()
        assert sorted(found.tolist()) == batch.inputs["input_ids"].flatten().tolist()
    for rank, of in enumerate(own):
        assert of.here(of.fit)
        assert of.fitted_rows == split.fitted_rows
        # The first rows of all processes are the first rows.
        first = torch.cat([of.batches[i].inputs["input_ids"] for i in of.here(of.fit)]).flatten()
        assert first[: len(World(rank, size).numbers(7))].tolist() == list(World(rank, size).numbers(7))
    with pytest.raises(UserError, match="too few for 40 processes"):
        split.share(World(0, 40))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers set such variables for jobs of their own."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert world_of_environment() == ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert world_of_environment() == World(1, 2, 1)
    with pytest.raises(UserError, match="cannot share device 'cuda:0'"):
        World(1, 2, 1).device(torch.device("cuda", 0))


def test_nothing_of_torch_distributed_is_loaded_by_one_process() -> None:
    code = (
        "import sys, lillama_core.system.processes as p\n"
        "with p.joined() as w: w.barrier()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "WORLD_SIZE": "2"})
