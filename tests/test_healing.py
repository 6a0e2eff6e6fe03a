"""Training a compressed model as a whole: gradients, what is kept, resuming, and the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICK, Ended
from torch import nn
from transformers import AutoModelForCausalLM

from lillama_core import load_recipe
from lillama_core.data.modality import IGNORE_INDEX, Samples
from lillama_core.data.text.modality import next_tokens
from lillama_core.errors import UserError
from lillama_core.formats import Factored
from lillama_core.healing.objective import PARTS, Objective
from lillama_core.healing.options import HealingOptions
from lillama_core.healing.training import Healing, trained_parameters
from lillama_core.pipeline import Request, compress
from lillama_core.system.progress import Progress
from lillama_registry import registry
from lillama_testing.tiny import QUICK as KIT_QUICK
from lillama_testing.tiny import make_tiny_model

Cli = Callable[..., Ended]
TRAINING = ("--tokens", "1024", "--sequence-length", "32", "--batch-size", "4", "--self-share", "0")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_autograd(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lillama_core.healing.objective.TOKENS_AT_ONCE", 4)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    targets = torch.randint(0, 7, (2, 5))
    targets[0, 1] = IGNORE_INDEX
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    samples = Samples({"input_ids": torch.zeros(2, 5)}, targets=targets, output_mask=mask)
    objective = Objective.named(name)
    gradient = torch.empty_like(student)
    loss = objective.of_predictions(student, teacher if objective.kd else None, samples, gradient)

    counts = torch.ones(2, 5) if mask is None else mask.float()
    if objective.lm:
        counts = counts * (targets != IGNORE_INDEX)
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    divergence = nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    surprise = nn.functional.cross_entropy(student.mT, targets, reduction="none", ignore_index=IGNORE_INDEX)
    expected = ((objective.kd * divergence + objective.lm * surprise) * counts).sum()
    expected.backward()
    torch.testing.assert_close(loss.float(), expected.detach())
    torch.testing.assert_close(gradient, student.grad)
    assert objective.count(samples) == counts.sum()


def test_outputs_that_are_no_predictions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    gradient = torch.empty_like(student)
    loss = Objective.of_numbers(student, teacher, gradient)
    expected = 2 * (student - teacher).square().sum() / teacher.square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, student.grad)


class Interrupted(Progress):
    """Ends the training at a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        super().__init__("quiet")
        self._left = at

    def step(self, note: str = "", advance: int = 1) -> None:
        self._left -= advance
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """A tiny dense model, and the same with a map of rank 4 in each block."""
    folder = make_model(tmp_path_factory.mktemp("healing") / "dense", initializer_range=0.3)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    student = copy.deepcopy(dense)
    for block in student.model.layers:
        U, S, V = torch.linalg.svd(block.mlp.up_proj.weight.detach(), full_matrices=False)
        block.mlp.up_proj = Factored().from_factors(U[:, :4] * S[:4], V[:4], None)
    return dense, student


def healing(models: tuple[nn.Module, nn.Module], progress: Progress, folder: Path | None, **options: Any) -> Healing:
    dense, student = models
    rows = torch.randint(2, 300, (24, 16), generator=torch.Generator().manual_seed(1))
    batches = [Samples({"input_ids": r}, targets=next_tokens(r)) for r in rows.split(4)]
    settings = {"learning_rate": 1e-2, "evaluations": 4, **options}
    return Healing(
        copy.deepcopy(student), dense, batches[:5], batches[5:], HealingOptions(**settings), 4.0, 0, 320, None,
        progress, folder,
    )  # fmt: skip


def test_an_interrupted_training_ends_as_one_that_was_not(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    whole = healing(models, Progress("quiet"), None)
    expected = whole.run()
    assert expected.loss_after < 0.95 * expected.loss_before
    assert [point.step for point in expected.curve] == [0, 5, 10, 15, 20]
    assert [point.tokens for point in expected.curve] == [0, 320, 640, 960, 1280]
    first = healing(models, Interrupted(13), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = healing(models, Progress("quiet"), tmp_path)
    assert again.run() == expected
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], tensor), name


@pytest.mark.parametrize("train", ["factors", "norms", "all"])
def test_only_what_is_named_is_trained(models: tuple[nn.Module, nn.Module], train: str) -> None:
    training = healing(models, Progress("quiet"), None, train=train)
    training.run()
    before = models[1].state_dict()
    changed = {name for name, value in training.student.state_dict().items() if not torch.equal(value, before[name])}
    factors = {name for name in before if ".up_proj." in name}
    norms = {name for name in before if "norm" in name}
    everything = set(before)
    assert changed == {"factors": factors, "norms": norms, "all": everything}[train]
    assert set(trained_parameters(models[1], train)) == changed - {"lm_head.weight"}


def test_a_training_that_diverges_keeps_the_best_and_says_so(models: tuple[nn.Module, nn.Module]) -> None:
    training = healing(models, Progress("quiet"), None, learning_rate=1.0, warmup=0.0, evaluations=20)
    found = training.run()
    assert found.ended.endswith("lower the learning rate")
    assert found.kept_step < found.curve[-1].step
    loss = training._loss(training.choose)
    assert loss == pytest.approx(found.loss_after)


def test_a_training_that_finds_nothing_better_stops(models: tuple[nn.Module, nn.Module]) -> None:
    # Too fast to find anything, and not so fast that it counts as diverged.
    training = healing(
        models,
        Progress("quiet"),
        None,
        train="factors",
        learning_rate=1.0,
        gradient_clip=0.0,
        evaluations=20,
        patience=2,
    )
    found = training.run()
    assert found.ended == "nothing better was found 2 times in a row"
    assert (found.kept_step, found.curve[-1].step) == (0, 2)


@pytest.fixture(scope="module")
def compressed(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A tiny dense model and what was made of it."""
    from lillama_core.cli.main import main

    folder = tmp_path_factory.mktemp("compressed")
    dense = make_model(folder / "dense", initializer_range=0.3)
    arguments = ["compress", str(dense), "-o", str(folder / "out"), "--calibration", str(calibration_text), "-q"]
    assert main([*arguments, *QUICK, "--reduction", "0.4", "--steps", "0"]) == 0
    return dense, folder / "out"


def test_the_command_makes_a_better_model(
    compressed: tuple[Path, Path], calibration_text: Path, tmp_path: Path, run_cli: Cli
) -> None:
    dense, model = compressed
    out = tmp_path / "healed"
    ended = run_cli(
        "finetune", str(model), "--teacher", str(dense), "--data", str(calibration_text), "-o", str(out), *TRAINING,
        "--learning-rate", "3e-3", "--epochs", "3", "--train", "all",
    )  # fmt: skip
    assert ended.status == 0, ended
    assert "loss " in ended.stdout
    record, before = (json.loads((folder / "lillama.json").read_text()) for folder in (out, model))
    (told,) = record["healing"]
    assert told["curve"][-1]["loss"] < told["curve"][0]["loss"]
    assert record["fidelity"]["divergence"] < told["fidelity_before"]["divergence"]
    assert told["teacher"] == dense.name
    assert record["plan"] == before["plan"]
    assert record["seconds"]["total"] > before["seconds"]["total"]
    assert "Healing" in (out / "README.md").read_text()
    (line,) = [line for line in (out / "README.md").read_text().split("\n") if line.startswith("lillama finetune")]
    assert line == (
        "lillama finetune OUTPUT --output OUTPUT2 --teacher dense --data calibration.txt --self-share 0.0 --tokens 1024"
        " --sequence-length 32 --learning-rate 0.003 --epochs 3.0"
    )
    assert str(tmp_path) not in (out / "lillama.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    other = AutoModelForCausalLM.from_pretrained(model)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    # What was healed can be healed again.
    again = run_cli(
        "finetune", str(out), "--objective", "lm", "--data", str(calibration_text), "-o", str(tmp_path / "again"),
        *TRAINING[:-2], "--epochs", "0.2", "-q",
    )  # fmt: skip
    assert again.status == 0, again
    assert len(json.loads((tmp_path / "again" / "lillama.json").read_text())["healing"]) == 2


def test_what_cannot_be_healed(
    compressed: tuple[Path, Path], make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path, run_cli: Cli
) -> None:
    dense, model = compressed
    data = ("--data", str(calibration_text), "-o", str(tmp_path / "out"), *TRAINING)
    teacher = ("--teacher", str(dense))

    def error(*arguments: str) -> str:
        return run_cli("finetune", *arguments).error

    assert error(str(dense), *teacher, *data) == f"{str(dense)!r} is not a directory that 'lillama compress' has made"
    assert error(str(model), *data).endswith("pass --teacher MODEL")
    assert error(str(model), *teacher, *data[:-2], "--objective", "lm").startswith("--teacher does nothing")
    assert error(str(model), "--objective", "lm", *data[:-2], "--self-share", "0.5").startswith("--self-share")
    for own in ((), ("--data", "self")):
        alone = error(str(model), "--objective", "lm", *own, *data[2:-2])
        assert alone == "--objective lm needs text that the model did not write: name it by --data, and not 'self'"
    other = make_model(tmp_path / "other", vocab_size=500)
    assert "has a vocabulary of 500" in error(str(model), "--teacher", str(other), *data)
    assert "at least two batches" in error(str(model), *teacher, *data, "--tokens", "64")
    assert error(str(model), *teacher, *data, "--learning-rate", "nan").startswith("--learning-rate")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_model_without_low_rank_maps(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(UserError, match="--train factors"):
        healing((models[0], models[0]), Progress("quiet"), None, train="factors").run()


def test_a_recipe_heals_at_the_end(
    compressed: tuple[Path, Path], calibration_text: Path, tmp_path: Path, run_cli: Cli
) -> None:
    dense, _ = compressed
    arguments = (
        "compress", str(dense), "--calibration", str(calibration_text), *QUICK, "--reduction", "0.4", "--steps", "0",
    )  # fmt: skip
    settings = tmp_path / "heal.yaml"
    settings.write_text("healing_epochs: 4\nstages: {heal: {learning_rate: 3e-3, train: all}}\n")
    ended = run_cli(*arguments, "-o", str(tmp_path / "out"), "--recipe", str(settings))
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "out" / "lillama.json").read_text())
    (told,) = record["healing"]
    assert told["teacher"] == dense.name
    assert record["fidelity"]["divergence"] < 0.9 * told["fidelity_before"]["divergence"]
    assert record["seconds"]["healing"] > 0
    assert record["estimate"]["seconds"] is not None
    # What is healed is what is written: the file, evaluated from outside, predicts as the record says.
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "out", dense))
    assert not torch.equal(model.model.norm.weight, teacher.model.norm.weight)
    refused = run_cli(*arguments, "--healing-epochs", "1", "--stream", "-o", str(tmp_path / "streamed"))
    assert "pass --no-stream" in refused.error
    unread = run_cli(*arguments, "-o", str(tmp_path / "unread"), "--stages.heal.train", "all")
    assert "--stages.heal.train does nothing" in unread.error


def test_the_python_interface(compressed: tuple[Path, Path], calibration_text: Path, tmp_path: Path) -> None:
    from lillama_core import finetune

    dense, model = compressed
    texts = calibration_text.read_text(encoding="utf-8").split("\n")
    options: dict[str, Any] = {"tokens": 512, "sequence_length": 32, "batch_size": 2, "self_share": 0.0}
    result = finetune(model, tmp_path / "out", teacher=dense, data=texts, epochs=0.1, quiet=True, **options)
    assert result.record.healing[0]["data"]["rows"] == 16
    assert next(result.model.parameters()).dtype == torch.float32
    with pytest.raises(UserError, match=r"no option 'leaning_rate'; did you mean 'learning_rate'\?"):
        finetune(model, tmp_path / "other", teacher=dense, data=texts, leaning_rate=1e-3)
    with pytest.raises(UserError, match="epochs must be a number above 0"):
        finetune(model, tmp_path / "other", teacher=dense, data=texts, epochs=0)


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "whisper"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    (architecture,) = registry().architectures_for(model_type)
    made = make_tiny_model(architecture, model_type, tmp_path / "dense")
    recipe = load_recipe("fast").with_options(
        {
            **KIT_QUICK, "calibration": made.calibration, "steps": 0, "batch_size": 2, "sensitivity_tokens": 128,
            "rescaling_tokens": 0, "reduction": 0.3, "healing_epochs": 2, "compute": "float32",
            "stages": {"heal": {"learning_rate": 1e-4, "evaluations": 2}},
        }
    )  # fmt: skip
    record = compress(Request(str(made.folder), tmp_path / "out", recipe, stream=False), "quiet")
    (told,) = record.healing
    # The weights that did best on the rows that choose are kept, those before the training among them.
    losses = {point["step"]: point["loss"] for point in told["curve"]}
    assert losses[told["kept_step"]] == min(losses.values()) < losses[0]
    assert record.fidelity is not None
    assert record.fidelity["divergence"] < 1.1 * told["fidelity_before"]["divergence"]


class Sparse(nn.Module):
    """Predicts 11 classes at each position; one layer is reached by rows that begin with 0, one by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(problem_type=None)
        self.enter, self.leave = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.seldom, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.enter(input_ids)
        if input_ids[0, 0] == 0:
            x = x + self.seldom(x)
        return SimpleNamespace(logits=self.leave(x))


def sparse_healing(progress: Progress, folder: Path | None, length: int = 6, **options: Any) -> Healing:
    rows = torch.randint(1, 11, (12, length), generator=torch.Generator().manual_seed(1))
    rows[4, 0] = 0
    batches = [Samples({"input_ids": r}) for r in rows.split(2)]
    settings = HealingOptions(learning_rate=1e-2, evaluations=4, **options)
    return Healing(
        Sparse(), Sparse().apply(_shift), batches[:4], batches[4:], settings, 4.0, 0, 96, None, progress, folder
    )


def _shift(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.mul_(2)


def test_what_few_rows_reach_is_trained_and_resumed_as_often_as_it_is_reached(tmp_path: Path) -> None:
    whole = sparse_healing(Progress("quiet"), tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        sparse_healing(Interrupted(10), tmp_path / "parts").run()
    again = sparse_healing(Progress("quiet"), tmp_path / "parts")
    assert again.run() == expected
    before = Sparse().state_dict()
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], tensor), name
        assert torch.equal(before[name], tensor) == name.startswith("never."), name


@pytest.mark.parametrize("length", [6, 300])
def test_each_position_counts_where_the_data_names_none(length: int) -> None:
    training = sparse_healing(Progress("quiet"), None, length)
    training._positions = training._predictions_of_a_row()
    rows = torch.cat([samples.inputs["input_ids"] for samples in training.choose])
    assert training.teacher is not None
    with torch.no_grad():
        log_q, p = training.student(rows).logits.log_softmax(-1), training.teacher(rows).logits.softmax(-1)
    divergence = nn.functional.kl_div(log_q, p, reduction="none").sum(-1).mean()
    assert training._loss(training.choose) == pytest.approx(divergence.item(), rel=1e-5)
