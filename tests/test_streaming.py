"""Blocks read from disk one at a time: the same numbers as with the whole model in memory, also after a stop."""

from __future__ import annotations

import json
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lillama_core import load_recipe
from lillama_core.errors import LillamaError, UserError
from lillama_core.models import shards
from lillama_core.output.record import RunRecord
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.stages.allocate import AllocateStage
from lillama_core.pipeline.stages.calibrate import CalibrateStage
from lillama_core.runtime.modules import exact
from lillama_core.runtime.states import StateStore
from lillama_registry import registry
from lillama_testing.tiny import QUICK as KIT_QUICK
from lillama_testing.tiny import TinyModel, make_tiny_model

QUICK = {"sensitivity_tokens": 128, "rescaling_tokens": 64, "reduction": 0.15}
TRAINED = {"recipe": "default", "steps": 3, "correction_tokens": 256}


def specimen(model_type: str, folder: Path) -> TinyModel:
    (architecture,) = registry().architectures_for(model_type)
    return make_tiny_model(architecture, model_type, folder)


def run(made: TinyModel, output: Path, stream: bool, resume: bool = False, **options: Any) -> RunRecord:
    recipe = load_recipe(options.pop("recipe", "fast")).with_options(
        {**KIT_QUICK, "steps": 0, "batch_size": 2, "calibration": made.calibration, **QUICK, **options}
    )
    return compress(Request(str(made.folder), output, recipe, stream=stream, resume=resume), "quiet")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", TRAINED),
        ("mixtral", {}),
        ("mamba", {}),
        ("whisper", {"stacks": ["encoder", "decoder"]}),
    ],
)
def test_streamed_and_resident_runs_give_the_same_tensors(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = specimen(model_type, tmp_path / "dense")
    resident, streamed = (run(made, tmp_path / str(stream), stream, **options) for stream in (False, True))
    assert streamed.plan == resident.plan
    assert streamed.fidelity == resident.fidelity
    expected, found = (load_file(tmp_path / str(stream) / "model.safetensors") for stream in (False, True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / str(stream) / "config.json").read_text()) for stream in (False, True)]
    assert configs[0] == configs[1]


class Stopper:
    """Counts the files that appear, and stops the run at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written, self.stop = 0, -1
        replace = pathlib.Path.replace

        def counting(path: Path, target: Path) -> Path:
            self.written += 1
            if self.written == self.stop:
                raise LillamaError("stopped on purpose")
            return replace(path, target)

        monkeypatch.setattr(pathlib.Path, "replace", counting)


def test_a_run_that_stops_at_any_file_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stopper = specimen("llama", tmp_path / "dense"), Stopper(monkeypatch)
    run(made, tmp_path / "whole", True, **TRAINED)
    whole, files = (tmp_path / "whole" / "model.safetensors").read_bytes(), stopper.written
    # Stopped again each time that it goes on: in the forward pass, the backward pass, the ranks, and the blocks.
    for part in (0.15, 0.4, 0.25, 0.1):
        stopper.written, stopper.stop = 0, max(1, round(part * files))
        with pytest.raises(LillamaError, match="stopped on purpose"):
            run(made, tmp_path / "stopped", True, resume=(tmp_path / "stopped.partial").exists(), **TRAINED)
    stopper.stop = -1
    assert run(made, tmp_path / "stopped", True, resume=True, **TRAINED).resumed
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == whole
    assert not (tmp_path / "stopped.partial").exists()


def test_what_stops_a_run_once_there_are_statistics_leaves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = specimen("llama", tmp_path / "dense")
    statistics = tmp_path / "small.partial" / "profile"
    opened, allocate = shards.safe_open, AllocateStage.run

    def failing(file: Path, **options: Any) -> Any:
        if any(statistics.glob("*.safetensors")):
            raise OSError(5, "Input/output error")
        return opened(file, **options)

    def refusing(*_: Any) -> None:
        raise UserError("refused on purpose")

    monkeypatch.setattr(shards, "safe_open", failing)
    # A disk that fails for a moment is no mistake of the request.
    with pytest.raises(LillamaError, match=r"cannot be read: .*Input/output error.* --resume") as met:
        run(made, tmp_path / "small", True)
    assert not isinstance(met.value, UserError)
    assert any(statistics.glob("*.safetensors"))
    monkeypatch.setattr(shards, "safe_open", opened)
    monkeypatch.setattr(AllocateStage, "run", refusing)
    with pytest.raises(UserError, match="refused on purpose"):
        run(made, tmp_path / "small", True, resume=True)
    monkeypatch.setattr(AllocateStage, "run", allocate)
    assert run(made, tmp_path / "small", True, resume=True).resumed
    monkeypatch.setattr(CalibrateStage, "run", lambda stage, context: [context.directory.open({}, False), refusing()])
    with pytest.raises(UserError, match="refused on purpose"):
        run(made, tmp_path / "other", True)
    assert not list(tmp_path.glob("*.partial"))


def test_weights_that_autocast_would_round_to_themselves_are_kept() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to(torch.bfloat16)
    block.register_buffer("index", torch.arange(3))
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = exact(nn.Sequential(*block), torch.device("cpu"))(x)
    kept = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to(torch.bfloat16)
    kept.load_state_dict({k: v.bfloat16() for k, v in block.state_dict().items() if k != "index"})
    kept = exact(kept, torch.device("cpu"), torch.bfloat16)
    half, full = torch.bfloat16, torch.float32
    assert [p.dtype for p in kept.parameters()] == [half, half, full, full, half, half]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_as_they_were_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    store, hidden = StateStore(tmp_path, dtype), torch.randn(2, 3, 4)
    store.write("a", 1, {4: hidden, 7: hidden + 1})
    assert store.has_all("a", 1, [7, 4])
    assert not store.has_all("a", 1, [4, 5])
    assert not store.has("a", 2)
    found = store.read("a", 1, [7, 4])
    assert len(found) == 2
    assert torch.equal(found[0], (hidden + 1).to(dtype).float())
    assert torch.equal(found[1], hidden.to(dtype).float())
    (tmp_path / "a-1.safetensors").write_bytes(b"nothing")
    with pytest.raises(LillamaError, match=r"a-1.safetensors' is damaged"):
        found[0]
