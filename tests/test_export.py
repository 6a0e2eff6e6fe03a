"""Exports: each format holds the compressed model, runs without lillama, and appears complete or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Ended, save_with_random_factors
from safetensors.torch import load_file, save_file
from torch import nn

from lillama_core import LillamaError, UserError, export, hookimpl, load
from lillama_core.architecture.targets.bands import band_bounds
from lillama_core.data.modality import modality_of
from lillama_core.exporting import CompressedModel, ExportJob
from lillama_core.exporting.dense import DenseExporter
from lillama_core.exporting.run import ExportRequest, open_compressed
from lillama_core.exporting.settings import copy_small_files
from lillama_core.models.outputs import main_output
from lillama_core.models.source import locate
from lillama_core.strategies import make
from lillama_core.system.progress import Progress
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

EXPERTS = {"gate_up.0": 5, "gate_up.3": 7, "down.1": 4}
SITES: dict[str, dict[str, Any]] = {
    "llama": {
        "model.embed_tokens": {"kind": "banded-embedding", "ranks": {"1": 9, "2": 5}},
        "model.layers.0.self_attn.q_proj": {"kind": "linear", "rank": 6},
        "model.layers.0.mlp.down_proj": {"kind": "linear", "rank": 11},
        "model.layers.1.mlp.up_proj": {"kind": "linear", "rank": 8},
    },
    "mixtral": {
        "model.layers.0.mlp.experts": {"kind": "experts", "ranks": EXPERTS},
        "model.layers.1.self_attn.o_proj": {"kind": "linear", "rank": 3},
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts": {"kind": "experts", "ranks": EXPERTS},
        "model.layers.1.self_attn.o_proj": {"kind": "linear", "rank": 3},
    },
    "mamba": {
        "backbone.layers.0.mixer.in_proj": {"kind": "linear", "rank": 9},
        "backbone.layers.1.mixer.out_proj": {"kind": "linear", "rank": 5},
    },
    "falcon_mamba": {"backbone.layers.1.mixer.in_proj": {"kind": "linear", "rank": 9}},
    "whisper": {
        "model.decoder.embed_tokens": {"kind": "banded-embedding", "ranks": {"0": 9}},
        "model.encoder.layers.0.fc1": {"kind": "linear", "rank": 10},
        "model.decoder.layers.1.encoder_attn.k_proj": {"kind": "linear", "rank": 6},
        "model.decoder.layers.0.fc2": {"kind": "linear", "rank": 7},
    },
}
"""What is low rank in a model of each family; the format is still to be named."""
CASES = [
    *(("llama", "pivoted"), ("llama", "factored"), ("mixtral", "pivoted"), ("mixtral", "shared")),
    ("gpt_oss", "pivoted"),
    *(("mamba", "factored"), ("falcon_mamba", "pivoted"), ("whisper", "pivoted")),
]
"""Model type and format; ``shared``: factored, with experts that share their projections."""


def sites_of(model_type: str, format_: str) -> dict[str, dict[str, Any]]:
    if format_ == "shared":
        shared = {"kind": "shared-experts", "ranks": {"gate_up": 20, "down": 13}}
        return {"model.layers.0.mlp.experts": {**shared, "format": "factored"}}
    return {name: {**how, "format": format_} for name, how in SITES[model_type].items()}


@pytest.fixture(scope="module")
def compressed_of(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``compressed_of("llama", "pivoted")``: a directory as a compression leaves it, with random factors."""
    made: dict[tuple[str, str], Path] = {}

    def make_one(model_type: str, format_: str) -> Path:
        if (model_type, format_) in made:
            return made[model_type, format_]
        folder = tmp_path_factory.mktemp("models") / f"{model_type}-{format_}"
        (architecture,) = registry().architectures_for(model_type)
        dense = folder.with_name("dense")
        if model_type == "llama":
            make_model(dense)  # with a tied table, a tokenizer, and grouped heads
        else:
            make_tiny_model(architecture, model_type, dense)
        model = getattr(transformers, architecture.auto_class).from_pretrained(dense)
        save_with_random_factors(model, sites_of(model_type, format_), folder)
        modality = modality_of(architecture)
        modality.save_processor(modality.load_processor(locate(str(dense)), None), folder)
        made[model_type, format_] = folder
        return folder

    return make_one


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Path, str], Path]:
    """``written(folder, "dense")``: what an exporter writes, before it is verified."""

    def write(folder: Path, to: str) -> Path:
        job = ExportJob(tmp_path / to, tmp_path / f"{to}-scratch", None, Progress("quiet"))
        job.folder.mkdir()
        job.scratch.mkdir()
        make("exporters", to).write(opened(folder), job)
        return job.folder

    return write


def opened(folder: Path) -> CompressedModel:
    return open_compressed(ExportRequest(str(folder), "dense", Path("nowhere")))


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval()(**inputs))


def transformers_load(folder: Path, of: str, **options: Any) -> Any:
    model, notes = getattr(transformers, of).from_pretrained(folder, output_loading_info=True, **options)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(("model_type", "format_"), CASES)
def test_standalone_is_the_model_itself(
    model_type: str,
    format_: str,
    compressed_of: Callable[[str, str], Path],
    written: Callable[[Path, str], Path],
    tmp_path: Path,
) -> None:
    folder = compressed_of(model_type, format_)
    model = opened(folder)
    out, of, inputs = written(folder, "standalone"), model.architecture.auto_class, model.inputs()
    found = transformers_load(out, of, trust_remote_code=True)
    expected = outputs(load(folder), inputs)
    torch.testing.assert_close(outputs(found, inputs), expected)
    # Names on disk are those of the modules: engines load by them.
    stored = set(load_file(out / "model.safetensors"))
    assert stored <= set(found.state_dict())
    assert set(found.state_dict()) - stored <= {"lm_head.weight", "proj_out.weight"}
    assert "lillama_core" not in (out / "modeling_lillama.py").read_text()
    again = tmp_path / "again"
    found.save_pretrained(again)
    torch.testing.assert_close(outputs(transformers_load(again, of, trust_remote_code=True), inputs), expected)
    base = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(outputs(base, inputs), outputs(load(folder).base_model, inputs))
    with pytest.raises(ValueError, match="trust_remote_code"):
        getattr(transformers, of).from_pretrained(out, trust_remote_code=False)
    given = {k: v[:1] for k, v in inputs.items() if k != "decoder_input_ids"}
    tokens = [found.generate(**given, max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False)]
    assert tokens[0].equal(tokens[1])
    assert tokens[0].equal(load(folder).generate(**given, max_new_tokens=5, do_sample=False))


def test_standalone_has_what_engines_ask_for(
    compressed_of: Callable[[str, str], Path], written: Callable[[Path, str], Path]
) -> None:
    out = written(compressed_of("llama", "pivoted"), "standalone")
    config = json.loads((out / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["model_type"] == "lillama_llama"
    assert "quantization_config" not in config
    found = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, attn_implementation="eager")
    assert found._supports_attention_backend
    assert found.config._attn_implementation == "eager"
    assert not found.tp_plan
    q = found.layers[0].self_attn.q_proj
    assert {type(child) for child in q.children()} == {nn.Linear}
    # Engines put layers of their own in the place of these, which have a weight and a call, and nothing else.
    for name, child in list(q.named_children()):
        setattr(q, name, Bare(child))
    ids = torch.arange(6)[None]
    torch.testing.assert_close(
        outputs(found, {"input_ids": ids}),
        outputs(transformers.AutoModel.from_pretrained(out, trust_remote_code=True), {"input_ids": ids}),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


class Bare(nn.Module):
    """A linear layer of some engine."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(("model_type", "format_"), CASES)
def test_dense_is_an_ordinary_directory(
    model_type: str, format_: str, compressed_of: Callable[[str, str], Path], written: Callable[[Path, str], Path]
) -> None:
    folder = compressed_of(model_type, format_)
    model, out = opened(folder), written(folder, "dense")
    found = transformers_load(out, model.architecture.auto_class)
    assert type(found).__module__.startswith("transformers.models")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    inputs = model.inputs()
    torch.testing.assert_close(outputs(found, inputs), outputs(load(folder), inputs), rtol=1e-3, atol=1e-4)
    # The same names and shapes as the dense model that was compressed.
    original = load_file(folder.with_name("dense") / "model.safetensors")
    stored = load_file(out / "model.safetensors")
    assert {k: t.shape for k, t in stored.items()} == {k: t.shape for k, t in original.items()}
    processor = "preprocessor_config.json" if model_type == "whisper" else "tokenizer.json"
    assert (out / processor).read_bytes() == (folder / processor).read_bytes()


def test_files_outside_of_the_model_do_not_come_along(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    hub, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    for folder in (hub, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    (blobs / "5f").write_text("{}")
    (hub / "tokenizer.json").symlink_to("../../blobs/5f")
    (hub / "added.json").symlink_to("tokenizer.json")
    copy_small_files(hub, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"tokenizer.json", "added.json"}
    (hub / "special.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"special\.json' is a link to a file outside of the model"):
        copy_small_files(hub, tmp_path / "out")


def test_products_are_those_of_the_stored_factors(
    compressed_of: Callable[[str, str], Path], written: Callable[[Path, str], Path]
) -> None:
    """By hand, in fp64, from the bytes on disk: what each layout means."""
    folder = compressed_of("llama", "pivoted")
    stored = {k: t.double().numpy() for k, t in load_file(folder / "model.safetensors").items()}
    dense = {k: t.double().numpy() for k, t in load_file(written(folder, "dense") / "model.safetensors").items()}

    def columns(name: str, width: int) -> Any:
        mix, order = stored[f"{name}.mix.weight"], stored[f"{name}.permutation"].astype(int)
        A = np.zeros((len(mix), width))
        A[:, order[: len(mix)]] = np.eye(len(mix))
        A[:, order[len(mix) :]] = mix
        return A

    name = "model.layers.0.self_attn.q_proj"
    np.testing.assert_allclose(dense[f"{name}.weight"], stored[f"{name}.weight"] @ columns(name, 32), atol=1e-5)
    name = "model.layers.0.mlp.down_proj"
    down, mix = stored[f"{name}.weight"], stored[f"{name}.mix.weight"]
    rows = np.concatenate((down, mix @ down))[stored[f"{name}.permutation"].astype(int)]
    np.testing.assert_allclose(dense[f"{name}.weight"], rows, atol=1e-5)
    name = "model.embed_tokens"
    table = dense[f"{name}.weight"]
    for token, place in enumerate(stored[f"{name}.positions"].astype(int)):
        band, start = next((i, a) for i, (a, b) in enumerate(band_bounds(*table.shape)) if a <= place < b)
        row = stored[f"{name}.weight" if band == 0 else f"{name}.rest.{band - 1}.weight"][place - start]
        whole = row if band == 0 else row @ columns(f"{name}.rest.{band - 1}.projection", 32)
        np.testing.assert_allclose(table[token], whole, atol=1e-5)


def test_command_line_and_python(
    compressed_of: Callable[[str, str], Path], run_cli: Callable[..., Ended], tmp_path: Path
) -> None:
    """Both formats of transformers, loaded by a process that has no lillama."""
    folder = compressed_of("llama", "factored")
    ended = run_cli("export", folder, "--to", "standalone", "-o", tmp_path / "a", "--dtype", "float16")
    assert ended.status == 0, ended
    assert re.search(r"logits after save_pretrained: difference \S+ \(allowed: 0.00\d+\)", ended.stdout)
    made = export(folder, tmp_path / "b", to="dense", dtype="float16", quiet=True)
    assert [a.what for a in made.agreements] == ["logits"]
    assert 0 < made.agreements[0].difference < made.agreements[0].allowed
    assert load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    card = (tmp_path / "b" / "README.md").read_text()
    assert "multiplied out" in card
    assert "| logits |" in card
    assert str(tmp_path) not in card
    said = json.loads((tmp_path / "b" / "lillama.json").read_text())["export"]
    assert said["to"] == "dense"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


class Wrong(DenseExporter):
    """Spoils a weight after it was written."""

    name = "wrong"

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        super().write(model, job)
        file = job.folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.gate_proj.weight"] *= -1
        save_file(tensors, file, metadata={"format": "pt"})


class Lacking(DenseExporter):
    """Needs what nobody has."""

    name = "lacking"
    needs = {"no_such_module": "pip install 'lillama[lacking]'"}  # noqa: RUF012


class Plugin:
    """Brings both."""

    @staticmethod
    @hookimpl
    def lillama_exporters() -> dict[str, Any]:
        return {"wrong": Wrong, "lacking": Lacking}


@pytest.fixture
def _more_exporters() -> Iterator[None]:
    registry().add(Plugin, "more", "more", "1")
    yield
    registry.cache_clear()


@pytest.mark.usefixtures("_more_exporters")
def test_a_result_that_differs_does_not_appear(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match="the export differs from the compressed model: logits by"):
        export(compressed_of("llama", "pivoted"), tmp_path / "out", to="wrong", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_more_exporters")
def test_mistakes_are_one_line(
    compressed_of: Callable[[str, str], Path], run_cli: Callable[..., Ended], tiny_model: Path, tmp_path: Path
) -> None:
    folder = compressed_of("mamba", "factored")

    def error(model: Path, to: str, output: str = "out", *options: str) -> str:
        found = run_cli("export", model, "--to", to, "-o", tmp_path / output, *options).error
        assert not (tmp_path / "out").exists()
        return found

    assert "is not a directory that 'lillama compress' has made" in error(tiny_model, "dense")
    assert "did you mean 'dense'?" in error(folder, "dence")
    (tmp_path / "there").mkdir()
    assert "exists; pass --overwrite to replace it" in error(folder, "dense", "there")
    refused = error(folder, "gguf")
    assert "format 'gguf' cannot hold this model: its model type is 'mamba'" in refused
    assert "dense, lacking, standalone, wrong can hold it" in refused
    assert "one by one" in error(folder, "onnx")
    assert "'llama'" in error(compressed_of("llama", "pivoted"), "ctranslate2")
    assert "format 'lacking' needs no_such_module: pip install 'lillama[lacking]'" in error(folder, "lacking")
    assert "--dtype of format 'onnx' must be one of float32, float16" in error(
        folder, "onnx", "out", "--dtype", "bfloat16"
    )
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text("{}")
    left = error(folder, "dense")
    assert "pass --overwrite to start anew" in left
    assert "--resume" not in left


def test_broken_weights_are_refused(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed_of("llama", "pivoted"), tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.mix.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LillamaError, match=r"lack model.layers.0.mlp.down_proj.mix.weight"):
        export(folder, tmp_path / "out", to="dense", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_python_mistakes(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = compressed_of("mamba", "factored")
    interface: Any = export
    with pytest.raises(UserError, match="dtype must be float32"):
        interface(folder, tmp_path / "out", to="dense", dtype="float23")
    with pytest.raises(UserError, match="has no option 'formt'"):
        interface(folder, tmp_path / "out", to="dense", formt="x")


def test_gguf(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Orders and names against the dense weights, by hand; transformers' own reader is the check of the export."""
    from gguf import GGUFReader

    folder = compressed_of("llama", "pivoted")
    made = export(folder, tmp_path / "out", to="gguf", quiet=True)
    assert made.agreements[0].difference < 1e-5
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    dense = {k: t.numpy() for part in opened(folder).dense_parts() for k, t in part.items()}
    assert "output.weight" not in found
    np.testing.assert_array_equal(found["token_embd.weight"], dense["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], dense["model.layers.1.mlp.up_proj.weight"])
    for ours, theirs, heads in (("q", "attn_q", 4), ("k", "attn_k", 2)):
        rows = dense[f"model.layers.0.self_attn.{ours}_proj.weight"]
        # Number i of a head and number i + 4, which transformers rotates together, are neighbours.
        order = [8 * head + i + 4 * half for head in range(heads) for i in range(4) for half in (0, 1)]
        np.testing.assert_array_equal(found[f"blk.0.{theirs}.weight"], rows[order])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "In 1957 the ship sailed, and it's not back."
    assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_ctranslate2(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    """CTranslate2 runs it; the reader of such directories gets the model back."""
    folder = compressed_of("whisper", "pivoted")
    made = export(folder, tmp_path / "out", to="ctranslate2", quiet=True)
    assert [a.what for a in made.agreements] == ["encoder states", "logits"]
    inputs = opened(folder).inputs()
    again = outputs(load(tmp_path / "out"), inputs)
    torch.testing.assert_close(again, outputs(load(folder), inputs), rtol=1e-3, atol=1e-4)


def test_onnx_with_a_cache(compressed_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Greedy text by ONNX Runtime, token by token, is that of transformers."""
    import onnxruntime

    folder = compressed_of("llama", "factored")
    made = export(folder, tmp_path / "out", to="onnx", quiet=True)
    assert [a.what for a in made.agreements] == ["logits", "logits by two steps with a cache"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    ids = np.array([[3, 50, 7, 200]])
    cache = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_")
    }
    written, new = ids, ids
    for _ in range(6):
        mask = np.ones_like(written)
        logits, *present = session.run(None, {"input_ids": new, "attention_mask": mask, **cache})
        cache = dict(zip(cache, present, strict=True))
        new = logits[:, -1:].argmax(-1)
        written = np.concatenate((written, new), axis=1)
    expected = load(folder).generate(torch.tensor(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written.tolist() == expected.tolist()
    # Paths of this machine stay here.
    assert b"site-packages" not in (tmp_path / "out" / "model.onnx").read_bytes()


def test_onnx_of_an_encoder_and_a_decoder(
    compressed_of: Callable[[str, str], Path], written: Callable[[Path, str], Path]
) -> None:
    import onnxruntime

    folder = compressed_of("whisper", "pivoted")
    out = written(folder, "onnx")
    encoder, decoder = (
        onnxruntime.InferenceSession(str(out / f"{part}_model.onnx")) for part in ("encoder", "decoder")
    )
    # Fewer rows and more tokens than the graphs were made with.
    sound = opened(folder).inputs()["input_features"][:1]
    ids = torch.arange(11)[None]
    (states,) = encoder.run(None, {"input_features": sound.numpy()})
    (logits,) = decoder.run(None, {"decoder_input_ids": ids.numpy(), "encoder_hidden_states": states})
    expected = outputs(load(folder), {"input_features": sound, "decoder_input_ids": ids})
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-3, atol=1e-4)


def test_memory_holds_one_block(compressed_of: Callable[[str, str], Path]) -> None:
    """Parts come one by one: what is not in the shell belongs to one block at a time."""
    model = opened(compressed_of("llama", "factored"))
    for part in (model.parts(), model.dense_parts()):
        homes = [{".".join(name.split(".")[:3]) for name in tensors if ".layers." in name} for tensors in part]
        assert homes == [set(), {"model.layers.0"}, {"model.layers.1"}]
    assert all(p.is_meta for p in model.shell.model.layers.parameters())
