"""The conformance kit: every plugin there is passes it, and what is wrong with an architecture does not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, environment, run_process
from torch import nn

from lillama_core import Architecture, UserError
from lillama_core.architecture.targets.base import OnRows, TargetModule
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear
from lillama_core.pipeline.spec import prepare
from lillama_registry import registry
from lillama_testing import CHECKS, Case, CheckFailed, cases, check_architecture, make_tiny_model, run_check
from lillama_testing.checks import possible_reduction

STRANGER = """
import lillama_core


@lillama_core.hookimpl
def lillama_architectures():
    return [lillama_core.Architecture(name="olmo", model_types=("olmo2",), stacks={"decoder": "model.layers"})]
"""


def of_built_in() -> list[Case]:
    """Every check of every model type; whole runs for the first type of each architecture, they load a process each."""
    found = cases(a for a in registry().architectures if not a.fallback)
    return [c for c in found if c.check != "compression" or c.model_type == c.architecture.model_types[0]]


@pytest.mark.parametrize("check", of_built_in(), ids=str)
def test_plugins(check: Case) -> None:
    check()


def test_all_that_claims_a_model_type_is_checked() -> None:
    checked = {c.model_type for c in of_built_in()}
    assert checked >= {"llama", "mamba", "falcon_mamba"}
    assert checked == {t for a in registry().architectures if not a.fallback for t in a.model_types}


def install(folder: Path, name: str, source: str) -> None:
    """Put a distribution with one plugin into ``folder``, as an installer would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lillama]\n{name} = {name}\n")


def test_a_strangers_plugin(tmp_path: Path) -> None:
    install(tmp_path, "garden", STRANGER)
    done = run_process("plugin", "check", "garden", env=environment(PYTHONPATH=str(tmp_path)))
    assert done == Ended(
        0,
        "".join(f"ok      olmo2  {c}\n" for c in CHECKS) + f"{len(CHECKS)} of {len(CHECKS)} checks passed\n",
        "",
    )


def test_a_wrong_plugin_of_a_stranger(tmp_path: Path) -> None:
    install(tmp_path, "garden", STRANGER.replace("model.layers", "layers"))
    done = run_process("plugin", "check", "olmo", "--debug", env=environment(PYTHONPATH=str(tmp_path)))
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "FAILED  olmo2  maps: architecture 'olmo' expects the decoder blocks at 'layers'" in done.stdout
    assert done.stdout.endswith(f"0 of {len(CHECKS)} checks passed\n")


def test_unknown_names(run_cli: Callable[..., Ended], tmp_path: Path) -> None:
    assert "no plugin with architectures is named 'mambo'" in run_cli("plugin", "check", "mambo").error
    assert "did you mean 'mamba'?" in run_cli("plugin", "check", "mambo").error
    assert "no model at" in run_cli("plugin", "check", "mamba", "--model", tmp_path / "absent").error


def test_a_model_of_ones_own(run_cli: Callable[..., Ended], tiny_model: Path, calibration_text: Path) -> None:
    done = run_cli("plugin", "check", "transformer", "--model", tiny_model, "--calibration", calibration_text)
    assert (done.status, done.stdout.splitlines()[-1]) == (0, f"{len(CHECKS)} of {len(CHECKS)} checks passed")


# What is wrong is found


class Forgetful(Architecture):
    """Leaves a map alone without saying so."""

    maps = ("self_attn.*", "mlp.up_proj", "mlp.down_proj")


class Contradicting(Architecture):
    """Takes a map that it declares an exception."""

    exclude = ("mlp.up_proj",)

    def targets(self, block: nn.Module, choice: MapChoice) -> list[TargetModule]:
        return [*super().targets(block, choice), LinearTarget("mlp.up_proj", block.get_submodule("mlp.up_proj"))]


class Doubling(Architecture):
    """Lists a map twice."""

    def targets(self, block: nn.Module, choice: MapChoice) -> list[TargetModule]:
        found = super().targets(block, choice)
        return [*found, found[-1]]


class Halved(LinearTarget):
    """Shows half of the rows."""

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        def half(show: OnRows | None) -> OnRows | None:
            return None if show is None else lambda map_, rows: show(map_, rows[:, ::2])

        with super().observe(block, half(on_input), half(on_output)):
            yield


class Repeating(LinearTarget):
    """Shows the rows twice."""

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        with super().observe(block, on_input, on_output), super().observe(block, on_input):
            yield


class Misplacing(LinearTarget):
    """Forgets the bias when it puts a layer in place."""

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        return None


class WithSites(Architecture):
    """Llama-like models with another kind of site."""

    def __init__(self, kind: type[LinearTarget]) -> None:
        super().__init__(name=kind.__name__, model_types=("qwen2",), stacks={"decoder": "model.layers"})
        self.kind = kind

    def targets(self, block: nn.Module, choice: MapChoice) -> list[TargetModule]:
        return [self.kind(s.name, block.get_submodule(s.name)) for s in super().targets(block, choice)]


class Deaf(Architecture):
    """Runs a block without the arguments recorded for it that say what is padding."""

    def call_block(
        self, block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        return super().call_block(block, hidden, args, {k: v for k, v in kwargs.items() if k != "attention_mask"})


class Scaling(Architecture):
    """Does something between blocks that the model does not do."""

    def between_blocks(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 1.01


class Moody(Architecture):
    """Its models compute something else in training mode."""

    def adapt(self, model: nn.Module) -> None:
        def louder(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
            return 1.1 * output if module.training else output

        model.get_submodule("model.layers.0.mlp").register_forward_hook(louder)


class Detached(Architecture):
    """Its models cut the way of the gradient to the first block."""

    def adapt(self, model: nn.Module) -> None:
        model.get_submodule("model.layers.0").register_forward_hook(lambda _, __, output: output.detach())


LLAMA: dict[str, Any] = {"model_types": ("llama",), "stacks": {"decoder": "model.layers"}}


@pytest.mark.parametrize(
    ("architecture", "check", "complaint"),
    [
        (Forgetful(**LLAMA), "maps", "['mlp.gate_proj.weight'] of model.layers.0 are linear maps, neither found nor"),
        (Contradicting(**LLAMA), "maps", "['mlp.up_proj.weight'] of model.layers.0 are taken for linear maps"),
        (Doubling(**LLAMA), "maps", "cover model.layers.0.mlp.down_proj.weight in part, or some of it more than once"),
        (WithSites(Halved), "observing", "the gradient of model.layers.0.self_attn.q_proj and that of the rows shown"),
        (WithSites(Repeating), "observing", "model.layers.0.self_attn.q_proj is shown 64 rows and 32 outputs"),
        (WithSites(Misplacing), "observing", "outputs shown of model.layers.0.self_attn.q_proj and W x + b differ"),
        (WithSites(Misplacing), "full-rank", "outputs at full rank and dense differ by"),
        (Deaf(**LLAMA), "chain", "outputs of the chained decoder blocks and of the model, "),
        (Scaling(**LLAMA), "chain", "outputs of the chained decoder blocks and of the model, without padding, differ"),
        (Moody(**LLAMA), "training", "outputs in training mode and in eval mode differ by"),
        (Detached(**LLAMA), "training", "no gradient reaches a factor of model.layers.0.self_attn.q_proj"),
        (Architecture(name="x", model_types=("llama",), stacks={"decoder": "layers"}), "maps", "no such module"),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_what_is_wrong_is_found(architecture: Architecture, check: str, complaint: str, tmp_path: Path) -> None:
    outcome = run_check(check, make_tiny_model(architecture, architecture.model_types[0], tmp_path / "tiny"))
    assert not outcome.passed
    assert complaint in (outcome.error or "")


def test_a_type_that_no_tiny_model_can_be_made_of() -> None:
    architecture = Architecture(name="none", model_types=("no_such_type",), stacks={"a": "b"})
    complaint = "no_such_type, tiny model: no tiny 'no_such_type' can be made .* tiny_config of architecture 'none'"
    with pytest.raises(CheckFailed, match=complaint):
        check_architecture(architecture)


def test_tiny_models_of_nested_configs_are_tiny(tmp_path: Path) -> None:
    """Gemma3 with vision has its sizes in two configs of its own: it was made with thousands of millions of weights."""
    architecture = Architecture(
        name="vision", model_types=("gemma3",), stacks={"decoder": "model.language_model.layers"}
    )
    architecture.auto_class = "AutoModelForImageTextToText"
    tiny = make_tiny_model(architecture, "gemma3", tmp_path / "tiny")
    assert run_check("maps", tiny).passed
    model = tiny.load()
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model.config.vision_config.hidden_size == model.config.text_config.hidden_size == 32
    architecture.tiny_config = {"text_config": {"intermediate_size": 10**6}}
    complaint = (
        r"no tiny 'gemma3' can be made \(it would have 192,\d+,\d+ parameters\); say the sizes that it needs in tiny"
    )
    with pytest.raises(UserError, match=complaint):
        make_tiny_model(architecture, "gemma3", tmp_path / "large")


def test_a_dense_model_that_cannot_be_run_is_no_fault_of_the_architecture(tmp_path: Path) -> None:
    architecture = Architecture(**LLAMA)
    architecture.tiny_config = {"num_key_value_heads": 3}
    with pytest.raises(UserError, match=r"no tiny 'llama' can be made \(the dense 'llama' model cannot be run on"):
        make_tiny_model(architecture, "llama", tmp_path / "tiny")


def test_nothing_is_left_out_at_random(tmp_path: Path) -> None:
    """Neither layers nor parts of a spectrogram, which a model looks up in its config each time."""
    (whisper,) = registry().architectures_for("whisper")
    architecture = copy.copy(whisper)
    architecture.tiny_config = {
        **whisper.tiny_config, "encoder_layerdrop": 0.9, "apply_spec_augment": True, "mask_time_prob": 0.9,
        "mask_time_min_masks": 5,
    }  # fmt: skip
    assert run_check("training", make_tiny_model(architecture, "whisper", tmp_path / "tiny")).error is None


def test_what_the_maps_cannot_give_is_not_asked_for(tmp_path: Path) -> None:
    architecture = Architecture(**LLAMA)
    tiny = make_tiny_model(architecture, "llama", tmp_path / "tiny")
    assert possible_reduction(tiny, architecture) == 0.2
    architecture.maps = ("self_attn.o_proj",)
    asked = possible_reduction(tiny, architecture)
    assert 0.01 < asked < 0.1
    assert prepare(str(tiny.folder), tiny.recipe(reduction=asked), architecture).budget.maps_kept > 0


class Keeping(Architecture):
    """Its models keep what they gave last, with its graph."""

    def adapt(self, model: nn.Module) -> None:
        model.get_submodule("model.layers.0.mlp").register_forward_hook(
            lambda module, _, output: setattr(module, "kept", output)
        )


def test_blocks_that_keep_what_they_gave(tmp_path: Path) -> None:
    assert run_check("observing", make_tiny_model(Keeping(**LLAMA), "llama", tmp_path / "tiny")).error is None


def test_an_architecture_under_test_is_the_one_that_is_tried() -> None:
    """The built-in one claims the same model type and is right; nothing may be asked of it."""
    check_architecture(Architecture(**LLAMA))
    mistaken = Architecture(**{**LLAMA, "stacks": {"decoder": "model.no_such_list"}})
    with pytest.raises(CheckFailed, match=r"llama, maps: .*; llama, compression: "):
        check_architecture(mistaken)
    with pytest.raises(CheckFailed, match="claims no model type"):
        check_architecture(Architecture(name="none", stacks={"a": "b"}))


def test_tiny_models_are_the_same_each_time(tmp_path: Path) -> None:
    architecture = Architecture(**LLAMA)
    architecture.tiny_config = {"num_hidden_layers": 3}
    first, second = (make_tiny_model(architecture, "llama", tmp_path / name).load() for name in "ab")
    assert len(first.model.layers) == 3
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
