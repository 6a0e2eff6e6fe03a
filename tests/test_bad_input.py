"""Every mistake ends in one line that says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import QUICK, QUICK_ANYHOW, Ended, environment, run_process, tree
from safetensors.torch import load_file, save_file

from lillama_registry import registry

Cli = Callable[..., Ended]


@pytest.fixture
def refused(
    run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """``refused(*changes)``: a run that is in order but for ``changes``; its one line. Nothing may have changed."""
    monkeypatch.chdir(tmp_path)

    def run(*changes: str | Path, model: str | Path = tiny_model, output: str | Path = "out") -> str:
        before = tree(tmp_path)
        data = () if "--calibration" in changes else ("--calibration", calibration_text)
        ended = run_cli("compress", model, "--output", output, *data, *QUICK_ANYHOW, *changes)
        assert ended.stdout == ""
        assert tree(tmp_path) == before
        return ended.error

    return run


# The model


def test_missing_model(refused: Callable[..., str]) -> None:
    assert "no model at './nowhere'" in refused(model="./nowhere")
    assert "no file or directory 'nowhere'" in refused(model="nowhere")
    assert "no model at 'nowhere.gguf'" in refused(model="nowhere.gguf")
    assert "no model at ''" in refused(model="")
    assert "cannot be read" in refused(model="n" * 300)


def test_empty_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(model="empty")


def test_directory_without_config(refused: Callable[..., str], tiny_model: Path) -> None:
    (tiny_model / "config.json").unlink()
    assert "has no config.json" in refused()
    (tiny_model / "some.gguf").touch()
    assert "it holds some.gguf: give that file's path" in refused()


def test_directory_without_weights(refused: Callable[..., str], tiny_model: Path) -> None:
    (tiny_model / "model.safetensors").unlink()
    assert "has no .safetensors weights" in refused()
    (tiny_model / "pytorch_model.bin").touch()
    assert "pickle, which is never loaded" in refused()


def test_file_that_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    assert "not a .gguf file" in refused(model="model.txt")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}', "\x00"])
def test_broken_config(refused: Callable[..., str], tiny_model: Path, text: str) -> None:
    (tiny_model / "config.json").write_text(text)
    assert "config" in refused()


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -5000])
def test_truncated_safetensors(refused: Callable[..., str], tiny_model: Path, keep: int) -> None:
    truncate(tiny_model / "model.safetensors", keep)
    assert re.search(r"weight file '.*model.safetensors' is corrupt or truncated", refused())


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b"{}", b"\xff\xfe", b'{"a": 1}', b'{"a": {"data_offsets": "x"}}', b"[" * 5000]
)
def test_corrupt_safetensors(refused: Callable[..., str], tiny_model: Path, header: bytes) -> None:
    (tiny_model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is corrupt or truncated" in refused()


def test_safetensors_with_a_wild_length(refused: Callable[..., str], tiny_model: Path) -> None:
    (tiny_model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "is corrupt or truncated" in refused()


def test_safetensors_with_overlapping_tensors(refused: Callable[..., str], tiny_model: Path) -> None:
    """The header adds up, but safetensors itself refuses it."""
    path = tiny_model / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    first = next(k for k in header if k != "__metadata__")
    header[first]["data_offsets"] = [0, 1]
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    assert "cannot load model" in refused()


def test_weights_that_are_missing(refused: Callable[..., str], tiny_model: Path) -> None:
    """transformers would fill them with random numbers."""
    path = tiny_model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight" in refused()


def test_weights_of_another_shape(refused: Callable[..., str], tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "cannot load model" in refused()


def test_missing_shard(refused: Callable[..., str], tiny_model: Path) -> None:
    index = tiny_model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert "lacks model-2.safetensors" in refused()
    index.write_text("{")
    assert "is corrupt" in refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(
    refused: Callable[..., str], make_model: Callable[..., Path], tmp_path: Path, value: float
) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = value

    make_model(tmp_path / "spoilt", change=spoil)
    assert "the weight of model.layers.1.self_attn.k_proj holds NaN or infinite values" in refused(model="spoilt")


def test_no_plugin(refused: Callable[..., str], make_model: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "other", family="bert")
    said = refused(model="other")
    assert "no plugin handles model type 'bert'" in said
    assert "nearest: " in said
    assert "add a plugin: see 'Add an architecture' in the README" in said


def test_model_type_that_transformers_does_not_know(refused: Callable[..., str], tiny_model: Path) -> None:
    (tiny_model / "config.json").write_text(json.dumps({"model_type": "lllama"}))
    said = refused()
    assert "no plugin handles model type 'lllama'" in said
    assert "nearest: llama" in said
    assert "add a plugin" in said


def test_a_known_architecture_serves_a_stranger(run_cli: Cli, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """What the message of `test_no_plugin` advises works, wherever the blocks are."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    for family, config in (("olmo", {}), ("bart", sizes)):
        make_model(tmp_path / family, family=family, **config)
        ended = run_cli("plan", tmp_path / family, "--architecture", "transformer", "--reduction", "0.1", "--json")
        assert ended.status == 0, ended
        assert len(json.loads(ended.stdout)["maps"]) > 4


def test_architecture_that_does_not_fit(
    refused: Callable[..., str], make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that would have the model double its hidden states; BERT, which has its blocks elsewhere."""
    with monkeypatch.context() as changed:
        (architecture,) = registry().architectures_for("llama")
        changed.setattr(architecture, "between_blocks", lambda index, hidden: 2 * hidden)
        assert "architecture 'transformer' does not describe this model" in refused()
    make_model(tmp_path / "bert", family="bert")
    said = refused("--architecture", "transformer", model="bert")
    assert "architecture 'transformer' expects the decoder blocks at" in said
    said = refused("--architecture", "transformers")
    assert "no architecture named 'transformers'" in said
    assert "did you mean 'transformer'?" in said


def test_quantized_model(refused: Callable[..., str], tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tiny_model / "config.json").write_text(json.dumps(config))
    assert "is quantized (gptq); start from its unquantized weights" in refused()


def test_remote_code(refused: Callable[..., str], tiny_model: Path) -> None:
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config"}}
    (tiny_model / "config.json").write_text(json.dumps(config))
    (tiny_model / "code.py").write_text("raise SystemExit('must not run')")
    assert "--trust-remote-code" in refused()


def test_blocks_that_share_weights(refused: Callable[..., str], make_model: Any, tmp_path: Path) -> None:
    """Zamba2's attention is one, in every other block: known before anything is loaded."""
    make_model(
        tmp_path / "zamba", family="zamba2", num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1, num_key_value_heads=4,
        attention_head_dim=16, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1,
    )  # fmt: skip
    said = refused("--architecture", "transformer", model="zamba")
    shared = "shared_transformer.self_attn.q_proj.weight"
    assert said == (
        f"model.layers.1.{shared} and model.layers.3.{shared} are one weight: models whose blocks share weights cannot"
        " be compressed"
    )


def test_compressed_model(run_cli: Cli, refused: Callable[..., str], compressed: Path) -> None:
    assert "is already compressed by lillama; start from its base model" in refused(model=compressed)
    assert "is already compressed" in run_cli("plan", compressed).error


# GGUF


def write_gguf(path: Path, model_folder: Path, architecture: str = "llama") -> None:
    """A GGUF file of a tiny Llama."""
    config = json.loads((model_folder / "config.json").read_text())
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        # Norms stay in fp32, as in every GGUF.
        writer.add_tensor(name, tensor.numpy().astype(np.float32 if tensor.dim() == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model)
    return path


def test_gguf_works(run_cli: Cli, tiny_gguf: Path, calibration_text: Path, tmp_path: Path) -> None:
    ended = run_cli("compress", tiny_gguf, "-o", tmp_path / "o", "-q", "--calibration", calibration_text, *QUICK)
    assert (ended.status, ended.stderr) == (0, "")
    assert {t.dtype for t in load_file(tmp_path / "o" / "model.safetensors").values()} <= {torch.float16, torch.int16}


@pytest.mark.parametrize(
    "content", [b"hello, this is text", b"", b"GGUF", b"GGUF" + b"\xff" * 4000, b"GGUF" + bytes(90)]
)
def test_file_that_is_no_gguf(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    said = refused(model="bad.gguf")
    assert "is not a GGUF file" in said or "is corrupt or truncated" in said


@pytest.mark.parametrize("kind", [0, 8])
def test_gguf_that_claims_more_than_it_holds(refused: Callable[..., str], tmp_path: Path, kind: int) -> None:
    """One array of 2^40 elements in 49 bytes: the library's reader would go through them all."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    (tmp_path / "big.gguf").write_bytes(header + struct.pack("<IIQ", 9, kind, 2**40))
    assert "claims 1099511627776 values where 0 bytes are left" in refused(model=tmp_path / "big.gguf")


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_gguf(refused: Callable[..., str], tiny_gguf: Path, part: float) -> None:
    truncate(tiny_gguf, int(tiny_gguf.stat().st_size * part))
    assert "GGUF file 'tiny.gguf' is corrupt or truncated" in refused(model="tiny.gguf")


def test_gguf_of_an_unknown_architecture(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny_model, "rwkv6")
    assert "rwkv6" in refused(model="odd.gguf")


# The tokenizer


def without_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)


def test_missing_tokenizer(refused: Callable[..., str], tiny_model: Path) -> None:
    without_tokenizer(tiny_model)
    assert "name one with --tokenizer" in refused()
    assert "no tokenizer found at 'nowhere'" in refused("--tokenizer", "nowhere")


def test_broken_tokenizer(refused: Callable[..., str], tiny_model: Path) -> None:
    (tiny_model / "tokenizer.json").write_text("{")
    assert "name one with --tokenizer" in refused()


def test_tokenizer_of_another_model(
    refused: Callable[..., str], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    make_model(tmp_path / "fewer", vocab_size=100)
    assert "the model knows only 100" in refused(model="fewer")


def test_tokenizer_from_elsewhere(
    refused: Callable[..., str], make_model: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """What the message of `test_missing_tokenizer` advises works: tokens are counted, and only those are too few."""
    without_tokenizer(make_model(tmp_path / "bare"))
    assert "--use-all-tokens" in refused("--tokenizer", tiny_model, "--tokens", "1000000", model="bare")


# The reduction


@pytest.mark.parametrize("value", ["0", "1", "-0.2", "nan", "inf", "1.5"])
def test_reduction_out_of_range(refused: Callable[..., str], value: str) -> None:
    assert "must be a number between 0 and 1" in refused("--reduction", value)


def test_reduction_that_removes_nothing(refused: Callable[..., str]) -> None:
    assert "reduction" in refused("--reduction", "1e-9")


@pytest.mark.parametrize("format_", ["pivoted", "factored"])
@pytest.mark.parametrize("allocation", ["spectrum", "uniform", "bottom-first", "top-first"])
def test_the_named_maximum_can_be_planned(run_cli: Cli, tiny_model: Path, format_: str, allocation: str) -> None:
    ranks = ("--minimum-rank", "1", "--rank-step", "1") if allocation.endswith("first") else ()
    recipe = ("--format", format_, "--allocation", allocation, *ranks)
    said = run_cli("plan", tiny_model, "--reduction", "0.95", *recipe).error
    maximum = re.search(r"the maximum is (0\.\d+)", said)
    assert maximum, said
    ended = run_cli("plan", tiny_model, "--json", "--reduction", maximum[1], *recipe)
    assert ended.status == 0, ended
    assert json.loads(ended.stdout)["reduction"] == pytest.approx(float(maximum[1]), abs=0.001)
    # Nor is it far from what is possible.
    assert "the maximum is" in run_cli("plan", tiny_model, "--reduction", str(float(maximum[1]) + 0.001), *recipe).error


def test_the_named_maximum_works(
    refused: Callable[..., str], run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    maximum = re.search(r"the maximum is (0\.\d+)", refused("--reduction", "0.95"))
    assert maximum
    ended = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "o", "--reduction", maximum[1]),
        *("--calibration", calibration_text, *QUICK),
    )
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "o" / "lillama.json").read_text())
    assert record["parameters"]["reduction"] == pytest.approx(float(maximum[1]), abs=0.001)


@pytest.mark.parametrize("allocation", ["bottom-first", "top-first"])
def test_minimum_ranks_that_forbid_the_reduction(refused: Callable[..., str], allocation: str) -> None:
    said = refused("--reduction", "0.5", "--allocation", allocation, "--minimum-rank", "31")
    assert "lower --minimum-rank" in said
    assert "at most" in said


# The data


def test_names_longer_than_those_of_files(run_cli: Cli, tiny_model: Path) -> None:
    names = ",".join(f"self_attn.q_proj_{i:010}" for i in range(16))
    ended = run_cli("plan", tiny_model, "--exclude", names)
    assert ended.status == 2
    assert "self_attn.q_proj_0000000000" in ended.error
    ended = run_cli("compress", tiny_model, "-o", tiny_model / "out", "--calibration", "~no_such_user_here/a.txt")
    assert ended.status == 2
    assert "~no_such_user_here/a.txt" in ended.error


def test_missing_data(refused: Callable[..., str]) -> None:
    assert "no such file" in refused("--calibration", "nowhere.txt")
    assert "is a directory" in refused("--calibration", "tiny")
    assert "names nothing" in refused("--calibration", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.jsonl", b""),
        ("a.jsonl", b"{"),
        ("a.jsonl", b'{"other": 1}\n'),
        ("a.jsonl.gz", b"no gzip"),
        ("a.parquet", b""),
        ("a.parquet", b"no parquet"),
    ],
)
def test_bad_data(refused: Callable[..., str], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused("--calibration", name)


def test_more_tokens_than_the_data_has(
    refused: Callable[..., str],
    run_cli: Cli,
    tiny_model: Path,
    calibration_text: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    text = calibration_text.read_text(encoding="utf-8")
    there = len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
    said = refused("--tokens", "1000000")
    assert re.search(r"has (\d+) tokens", said), said
    assert int(re.search(r"has (\d+) tokens", said)[1]) == there  # type: ignore[index]
    assert "--use-all-tokens" in said
    ended = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK),
        *("--tokens", "1000000", "--steps", "0", "--use-all-tokens"),
    )
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "o" / "lillama.json").read_text())
    assert record["data"]["tokens"] == there // 32 * 32


def test_all_tokens_are_still_too_few(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words, which are some tokens and fill two rows. " * 3)
    said = refused("--calibration", "short.txt", "--use-all-tokens", "--tokens", "2048")
    assert "at least two batches" in said
    assert "rows of 32 tokens" in said


def test_too_few_rows(refused: Callable[..., str]) -> None:
    assert "at least two batches" in refused("--tokens", "100")
    assert "do not fill one sequence" in refused("--tokens", "5")
    assert "at most 64" in refused("--sequence-length", "128", "--tokens", "4096")


# Recipe, strategies, device


def test_recipe_that_is_missing_or_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no recipe file 'nowhere.yaml'" in refused("--recipe", "nowhere.yaml")
    (tmp_path / "empty.yaml").touch()
    assert "recipe 'empty.yaml' is empty" in refused("--recipe", "empty.yaml")
    said = refused("--recipe", "defualt")
    assert "no recipe named 'defualt'" in said
    assert "did you mean 'default'?" in said


@pytest.mark.parametrize(
    ("option", "wrong", "right"),
    [
        ("--init", "sensitivty", "sensitivity"),
        ("--init", "fischer", "fisher"),
        ("--allocation", "unifrom", "uniform"),
        ("--format", "factord", "factored"),
        ("--loss", "msee", "mse"),
        ("--mode", "studnet", "student"),
        ("--train", "factor", "factors"),
        ("--schedule", "cosin", "cosine"),
        ("--dtype", "bfloat", "bfloat16"),
        ("--compute", "float", "float32"),
        ("--stacks", "decodr", "decoder"),
    ],
)
def test_unknown_names_suggest_the_nearest(refused: Callable[..., str], option: str, wrong: str, right: str) -> None:
    said = refused(option, wrong)
    assert repr(wrong) in said
    assert f"did you mean {right!r}?" in said


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "meta", ""])
def test_wrong_device(refused: Callable[..., str], device: str) -> None:
    assert "device" in refused("--device", device)


# The output directory


def test_existing_output(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists; pass --overwrite" in refused()


def test_files_of_others_are_never_overwritten(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "holds files that lillama did not write" in refused("--overwrite")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    for flag in ((), ("--overwrite",), ("--resume",)):
        assert "holds 'thesis.tex', which lillama did not write" in refused(*flag)


def test_what_file_managers_leave_stops_nobody(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".DS_Store").write_bytes(b"")
    assert "an unfinished run is in" in refused()


def test_neighbours_of_the_output_are_left_alone(
    run_cli: Cli, tiny_model: Path, compressed: Path, calibration_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(compressed, tmp_path / "o")
    (tmp_path / "o.old").mkdir()
    (tmp_path / "o.old" / "thesis.tex").write_text("years of work")
    arguments = ("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK)
    assert run_cli(*arguments, "--steps", "0", "--overwrite").status == 0
    assert json.loads((tmp_path / "o" / "lillama.json").read_text())["recipe"]["steps"] == 0
    assert (tmp_path / "o.old" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "o.old", "tiny"]


def test_outputs_that_cannot_be_made(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(output="file")
    assert "cannot be written" in refused(output="file/below/out")
    assert "cannot be written" in refused(output="o" * 300)
    assert "not the name of a directory" in refused(output="/")
    assert "exists" in refused(output=".")
    if sys.platform == "linux":
        assert "cannot be written" in refused(output="/proc/lillama-test/out")


def test_output_that_is_a_link(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    assert "is a symbolic link" in refused("--overwrite")
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("gone")
    assert "is a symbolic link" in refused()


def test_overwrite_and_resume(refused: Callable[..., str]) -> None:
    assert "--overwrite and --resume exclude each other" in refused("--overwrite", "--resume")


def test_made_parents_are_unmade(refused: Callable[..., str], tmp_path: Path) -> None:
    """Too few tokens are found when the lock, beside the output, is held already."""
    assert "--use-all-tokens" in refused("--tokens", "1000000", output="some/new/out")
    assert not (tmp_path / "some").exists()


def test_overwritten_run_survives_a_mistake(refused: Callable[..., str], tmp_path: Path) -> None:
    """--overwrite removes the old only when the new has passed all checks."""
    (tmp_path / "out.partial" / "blocks").mkdir(parents=True)
    (tmp_path / "out.partial" / "run.json").write_text("{}")
    assert "--use-all-tokens" in refused("--tokens", "1000000", "--overwrite")


# The same, seen from outside


def test_libraries_keep_quiet(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    """In a process of its own, where warnings would show: refused after loading, and a run that works."""
    (tmp_path / "w").mkdir()
    arguments = ("compress", tiny_model, "-o", tmp_path / "w" / "o", "--calibration", calibration_text, *QUICK)
    assert "--use-all-tokens" in run_process(*arguments, "--tokens", "1000000").error
    assert tree(tmp_path / "w") == {}
    done = run_process(*arguments, "--quiet", "--self-share", "0.5", fresh=True)
    assert (done.status, done.stderr) == (0, "")
    assert "parameters" in done.stdout


# Failures that cannot be foreseen


def failed(ended: Ended) -> str:
    """The last line of a failure; progress may stand before it, a traceback may not."""
    assert ended.status == 1, ended
    lines = ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    assert [line for line in lines if line.startswith("lillama: error: ")] == lines[-1:], ended
    return lines[-1]


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_infinite_activations(
    run_cli: Cli, make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path, share: str
) -> None:
    def enlarge(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[1].mlp.up_proj.weight.fill_(1e3)

    make_model(tmp_path / "large", change=enlarge)
    ended = run_cli(
        *("compress", tmp_path / "large", "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK),
        *("--self-share", share),
    )
    assert "block model.layers.1 gives activations that are infinite" in failed(ended)
    assert not (tmp_path / "o").exists()


def test_full_disk(run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    """The largest file that may be written stands for the space that is left."""
    arguments = ("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK)

    def limited(size: int) -> Ended:
        return run_process(*arguments, file_bytes=size)

    said = failed(limited(20_000))
    assert "--resume" in said
    assert "too large" in said.lower()
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "o.partial").is_dir()
    done = run_cli(*arguments, "--resume")
    assert done.status == 0, done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "tiny"]


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux does it")
def test_out_of_memory(make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path) -> None:
    """The address space is limited to what the libraries take and a little more."""
    make_model(tmp_path / "m")
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, sys, psutil\n"
        "from lillama_core.cli.main import main\n"
        "limit = psutil.Process().memory_info().vms + 120_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, str(script), "compress", str(tmp_path / "m"), "-o", str(tmp_path / "o")),
            *("--calibration", str(calibration_text), *QUICK),
            *("--tokens", "8192", "--sequence-length", "64", "--batch-size", "64"),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    said = failed(Ended(done.returncode, done.stdout, done.stderr))
    assert "out of memory; lower --batch-size, --sequence-length or --tokens" in said
    assert not (tmp_path / "o").exists()


def test_modules_beside_the_model_are_not_run(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """A stranger's model directory, in which the command is given, may hold what Python would take for modules."""
    folder = make_model(tmp_path / "downloaded")
    for name in ("torch", "json", "safetensors", "lillama_core"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(7)\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lillama"), "compress", ".", "-o", "../out", "--calibration", calibration_text,
         *QUICK],
        cwd=folder, capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_head_that_would_be_dropped(
    refused: Callable[..., str], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = make_model(tmp_path / "classifier")
    config = AutoConfig.from_pretrained(folder, num_labels=3, architectures=["LlamaForSequenceClassification"])
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    message = refused(model=folder)
    assert "1 weights that would be dropped, such as score.weight; it is a LlamaForSequenceClassification" in message
    assert "--architecture auto" in message


def test_evaluating_with_more_positions_or_tokens_than_the_model_knows(
    run_cli: Cli, make_model: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    gpt2 = make_model(tmp_path / "gpt2", "gpt2")
    ended = run_cli("evaluate", gpt2, "--sequence-length", "128", "--windows", "1", "--limit", "1")
    assert "sequence length 128 is more than the 64 positions that the model knows" in ended.stderr
    assert ended.status == 2
    small = make_model(tmp_path / "small", vocab_size=100)
    ended = run_cli("evaluate", small, "--tokenizer", tiny_model, "--sequence-length", "32", "--windows", "1")
    assert "but the model knows only 100; use the tokenizer that belongs to the model" in ended.stderr
    assert ended.status == 2
