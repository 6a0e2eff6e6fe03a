"""Models read one block at a time are those that from_pretrained loads, and results written by parts those it saves."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bad_input import write_gguf
from torch import nn
from transformers import CONFIG_MAPPING

from lillama_benchmarks.coverage import settings_of
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import find_blocks
from lillama_core.data.modality import modality_of
from lillama_core.errors import LillamaError, UserError
from lillama_core.models.gguf import shards_of_gguf
from lillama_core.models.integrity import check_safetensors
from lillama_core.models.loading import load_config, load_model
from lillama_core.models.outputs import main_output
from lillama_core.models.shards import BlockReader
from lillama_core.models.source import INDEX, WEIGHTS, ModelSource, locate
from lillama_core.output.quantizer import LillamaConfig, attach
from lillama_core.output.shards import assemble, compressed_meta_model, names_on_disk
from lillama_core.strategies import make
from lillama_core.system.files import write_tensors
from lillama_core.system.memory import release_memory
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

FAMILIES = ("llama", "mixtral", "mamba", "falcon_mamba", "whisper", "gpt2", "gemma2", "qwen2_moe")


def architecture_of(model_type: str) -> Architecture:
    return next(iter(registry().architectures_for(model_type)))


def saved_model(model_type: str, folder: Path, **how: Any) -> Path:
    """A tiny model of a type, saved again as ``how`` says: dtype, max_shard_size."""
    architecture = architecture_of(model_type)
    made = make_tiny_model(architecture, model_type, folder / "fp32").folder
    model = load_model(locate(str(made)), architecture, how.pop("dtype", torch.float32))
    target = Path(shutil.copytree(made, folder / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    model.save_pretrained(target, **how)
    return target


def reader_of(folder: Path, architecture: Architecture, dtype: torch.dtype | None = None) -> BlockReader:
    source = locate(str(folder))
    return BlockReader.of(source, architecture, load_config(source), dtype)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those that are not saved and those that are tied too."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Equal in every bit, in the same dtypes, ready to run."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
        assert not tensor.requires_grad, name
    assert {n for n, m in found.named_modules() if m.training} == set()
    for (name, module), (_, other) in zip(found.named_modules(), expected.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert set(module._forward_pre_hooks.values()) == set(other._forward_pre_hooks.values()), name


def put(model: nn.Module, path: str, block: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, block)


@torch.no_grad()
def assert_is_loaded_by(reader: BlockReader, expected: Any, architecture: Architecture) -> None:
    """The shell and every block are those of ``expected``, and compute the same outputs."""
    reader.load_shell()
    for path in reader.paths:
        block = reader.block(path)
        assert_same(block, expected.get_submodule(path))
        assert {t.device.type for t in tensors_of(reader.model.get_submodule(path)).values()} == {"meta"}
        put(reader.model, path, block)
    assert_same(reader.model, expected)
    ties = [len({id(p) for p in tensors_of(m).values()}) for m in (reader.model, expected)]
    assert ties[0] == ties[1]
    assert reader.model.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        assert reader.model.generation_config.to_dict() == expected.generation_config.to_dict()
    inputs = modality_of(architecture).dummy_inputs(expected.config)
    inputs = {k: v.to(expected.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    assert torch.equal(main_output(reader.model(**inputs)), main_output(expected(**inputs)))


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}, {"dtype": torch.bfloat16}], ids=["", "shards", "bf16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_block_is_the_one_that_from_pretrained_loads(
    model_type: str, how: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved_model(model_type, tmp_path, **how)
    if "max_shard_size" in how:
        assert len(list(folder.glob("*.safetensors"))) > 3
    architecture = architecture_of(model_type)
    expected = load_model(locate(str(folder)), architecture, "auto")
    assert expected.dtype == how.get("dtype", torch.float32)
    assert_is_loaded_by(reader_of(folder, architecture), expected, architecture)


def test_what_a_model_computes_for_its_blocks(tmp_path: Path) -> None:
    """A table of factors that no file holds, and that is not made by the layer that has it."""
    architecture = copy.copy(architecture_of("falcon_h1"))
    default = CONFIG_MAPPING["falcon_h1"]()
    architecture.tiny_config = {**settings_of("falcon_h1", default), "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]}
    folder = make_tiny_model(architecture, "falcon_h1", tmp_path).folder
    expected = load_model(locate(str(folder)), architecture, torch.float32)
    table = reader_of(folder, architecture).block("model.layers.1").mamba.mup_vector
    assert torch.equal(table, expected.get_submodule("model.layers.1").mamba.mup_vector)
    assert set(table.unique().tolist()) == {torch.tensor(part).item() for part in (0.5, 0.6, 0.7, 0.8, 0.9)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype_than_that_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved_model("mixtral", tmp_path, dtype=torch.bfloat16)
    architecture = architecture_of("mixtral")
    expected = load_model(locate(str(folder)), architecture, dtype)
    assert_is_loaded_by(reader_of(folder, architecture, dtype), expected, architecture)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_a_class_keeps_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    architecture = Architecture(name="ernie", model_types=("ernie4_5_moe",), stacks={"decoder": "model.layers"})
    folder = make_tiny_model(architecture, "ernie4_5_moe", tmp_path).folder
    expected = load_model(locate(str(folder)), architecture, dtype)
    assert {p.dtype for p in expected.model.layers[1].parameters()} == {torch.float32, dtype}
    assert_is_loaded_by(reader_of(folder, architecture, dtype), expected, architecture)


@pytest.mark.parametrize("said", [True, False], ids=["config says", "config silent"])
def test_mixed_dtypes_on_disk(said: bool, tmp_path: Path) -> None:
    folder = saved_model("llama", tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    mixed = {k: v.float() if "norm" in k else v.half() if "mlp" in k else v for k, v in tensors.items()}
    save_file(mixed, folder / WEIGHTS, {"format": "pt"})
    if not said:
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    architecture = architecture_of("llama")
    expected = load_model(locate(str(folder)), architecture, "auto")
    assert_is_loaded_by(reader_of(folder, architecture), expected, architecture)


def test_two_tables_that_the_config_calls_tied_but_differ(tmp_path: Path) -> None:
    folder = saved_model("gpt2", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    architecture = architecture_of("gpt2")
    expected = load_model(locate(str(folder)), architecture, "auto")
    assert expected.lm_head.weight is not expected.transformer.wte.weight
    assert_is_loaded_by(reader_of(folder, architecture), expected, architecture)


def test_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    """Names without the head's prefix, as many older checkpoints have them."""
    folder = saved_model("gpt2", tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    architecture = architecture_of("gpt2")
    expected = load_model(locate(str(folder)), architecture, "auto")
    assert_is_loaded_by(reader_of(folder, architecture), expected, architecture)


def test_numbers_drawn_elsewhere_are_not_disturbed_and_settings_are_shared(tmp_path: Path) -> None:
    folder = saved_model("mamba", tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reader = reader_of(folder, architecture_of("mamba"))
    reader.load_shell()
    block = reader.block(reader.paths[0])
    assert torch.equal(torch.rand(3), expected)
    assert any(module.config is reader.model.config for module in block.modules() if hasattr(module, "config"))


def test_what_is_done_to_the_model_does_not_reach_the_blocks(tmp_path: Path) -> None:
    folder = saved_model("llama", tmp_path)
    reader = reader_of(folder, architecture_of("llama"))
    first = reader.paths[0]
    reader.model.get_submodule(first).forward = lambda *_: None
    reader.model.get_submodule(first).mlp.up_proj = nn.Identity()
    expected = load_model(locate(str(folder)), architecture_of("llama"), "auto")
    assert_same(reader.block(first), expected.get_submodule(first))
    assert "forward" not in vars(reader.block(first))


# Prefetching


def test_a_block_that_was_begun_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model("mixtral", tmp_path)
    architecture = architecture_of("mixtral")
    expected = load_model(locate(str(folder)), architecture, "auto")
    reader = reader_of(folder, architecture)
    readers: list[tuple[str, str]] = []
    plain = reader._read

    def noted(group: str) -> dict[str, torch.Tensor]:
        readers.append((group, threading.current_thread().name))
        return plain(group)

    monkeypatch.setattr(reader, "_read", noted)
    first, second = reader.paths[:2]
    reader.prefetch(first)
    reader.prefetch(first)
    assert_same(reader.block(first), expected.get_submodule(first))
    reader.prefetch(second)
    # Taken once: read anew, here.
    assert_same(reader.block(first), expected.get_submodule(first))
    assert_same(reader.block(second), expected.get_submodule(second))
    ours = threading.current_thread().name
    assert sorted((g, thread == ours) for g, thread in readers) == [(first, False), (first, True), (second, False)]


def test_what_a_prefetch_meets_is_said_by_block(tmp_path: Path) -> None:
    folder = saved_model("llama", tmp_path)
    reader = reader_of(folder, architecture_of("llama"))
    (folder / WEIGHTS).unlink()
    reader.prefetch(reader.paths[1])
    with pytest.raises(LillamaError, match=r"weight file '.*model.safetensors' cannot be read") as met:
        reader.block(reader.paths[1])
    # They could be read when the reader was made: nothing that another request would mend.
    assert not isinstance(met.value, UserError)
    for call in (reader.block, reader.prefetch):
        with pytest.raises(LillamaError, match=r"'model\.layers\.7' is none of the model's blocks"):
            call("model.layers.7")


# Memory


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_memory_is_that_of_one_block(family: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_local_experts": 4}
    folder = make_model(tmp_path / "model", family, **sizes)
    reader = reader_of(folder, architecture_of(family))
    gc.collect()
    release_memory()
    before = anonymous()

    def held(path: str, following: str | None = None) -> float:
        """Memory while one block is held, in blocks."""
        block = reader.block(path)
        size = sum(t.nbytes for t in tensors_of(block).values())
        assert size > 10e6
        # What the allocator keeps of what is freed is not the reader's.
        release_memory()
        found = (anonymous() - before) / size
        del block
        if following is not None:
            reader.prefetch(following)
        return found

    alone = [held(path) for path in reader.paths]
    assert max(alone) < 1.1, alone
    release_memory()
    assert anonymous() - before < 1e6
    # glibc returns the memory of another thread in part only, but uses it again.
    ahead = [held(*pair) for pair in itertools.pairwise(reader.paths * 3)]
    assert max(ahead) < 2.2, ahead


# Checkpoints that are not as they should be


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return saved_model("llama", tmp_path, max_shard_size="20KB")


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def holding(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def drop(entries: dict[str, Any]) -> None:
        del entries[key]

    return drop


UP = "model.layers.1.mlp.up_proj.weight"


def refusal(folder: Path) -> str:
    """What is said of a directory, when it is looked at or before a weight is read; in one line."""
    with pytest.raises(UserError) as error:
        reader_of(folder, architecture_of("llama"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_index_that_leaves_the_directory(sharded: Path) -> None:
    shutil.copy(holding(sharded, UP), sharded.parent / "x.safetensors")
    edit_index(sharded, lambda named: named.update({UP: "../x.safetensors"}))
    assert refusal(sharded).endswith("names '../x.safetensors', which is outside of the model directory")
    edit_index(sharded, lambda named: named.update({UP: str(sharded.parent / "x.safetensors")}))
    assert "which is outside of the model directory" in refusal(sharded)


def test_an_index_that_names_what_is_not_there(sharded: Path) -> None:
    named = holding(sharded, UP).name
    edit_index(sharded, lambda named: named.update({"nobody's": next(iter(named.values()))}))
    assert "holds nobody's, which it does not" in refusal(sharded)
    (sharded / named).unlink()
    assert f"lacks {named}, which its weight index names" in refusal(sharded)


def test_an_index_that_is_none(sharded: Path) -> None:
    for text in ("", "[]", '{"weight_map": []}', '{"weight_map": 3}'):
        (sharded / INDEX).write_text(text)
        assert "is corrupt" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    other = next(f for f in sorted(sharded.glob("*.safetensors")) if f != holding(sharded, UP))
    rewrite(other, lambda tensors: tensors.update({UP: torch.zeros(64, 32)}))
    assert f"has {UP} in both" in refusal(sharded)


def test_a_shard_that_was_cut_off(sharded: Path) -> None:
    file = holding(sharded, UP)
    file.write_bytes(file.read_bytes()[:-10])
    assert f"weight file {str(file)!r} is corrupt or truncated" in refusal(sharded)
    source = ModelSource(str(sharded), str(sharded))
    with pytest.raises(UserError, match="is corrupt or truncated"):
        BlockReader.of(source, architecture_of("llama"), load_config(source))


@pytest.mark.parametrize("offsets", [[-8, 8], [8, 0], ["a", 8], [0]])
def test_a_header_with_offsets_that_cannot_be(offsets: list[Any], tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(UserError, match="is corrupt or truncated"):
        check_safetensors(tmp_path / "x.safetensors")


def test_missing_weights(sharded: Path) -> None:
    rewrite(holding(sharded, UP), lambda tensors: tensors.update(other=tensors.pop(UP)))
    edit_index(sharded, without(UP))
    assert refusal(sharded).endswith(f"lacks 1 of its weights, such as {UP}")
    with pytest.raises(UserError) as error:
        load_model(locate(str(sharded)), architecture_of("llama"), "auto")
    assert str(error.value) == refusal(sharded)


def test_shards_of_another_revision(sharded: Path) -> None:
    file = holding(sharded, UP)
    rewrite(file, lambda tensors: tensors.update({UP: torch.zeros(80, 32)}))
    message = refusal(sharded)
    assert f"{UP} is [80, 32] in {file.name} where the model's config asks for [64, 32]" in message
    assert "of one revision" in message
    rewrite(file, lambda tensors: tensors.update({UP: torch.zeros(64, 32, dtype=torch.int8)}))
    assert f"{UP} in {file.name} is of type I8" in refusal(sharded)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = saved_model("mixtral", tmp_path)
    key = next(k for k in load_file(folder / WEIGHTS) if ".1." in k and "experts.2.w1" in k)
    rewrite(folder / WEIGHTS, without(key))
    source = locate(str(folder))
    with pytest.raises(UserError, match=r"cannot load model .*layers\.1\.mlp\.experts\.gate_up_proj"):
        BlockReader.of(source, architecture_of("mixtral"), load_config(source))


def test_weights_of_a_model_with_another_head(tmp_path: Path) -> None:
    folder = saved_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    message = refusal(folder)
    assert "has 1 weights that would be dropped, such as score.weight; it is a LlamaForSequence" in message
    with pytest.raises(UserError) as error:
        load_model(locate(str(folder)), architecture_of("llama"), "auto")
    assert str(error.value) == message


# Results that are written by parts


def compress_by_chance(model: Any, architecture: Architecture, form: str) -> LillamaConfig:
    """Put random low-rank modules of several ranks into all blocks, and attach the quantizer."""
    generator = torch.Generator().manual_seed(0)
    entries: dict[str, Any] = {}
    for block in [block for stack in find_blocks(architecture, model).values() for block in stack]:
        module = model.get_submodule(block.path)
        for target in block.targets:
            layers: dict[str, nn.Module] = {}
            ranks: dict[str, int] = {}
            for i, map_ in enumerate(target.maps):
                rank = map_.full_rank // 2 - i % 3
                B = torch.randn(map_.out_features, rank, generator=generator)
                A = torch.randn(rank, map_.in_features, generator=generator)
                layers[map_.name] = make("formats", form).from_factors(B, A, target.bias(module, map_))
                ranks[target.local_name(map_)] = rank
            target.replace(module, layers)
            how = {"rank": ranks[""]} if set(ranks) == {""} else {"ranks": ranks}
            entries[f"{block.path}.{target.name}"] = {"kind": target.kind, "format": form, **how}
    config = LillamaConfig(entries)
    model.config.dtype = model.dtype
    attach(model, config)
    return config


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "whisper", "gpt2", "mamba"])
def test_parts_together_are_what_save_pretrained_writes(model_type: str, form: str, tmp_path: Path) -> None:
    architecture = architecture_of(model_type)
    dense = make_tiny_model(architecture, model_type, tmp_path / "dense").folder
    source = locate(str(dense))
    model: Any = load_model(source, architecture, torch.float32)
    config = compress_by_chance(model, architecture, form)
    model.save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / WEIGHTS)

    dense_config = load_config(source)
    untouched = dense_config.to_dict()
    meta = compressed_meta_model(architecture, dense_config, config)
    assert dense_config.to_dict() == untouched
    assert {t.device.type for t in tensors_of(meta).values()} == {"meta"}
    assert tensors_of(meta).keys() == tensors_of(model).keys()
    paths = [f"{p}.{n}" for p in architecture.stacks.values() for n, _ in model.get_submodule(p).named_children()]
    parts: dict[str, dict[str, torch.Tensor]] = {path: {} for path in ("", *paths)}
    for name, tensor in model.state_dict().items():
        parts[next((p for p in paths if name.startswith(f"{p}.")), "")][name] = tensor
    shards = []
    for i, (path, tensors) in enumerate(parts.items()):
        shards.append(tmp_path / f"{i}.safetensors")
        write_tensors(shards[-1], names_on_disk(meta, tensors))
        reader = BlockReader(meta, dict.fromkeys(check_safetensors(shards[-1]), shards[-1]), architecture)
        if path:
            assert_same(reader.block(path), model.get_submodule(path))

    for limit, files in ((1 << 30, 1), (1, len(shards))):
        out = tmp_path / f"out{files}"
        out.mkdir()
        for _ in range(2):
            assemble(out, shards, limit)
        found = {f.name: load_file(f) for f in out.glob("*.safetensors")}
        assert len(found) == files
        together = {name: tensor for tensors in found.values() for name, tensor in tensors.items()}
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[n], t) and together[n].dtype == t.dtype for n, t in expected.items())
        shutil.copy(tmp_path / "saved" / "config.json", out)
        again = load_model(locate(str(out)), architecture, "auto")
        ours, theirs = tensors_of(again), tensors_of(model)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        from_parts = BlockReader(compressed_meta_model(architecture, dense_config, config),
                                 {n: out / f for f, tensors in found.items() for n in tensors},
                                 architecture)  # fmt: skip
        assert_is_loaded_by_parts(from_parts, again)


def assert_is_loaded_by_parts(reader: BlockReader, expected: Any) -> None:
    reader.load_shell()
    for path in reader.paths:
        put(reader.model, path, reader.block(path))
    assert_same(reader.model, expected.requires_grad_(False))


def test_a_block_of_which_a_part_was_written_is_refused(tmp_path: Path) -> None:
    folder = saved_model("llama", tmp_path)
    architecture = architecture_of("llama")
    model = reader_of(folder, architecture).model
    files = {k: folder / WEIGHTS for k in load_file(folder / WEIGHTS) if k != UP}
    reader = BlockReader(model, files, architecture)
    reader.block("model.layers.0")
    with pytest.raises(UserError, match=f"the weight files lack {UP}"):
        reader.block("model.layers.1")
    del files["model.norm.weight"]
    reader = BlockReader(model, files, architecture)
    with pytest.raises(UserError, match=r"the weight files lack model\.norm\.weight"):
        reader.load_shell()


def test_names_on_disk_need_values(tmp_path: Path) -> None:
    model = reader_of(saved_model("llama", tmp_path), architecture_of("llama")).model
    with pytest.raises(LillamaError, match="has no values"):
        names_on_disk(model, model.state_dict())


# Merging


@pytest.fixture
def odd_shards(tmp_path: Path) -> list[Path]:
    """Tensors of many dtypes and odd sizes, whose data would lie askew one after the other by name."""
    first = {"a": torch.arange(3, dtype=torch.int8), "c": torch.randn(5).bfloat16(), "scalar": torch.tensor(2.5)}
    second = {"b": torch.arange(7), "d": torch.randn(3, 2, dtype=torch.float64), "none": torch.zeros(0, 4)}
    for name, tensors in (("1", first), ("2", second), ("3", {"aa": torch.tensor([True, False, True])})):
        write_tensors(tmp_path / f"{name}.safetensors", tensors)
    return [tmp_path / f"{n}.safetensors" for n in "123"]


def test_a_merged_file_is_aligned_and_holds_the_same(odd_shards: list[Path], tmp_path: Path) -> None:
    assemble(tmp_path, odd_shards, 1 << 20)
    expected = {k: v for f in odd_shards for k, v in load_file(f).items()}
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, tensor in check_safetensors(tmp_path / WEIGHTS).items():
        assert tensor.start % found[name].itemsize == 0, name
    assert not list(tmp_path.glob("*.tmp"))


def test_an_index_says_where_everything_is(odd_shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"of an earlier call")
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"of an earlier call")
    total = sum(t.nbytes for f in odd_shards for t in load_file(f).values())
    assemble(tmp_path, odd_shards, total)
    assert not (tmp_path / WEIGHTS).exists()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": total}
    assert index["weight_map"] == {
        k: f"model-{i:05d}-of-00003.safetensors" for i, f in enumerate(odd_shards, 1) for k in load_file(f)
    }
    assert sorted(f.name for f in tmp_path.glob("model*")) == [*sorted(set(index["weight_map"].values())), INDEX]
    assert (tmp_path / "model-00001-of-00003.safetensors").samefile(odd_shards[0])


def test_where_links_cannot_be_made(odd_shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("the file system has no links")

    monkeypatch.setattr("os.link", refuse)
    assemble(tmp_path, odd_shards, 0)
    copied = tmp_path / "model-00002-of-00003.safetensors"
    assert copied.read_bytes() == odd_shards[1].read_bytes()
    assert not copied.samefile(odd_shards[1])


def test_shards_that_hold_one_name_are_not_merged(odd_shards: list[Path], tmp_path: Path) -> None:
    write_tensors(tmp_path / "4.safetensors", {"b": torch.zeros(1)})
    with pytest.raises(LillamaError, match=r"b is in both '.*2\.safetensors' and '.*4\.safetensors'"):
        assemble(tmp_path, [*odd_shards, tmp_path / "4.safetensors"], 1 << 20)


# GGUF


def write_experts_gguf(path: Path, folder: Path) -> None:
    """A GGUF file of a tiny Qwen3-MoE: experts stacked, gate and up apart, matrices in Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    model: Any = load_model(locate(str(folder)), architecture_of("qwen3_moe"), torch.float32)
    config = model.config
    writer = GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "mlp.gate.": "ffn_gate_inp.",
        "mlp.experts.down_proj": "ffn_down_exps.weight",
    }  # fmt: skip
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        gate, up = tensor.chunk(2, dim=1) if "gate_up" in name else (None, None)
        prefix = name.removesuffix("mlp.experts.gate_up_proj")
        stored.update({name: tensor} if gate is None else {f"{prefix}ffn_gate_exps.weight": gate})
        stored.update({} if up is None else {f"{prefix}ffn_up_exps.weight": up})
    for name, tensor in stored.items():
        data = tensor.contiguous().numpy()
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, data)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_gguf_file(model_type: str, dtype: torch.dtype | None, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    if model_type == "llama":
        write_gguf(path, tiny_model)
    else:
        sized = copy.copy(architecture_of(model_type))
        # What transformers takes for granted, whatever the file says.
        sized.tiny_config = {"moe_intermediate_size": 768}
        write_experts_gguf(path, make_tiny_model(sized, model_type, tmp_path / "dense").folder)
    architecture = architecture_of(model_type)
    source = locate(str(path))
    reader = BlockReader.of(source, architecture, load_config(source), dtype)
    # The numbers on disk are in float16.
    expected = load_model(source, architecture, torch.float16)
    if dtype is not None:
        expected.to(dtype)
    reader.load_shell()
    for name in reader.paths:
        put(reader.model, name, reader.block(name))
    assert {n: t for n, t in tensors_of(reader.model).items() if not t.is_floating_point()} == {}
    weights = dict(expected.named_parameters())
    assert dict(reader.model.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(p, weights[n]) and p.dtype == weights[n].dtype for n, p in reader.model.named_parameters())
    if dtype is None:
        assert_same(reader.model, expected)
        assert reader.model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_a_gguf_file_is_unpacked_once(tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model)
    source = locate(str(tmp_path / "tiny.gguf"))
    architecture, config = architecture_of("llama"), load_config(source)
    folder = shards_of_gguf(source, architecture, config)
    written = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert len([name for name in written if name.endswith(".safetensors")]) == 3
    assert shards_of_gguf(source, architecture, config) == folder
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == written
    os.utime(tmp_path / "tiny.gguf", (0, 0))
    assert shards_of_gguf(source, architecture, config) != folder


# The hub


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_a_model_in_the_cache_of_the_hub(size: str, tmp_path: Path) -> None:
    """Its files are links to elsewhere; without a network only what is there can be asked for."""
    folder = saved_model("llama", tmp_path, max_shard_size=size)
    cached = tmp_path / "cache" / "models--some--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    for part in (snapshot, cached / "blobs", cached / "refs"):
        part.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        shutil.move(file, cached / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    script = (
        "from pathlib import Path\nfrom lillama_core.models.source import ModelSource, weight_files\n"
        "found = weight_files(ModelSource('some/model', 'some/model'))\n"
        "print(len(found), sorted({str(f.parent) for f in found.values()}))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    keys = {k for f in (cached / "blobs").glob("*.safetensors") for k in load_file(f)}
    assert done.stdout.strip() == f"{len(keys)} {[str(snapshot)]}", done.stderr
