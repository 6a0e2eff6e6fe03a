"""``lillama verify``, and what loading refuses: a directory whose weights are not what was written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core.errors import LillamaError, UserError
from lillama_core.pipeline.verify import verify


@pytest.fixture
def sound(compressed: Path, tmp_path: Path) -> Path:
    """A compressed directory that the test may spoil."""
    return Path(shutil.copytree(compressed, tmp_path / "small"))


def forget_hashes(folder: Path) -> None:
    """Make the record one of an earlier version, which had none."""
    record = json.loads((folder / "lillama.json").read_text())
    del record["sha256"]
    (folder / "lillama.json").write_text(json.dumps(record))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    forget_hashes(folder)


def order_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith(".permutation"))


def test_a_sound_directory_is_told_to_be_one(sound: Path, run_cli: Callable[..., Any]) -> None:
    ended = run_cli("verify", sound)
    assert ended.status == 0, ended
    assert "weight files  1, 1 as recorded" in ended.stdout
    held = load_file(sound / "model.safetensors")
    # The head is tied to the embedding: one tensor on disk, two names in memory.
    assert verify(str(sound), quiet=True).tensors >= len(held)
    record = json.loads((sound / "lillama.json").read_text())
    assert record["sha256"] == {
        "model.safetensors": hashlib.sha256((sound / "model.safetensors").read_bytes()).hexdigest()
    }


def test_a_flipped_bit_is_found_by_its_hash(sound: Path, run_cli: Callable[..., Any]) -> None:
    path = sound / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    ended = run_cli("verify", sound)
    assert ended.status == 1
    assert "'model.safetensors' is not what was written" in ended.stderr


def test_numbers_that_are_none_are_found_without_hashes(sound: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = min(n for n, t in tensors.items() if t.is_floating_point() and ".layers.1." in n)
        tensors[name].view(-1)[0] = float("nan")

    edit_weights(sound, change)
    with pytest.raises(LillamaError, match=r"layers\.1\..* holds numbers that are infinite or none"):
        verify(str(sound), quiet=True)


@pytest.mark.parametrize("value", [0, -1, 1000])
def test_an_order_that_is_none_is_refused_here_and_by_from_pretrained(sound: Path, value: int) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        order = tensors[order_of(tensors)]
        # 0 is in it already: in the other half of the file it comes twice.
        order[order.argmax()] = value

    edit_weights(sound, change)
    with pytest.raises(LillamaError, match=r"permutation is no order of \d+ numbers"):
        verify(str(sound), quiet=True)
    with pytest.raises(LillamaError, match=r"permutation is no order of \d+ numbers"):
        AutoModelForCausalLM.from_pretrained(sound)


def test_an_edited_rank_is_refused(sound: Path) -> None:
    config = json.loads((sound / "config.json").read_text())
    entry = next(e for name, e in config["quantization_config"]["sites"].items() if "layers" in name and "rank" in e)
    entry["rank"] += 1
    (sound / "config.json").write_text(json.dumps(config))
    forget_hashes(sound)
    with pytest.raises(LillamaError, match=r"is \[\d+, \d+\] in model.safetensors where the model's config asks for"):
        verify(str(sound), quiet=True)


def test_a_weight_that_is_gone_or_too_many_is_named(sound: Path) -> None:
    kept = load_file(sound / "model.safetensors")
    gone = min(n for n in kept if "layers.0" in n and n.endswith("norm.weight"))
    edit_weights(sound, lambda tensors: tensors.pop(gone))
    with pytest.raises(LillamaError, match=rf"lacks 1 of its weights, such as {gone}"):
        verify(str(sound), quiet=True)
    save_file({**kept, "stranger": torch.zeros(2)}, sound / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LillamaError, match="has, and should not have, 1 of its weights, such as stranger"):
        verify(str(sound), quiet=True)


def test_a_weight_file_beside_those_of_the_record_is_named(sound: Path) -> None:
    save_file({"x": torch.zeros(1)}, sound / "extra.safetensors")
    with pytest.raises(LillamaError, match=r"'extra\.safetensors' is not in the record"):
        verify(str(sound), quiet=True)
    (sound / "extra.safetensors").unlink()
    (sound / "model.safetensors").unlink()
    with pytest.raises(LillamaError, match=r"has no \.safetensors weights"):
        verify(str(sound), quiet=True)


def test_what_was_never_compressed_is_the_users_mistake(
    tiny_model: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    ended = run_cli("verify", tiny_model)
    assert (ended.status, ended.stdout) == (2, "")
    assert "is not compressed by lillama" in ended.stderr
    assert run_cli("verify", tmp_path / "nothing").status == 2


def test_a_finetuned_directory_has_hashes_of_its_own(
    sound: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    trained = tmp_path / "trained"
    ended = run_cli(
        "finetune", sound, "--teacher", tiny_model, "--data", calibration_text, "-o", trained, "--self-share", "0",
        "--tokens", "512", "--sequence-length", "32",
    )  # fmt: skip
    assert ended.status == 0, ended
    assert verify(str(trained), quiet=True).hashed == 1


def test_models_in_few_bits_are_verified_too(sound: Path, tiny_model: Path, tmp_path: Path) -> None:
    for model, name in ((sound, "low-rank"), (tiny_model, "dense")):
        lillama_core.quantize(str(model), str(tmp_path / name), bits=8)
        assert verify(str(tmp_path / name), quiet=True).hashed == 1


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_scales_of_few_bits_are_finite(name: str, tiny_model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    lillama_core.quantize(str(tiny_model), str(small), bits=4)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][:2] = torch.tensor([float("inf")], dtype=torch.bfloat16).view(torch.uint8)

    edit_weights(small, change)
    with pytest.raises(LillamaError, match=rf"{name.removesuffix('.weight')} is held in few bits, by scales"):
        verify(str(small), quiet=True)


def test_a_record_that_is_broken_or_gone(sound: Path) -> None:
    (sound / "lillama.json").write_text('{"sha256": 3}')
    with pytest.raises(UserError, match="sha256 is no mapping of file to hash"):
        verify(str(sound), quiet=True)
    (sound / "lillama.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        verify(str(sound), quiet=True)
    (sound / "lillama.json").unlink()
    assert verify(str(sound), quiet=True).hashed == 0
