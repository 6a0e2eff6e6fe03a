"""Libraries that people put on top of a model, on a compressed one: PEFT, Trainer, compile, export, lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lillama_core
from lillama_core.evaluation.metrics import tasks
from lillama_core.formats.base import LowRankLinear

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, Any] = {
    "recipe": "fast", "tokens": 1024, "sequence_length": 32, "batch_size": 4, "sensitivity_tokens": 128,
    "self_share": 0.0, "quiet": True, "reduction": 0.3, "compress_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=["pivoted", "factored"])
def small(
    request: pytest.FixtureRequest,
    make_model: Callable[..., Path],
    calibration_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("stacking")
    dense = make_model(folder / "dense", hidden_size=64, intermediate_size=96)
    options = {**OPTIONS, "format": request.param, "allocation": "uniform"}
    lillama_core.compress(dense, folder / "small", calibration=calibration_text, **options)
    return folder / "small"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, steps: int = 8) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], None, "all-linear"], ids=str)
def test_lora_is_trained_saved_loaded_and_merged(names: list[str] | str | None, small: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(small)
    targets = names if names == "all-linear" else lillama_core.lora_targets(model, names)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    before, after = train(adapted)
    assert after < before
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=ids()).logits
        again = peft.PeftModel.from_pretrained(load(small), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids()).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        saved = load(tmp_path / "merged")
        assert any(isinstance(m, LowRankLinear) for m in saved.modules())
        assert torch.equal(saved(input_ids=ids()).logits, merged(input_ids=ids()).logits)


def test_names_of_targets_are_checked(small: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load(small)
    assert all(type(model.get_submodule(path)) is nn.Linear for path in lillama_core.lora_targets(model, "q_proj"))
    with pytest.raises(lillama_core.UserError, match="is called 'q_porj'; did you mean 'q_proj'"):
        lillama_core.lora_targets(model, ["q_porj"])
    lillama_core.quantize(small, tmp_path / "int8", quiet=True)
    with pytest.raises(lillama_core.UserError, match="adapt the model before it is quantised"):
        lillama_core.lora_targets(load(tmp_path / "int8"), "q_proj")
    # Of a dense model they are the maps themselves.
    dense = load(make_model(tmp_path / "dense"))
    assert lillama_core.lora_targets(dense, "v_proj") == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]


def test_the_trainer_trains_what_loads_again(small: Path, tmp_path: Path) -> None:
    model = load(small)
    rows = [{"input_ids": row, "labels": row} for row in ids().repeat(4, 1)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    saved = load(tmp_path / "trained")
    assert any(isinstance(m, LowRankLinear) for m in saved.modules())
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)


def test_compiled_and_exported_models_give_the_same(small: Path) -> None:
    model = load(small).eval()
    with torch.no_grad():
        expected = model(input_ids=ids(), use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids(), use_cache=False).logits, expected)
        exported = torch.export.export(model, (), {"input_ids": ids(), "use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(input_ids=ids(), use_cache=False).logits, expected)
        # What was traced has left nothing behind.
        torch.testing.assert_close(model(input_ids=ids(), use_cache=False).logits, expected)


@pytest.mark.parametrize("small", ["pivoted"], indirect=True)
def test_lm_eval_from_its_own_command_line(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    # What lillama.pth does where lillama is installed, and not merely lies in a clone.
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'registry')!r}); import lillama_startup\n"
    start += "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    asked = ["--model", "hf", "--model_args", f"pretrained={small}", "--tasks", "lillama_cloze", "--device", "cpu"]
    asked += ["--include_path", str(Path(tasks.__file__).parent), "--limit", "4", "--output_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "run", *asked], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["lillama_cloze"]["acc,none"]
    assert 0 <= accuracy <= 1
