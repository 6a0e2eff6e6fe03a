"""``--architecture auto``: models that no plugin knows, found, compressed, loaded, compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import warm
from conftest import QUICK, Ended, environment, run_process
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from lillama_core.architecture.auto import discover, find_stacks
from lillama_core.architecture.blocks import find_blocks
from lillama_core.data.images.files import choose_images, read_pixels
from lillama_core.data.images.modality import Images
from lillama_core.data.modality import SampleRequest, Samples, modality_of
from lillama_core.data.text.encoder import EncoderDecoderText, EncoderText, with_special_ends
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Subject
from lillama_core.evaluation.fidelity import predictions_per_row
from lillama_core.evaluation.metrics import Perplexity
from lillama_core.evaluation.metrics.output_error import OutputError
from lillama_core.models.loading import count_parameters, load_model
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.models.source import locate
from lillama_core.recipe.model import Recipe
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.system.progress import Progress

VOCABULARY = 384
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TEXT_ENDS = {"vocab_size": VOCABULARY, **ENDS}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {
        **TEXT_ENDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 1, "relative_attention_num_buckets": 8,
    }),
    "bart": ("BartForConditionalGeneration", {
        **TEXT_ENDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
        "decoder_start_token_id": 1, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5,
        "forced_eos_token_id": None,
    }),
    "vit": ("ViTForImageClassification", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 16, "patch_size": 4, "num_labels": 5,
    }),
    "bert": ("BertForMaskedLM", {
        **TEXT_ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64,
    }),
    # Two rescalings: after the second block and after the fourth.
    "rwkv": ("RwkvForCausalLM", {
        **TEXT_ENDS, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
        "rescale_every": 2, "context_length": 64,
    }),
}  # fmt: skip
STACKS = {
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "bart": {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
    "vit": {"blocks": "vit.layers"},
    "bert": {"encoder": "bert.encoder.layer"},
    "rwkv": {"blocks": "rwkv.blocks"},
}


def tiny(model_type: str, **changes: Any) -> Any:
    name, settings = {**CLASSES, "roberta": ("RobertaForMaskedLM", CLASSES["bert"][1])}[model_type]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**settings, **changes})
    config.architectures = [name]
    return getattr(transformers, name)(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small pictures, in two folders and three formats."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        coarse = torch.rand(1, 3, 3, 4, generator=generator)
        pixels = nn.functional.interpolate(coarse, size=(18, 20), mode="bilinear")[0]
        image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
        # One without colours: it must become RGB.
        image = image.convert("L") if i == 3 else image
        image.save(folder / ("more" if i % 2 else ".") / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def dense(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """The tiny model of the type that the test names, with its tokenizer or image processor."""
    folder = tmp_path / "dense"
    tiny(request.param).save_pretrained(folder)
    if request.param == "vit":
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tiny_tokenizer.save_pretrained(folder)
    return folder


def data_options(model_type: str, calibration_text: Path, images: Path) -> list[str | Path]:
    if model_type == "vit":
        return ["--calibration", images, "--samples", "24", "--batch-size", "4", "--steps", "3"]
    return ["--calibration", calibration_text, *QUICK]


def inputs_of(config: Any) -> dict[str, torch.Tensor]:
    return modality_of(discover(config)).dummy_inputs(config)


@pytest.mark.parametrize("model_type", sorted(CLASSES))
def test_stacks_maps_and_chain(model_type: str) -> None:
    model = tiny(model_type)
    architecture = discover(model.config)
    architecture.adapt(model)
    assert dict(architecture.stacks) == STACKS[model_type]
    inputs = inputs_of(model.config)
    source = ResidentSource(model, torch.device("cpu"))
    for blocks in find_blocks(architecture, model).values():
        for block in blocks:
            linears = {n for n, m in model.get_submodule(block.path).named_modules() if isinstance(m, nn.Linear)}
            assert {m.name for m in block.maps} == linears
        parent = StackHarness(model, architecture, blocks)
        hidden, calls = parent.record(inputs)
        runner = BlockRunner(architecture, [calls], torch.device("cpu"), None)
        for block in blocks:
            hidden = runner(source.block(block), block, 0, hidden)
        with torch.no_grad():
            expected, found = main_output(model(**inputs)), main_output(parent.outputs(inputs, hidden))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(CLASSES))
def test_predictions_of_a_row_are_counted_as_losses_are_measured(model_type: str) -> None:
    model = tiny(model_type)
    architecture, inputs = discover(model.config), inputs_of(model.config)
    *earlier, last = find_blocks(architecture, model).values()
    harness = StackHarness(model, architecture, last, [StackHarness(model, architecture, of) for of in earlier])
    data = Samples(inputs)
    # An image has one label, a text one for each position of what is put out.
    positions = 1 if model_type == "vit" else main_output(model(**inputs)).shape[1]
    assert predictions_per_row(harness, data, None) == positions
    if model_type != "vit":
        mask = torch.ones(len(data), positions)
        mask[0, 1:] = 0
        masked = replace(data, output_mask=mask)
        assert predictions_per_row(harness, masked, None) == ((len(data) - 1) * positions + 1) / len(data)
    model.config.problem_type = "regression"
    assert predictions_per_row(harness, data, None) is None


@pytest.mark.parametrize("dense", sorted(CLASSES), indirect=True)
def test_compress_load_save_evaluate(
    dense: Path, tmp_path: Path, calibration_text: Path, images: Path, run_cli: Callable[..., Ended]
) -> None:
    config = transformers.AutoConfig.from_pretrained(dense)
    data = data_options(config.model_type, calibration_text, images)
    out = tmp_path / "out"
    ended = run_cli("compress", dense, "-o", out, "--architecture", "auto", "--reduction", "0.15", *data)
    assert ended.status == 0, ended
    for path in STACKS[config.model_type].values():
        assert f"at {path}, " in ended.stderr
    written = json.loads((out / "lillama.json").read_text())
    assert written["plan"]["ranks"]
    assert written["losses"]["unit"] == "nats a prediction"
    assert written["remarks"]
    assert written["remarks"][0] in ended.stderr
    assert any("calibration:" in line for line in written["remarks"])

    code = (
        "import sys, torch, transformers, lillama_core\n"
        "from lillama_core.models.outputs import main_output\n"
        "from lillama_core.data.modality import modality_of\n"
        "from lillama_core.architecture.auto import discover\n"
        "name, folder, again = sys.argv[1:]\n"
        "load = getattr(transformers, name).from_pretrained\n"
        "model = load(folder).eval()\n"
        "inputs = modality_of(discover(model.config)).dummy_inputs(model.config)\n"
        "model.save_pretrained(again)\n"
        "with torch.no_grad():\n"
        "    a, b = main_output(model(**inputs)), main_output(load(again).eval()(**inputs))\n"
        "assert torch.isfinite(a).all() and torch.equal(a, b)\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    name = CLASSES[config.model_type][0]
    done = warm.run(
        [sys.executable, "-c", code, name, str(out), str(tmp_path / "again")],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    original = count_parameters(tiny(config.model_type))
    assert int(done.stdout.split()[-1]) == pytest.approx(0.85 * original, rel=0.01)

    evaluation = ["--data", data[1], "--sequence-length", "32", "--windows", "4"]
    ended = run_cli("evaluate", out, "--baseline", dense, "--architecture", "auto", *evaluation)
    assert ended.status == 0, ended
    metric = "perplexity" if config.model_type == "rwkv" else "output_error"
    (row,) = [line for line in ended.stdout.splitlines() if line.startswith(f"{metric} ")]
    if metric == "output_error":
        assert row.split()[1] == "—"
        assert 0 < float(row.split()[2]) < 100


@pytest.mark.parametrize("dense", ["bert"], indirect=True)
def test_output_error_is_what_it_says(
    dense: Path, tmp_path: Path, calibration_text: Path, tiny_tokenizer: Any, run_cli: Callable[..., Ended]
) -> None:
    changed = tmp_path / "changed"
    models = [transformers.AutoModelForMaskedLM.from_pretrained(dense).eval() for _ in range(2)]
    with torch.no_grad():
        models[1].bert.encoder.layer[1].output.dense.weight *= 0.9
    models[1].save_pretrained(changed)
    tiny_tokenizer.save_pretrained(changed)
    numbers = tmp_path / "numbers.json"
    options = ["--architecture", "auto", "--data", calibration_text, "--sequence-length", "16", "--windows", "5"]
    ended = run_cli("evaluate", changed, "--baseline", dense, *options, "--json", numbers)
    assert ended.status == 0, ended
    (measured,) = [m for m in json.loads(numbers.read_text())[str(changed)] if m["name"] == "output_error"]
    tokens = tiny_tokenizer(calibration_text.read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(tokens[: 5 * 16]).view(5, 16)
    rows[:, 0] = 0
    with torch.no_grad():
        y0, y = (model(input_ids=rows).logits for model in models)
    assert measured["value"] == pytest.approx(100 * ((y - y0).norm() / y0.norm()).item(), rel=1e-4)
    assert measured["unit"] == "%"

    alone = run_cli("evaluate", changed, *options)
    assert alone.status == 0
    assert "--baseline" in alone.stderr
    assert "output_error" not in alone.stdout


def test_rwkv_without_rescaling_gives_the_same() -> None:
    plain, adapted = tiny("rwkv"), tiny("rwkv")
    discover(adapted.config).adapt(adapted)
    assert adapted.config.rescale_every == 0
    tokens = inputs_of(plain.config)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**tokens).logits, plain(**tokens).logits, rtol=1e-4, atol=1e-4)
    # The original has divided its weights by now; the adapted one must not.
    assert not torch.equal(plain.rwkv.blocks[4].attention.output.weight, adapted.rwkv.blocks[4].attention.output.weight)


def test_halves_of_rows() -> None:
    class StackOutputs:
        """Puts 7 after a text."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [20, 21, *([7] if add_special_tokens else [])]}

    rows = torch.arange(100, 116).view(2, 8)
    samples = EncoderDecoderText().rows(rows, tiny("t5"), StackOutputs())
    assert samples.inputs["input_ids"].tolist() == [[100, 101, 102, 7], [108, 109, 110, 7]]
    assert samples.inputs["decoder_input_ids"].tolist() == [[1, 104, 105, 106], [1, 112, 113, 114]]
    assert samples.targets is not None
    assert samples.targets.tolist() == [[104, 105, 106, 107], [112, 113, 114, 115]]
    with pytest.raises(UserError, match="no room"):
        with_special_ends(rows[:, :1], StackOutputs())


class _Two(nn.Module):
    def __init__(self, *lists: nn.ModuleList) -> None:
        super().__init__()
        self.config = CONFIG_MAPPING["bert"]()
        for i, modules in enumerate(lists):
            setattr(self, f"part{i}", modules)


def _blocks(n: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(n)])


def test_what_is_not_clear_is_not_guessed() -> None:
    with pytest.raises(UserError, match=r"2 lists of blocks.*part0 \(2 Sequential, 2 linear maps\); part1"):
        find_stacks(_Two(_blocks(2), _blocks(3)))
    with pytest.raises(UserError, match="no list of blocks"):
        find_stacks(_Two(nn.ModuleList([nn.ReLU()])))
    mixed = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.TransformerEncoderLayer(4, 2, 8)])
    with pytest.raises(UserError, match="1 Sequential and 1 TransformerEncoderLayer"):
        find_stacks(_Two(mixed))
    assert find_stacks(_Two(_blocks(2), nn.ModuleList([nn.ReLU()]))) == {"blocks": "part0"}


def save_class(folder: Path, name: str, model_type: str, tokenizer: Any, **changes: Any) -> Path:
    """A tiny random model of any class of transformers, with its tokenizer."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**CLASSES["bert"][1], **changes})
    config.architectures = [name]
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        # As it is initialised, the blocks add next to nothing to the embeddings.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "problem", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_scores_that_are_no_classes(
    problem: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    """The softmax of one score is 1 whatever the weights are: it says nothing of them."""
    dense = save_class(tmp_path / "dense", "BertForSequenceClassification", "bert", tiny_tokenizer, **problem)
    done = run_cli("compress", dense, "-o", tmp_path / "out", "--architecture", "auto", *QUICK, "--calibration",
                   calibration_text)  # fmt: skip
    assert done.status == 0, done
    record = json.loads((tmp_path / "out" / "lillama.json").read_text())
    assert record["losses"]["unit"] == "relative error of the outputs"
    assert record["fidelity"]["divergence"] is None
    assert record["fidelity"]["agreement"] is None
    assert 0 < record["fidelity"]["relative_error"] < 1
    ranks = record["plan"]["ranks"]
    # Where nothing matters every map that is not dense has rank 1.
    assert sum(rank > 1 for rank in ranks.values()) > len(ranks) / 2


def test_scores_of_pixels_are_no_classes() -> None:
    model = tiny("bert")
    pixels = transformers.modeling_outputs.SemanticSegmenterOutput(logits=torch.zeros(2, 7, 16, 16))
    assert class_logits(model, pixels) is None
    words = transformers.modeling_outputs.MaskedLMOutput(logits=torch.zeros(2, 16, 7))
    assert class_logits(model, words) is words.logits


def forget_class(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    del settings["architectures"]
    (folder / "config.json").write_text(json.dumps(settings))


def test_a_config_that_names_no_class(
    tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    """As in GGUF. What only ever writes text is loaded with its head; another head is not dropped in silence."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64, "n_positions": 64, "tie_word_embeddings": False}
    writer = save_class(tmp_path / "writer", "GPTBigCodeForCausalLM", "gpt_bigcode", tiny_tokenizer, **sizes)
    forget_class(writer)
    architecture = discover(AutoConfig.from_pretrained(writer))
    assert architecture.auto_class == "GPTBigCodeForCausalLM"
    loaded = load_model(locate(str(writer)), architecture, "auto")
    assert count_parameters(loaded) == sum(t.numel() for t in load_file(writer / "model.safetensors").values())

    other = save_class(tmp_path / "other", "BertForSequenceClassification", "bert", tiny_tokenizer, num_labels=3)
    forget_class(other)
    done = run_cli("compress", other, "-o", tmp_path / "out", "--architecture", "auto", *QUICK, "--calibration",
                   calibration_text)  # fmt: skip
    assert done.status == 2
    assert "2 weights that would be dropped, such as classifier.bias; its config names no class" in done.error


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
def test_a_result_without_a_head_is_given_one(
    format_name: str, tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    """The usual start of fine-tuning; and what is saved then loads again."""
    dense = save_class(tmp_path / "dense", "BertModel", "bert", tiny_tokenizer)
    out, again = tmp_path / "out", tmp_path / "again"
    done = run_cli("compress", dense, "-o", out, "--architecture", "auto", "--format", format_name, *QUICK,
                   "--calibration", calibration_text)  # fmt: skip
    assert done.status == 0, done
    base = transformers.BertModel.from_pretrained(out).eval()
    model = transformers.BertForSequenceClassification.from_pretrained(out, num_labels=3).eval()
    tokens = torch.arange(4, 14)[None]
    with torch.no_grad():
        expected = base(tokens).last_hidden_state
        torch.testing.assert_close(model.bert(tokens).last_hidden_state, expected)
        model.save_pretrained(again)
        reread = transformers.BertForSequenceClassification.from_pretrained(again).eval()
        torch.testing.assert_close(reread(tokens).logits, model(tokens).logits)
        body = transformers.BertModel.from_pretrained(again).eval()
        torch.testing.assert_close(body(tokens).last_hidden_state, expected)


def test_blocks_that_are_run_more_than_once(
    tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    dense = save_class(
        tmp_path / "dense", "AlbertForMaskedLM", "albert", tiny_tokenizer, embedding_size=16, num_hidden_layers=3
    )
    done = run_cli("compress", dense, "-o", tmp_path / "out", "--architecture", "auto", *QUICK, "--calibration",
                   calibration_text)  # fmt: skip
    assert "runs the 1 blocks of" in done.error
    assert "in the order 0, 0, 0; only models that run each block once" in done.error
    assert not list(tmp_path.glob("out*"))


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class StrangerConfig(PretrainedConfig):
    model_type = "stranger"

    def __init__(self, vocab_size=384, hidden_size=32, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.up(hidden_states).relu())


class StrangerForCausalLM(PreTrainedModel):
    config_class = StrangerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, calibration_text: Path) -> Path:
    """A folder with a dense model that comes with its code, ``dense``, and what a compression made of it, ``small``."""
    folder = tmp_path_factory.mktemp("stranger")
    dense = folder / "dense"
    dense.mkdir()
    (dense / "modeling_stranger.py").write_text(REMOTE)
    names = {"AutoConfig": "StrangerConfig", "AutoModelForCausalLM": "StrangerForCausalLM"}
    (dense / "config.json").write_text(json.dumps({
        "model_type": "stranger", "architectures": ["StrangerForCausalLM"],
        "auto_map": {auto: f"modeling_stranger.{name}" for auto, name in names.items()},
    }))  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(dense, trust_remote_code=True), trust_remote_code=True
    )
    safetensors.torch.save_file(model.state_dict(), dense / "model.safetensors", {"format": "pt"})
    tiny_tokenizer.save_pretrained(dense)
    done = trusting("compress", dense, "-o", folder / "small", *QUICK, "--calibration", calibration_text)
    assert done.status == 0, done
    return folder


def trusting(command: str, model: Path, *options: str | Path) -> Ended:
    """The command on a model that comes with its code, in a process of its own."""
    return run_process(command, model, "--architecture", "auto", "--trust-remote-code", *options)


def test_a_model_that_comes_with_its_code(stranger: Path) -> None:
    done = trusting(
        "evaluate", stranger / "small", "--baseline", stranger / "dense", "--windows", "2", "--sequence-length", "32"
    )
    assert done.status == 0, done
    assert "perplexity" in done.stdout


def test_training_a_model_that_comes_with_its_code(stranger: Path, calibration_text: Path, tmp_path: Path) -> None:
    done = trusting(
        "finetune", stranger / "small", "--teacher", stranger / "dense", "-o", tmp_path / "trained", "--data",
        calibration_text, "--self-share", "0", "--tokens", "1024", "--sequence-length", "32", "--batch-size", "4",
        "--epochs", "1", "--evaluations", "1",
    )  # fmt: skip
    assert done.status == 0, done
    assert "trust_remote_code=True" in (tmp_path / "trained" / "README.md").read_text()


def test_rounding_a_model_that_comes_with_its_code(stranger: Path, tmp_path: Path) -> None:
    for name in ("dense", "small"):
        done = trusting("quantize", stranger / name, "-o", tmp_path / name)
        assert done.status == 0, done
        assert "trust_remote_code=True" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("dense", "options", "message"),
    [
        ("bert", [], "name a text with --calibration FILE"),
        ("t5", ["--calibration", "self"], "name a text with --calibration FILE"),
        ("vit", [], "name a folder of them with --calibration DIR"),
        ("vit", ["--calibration", "absent"], "no folder of images 'absent'"),
        ("vit", ["--calibration", "{empty}"], "holds no image"),
        ("vit", ["--calibration", "{corrupt}", "--samples", "8"], "broken.png' is damaged or no image"),
        ("vit", ["--calibration", "{images}", "--samples", "100"], "hold 24 images, 100 asked for"),
        ("vit", ["--calibration", "{images}@2"], "take no weight"),
        ("vit", ["--calibration", "{images}", "--samples", "6"], "too few"),
    ],
    indirect=["dense"],
)
def test_mistakes(
    dense: Path, options: list[str], message: str, tmp_path: Path, images: Path, run_cli: Callable[..., Ended]
) -> None:
    import shutil

    (tmp_path / "empty").mkdir()
    shutil.copytree(images, tmp_path / "corrupt")
    for path in (tmp_path / "corrupt").glob("*"):
        path.rename(path.with_name(path.name)) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "corrupt" / "more")
    for i in range(7):
        shutil.copy(images / "0.png", tmp_path / "corrupt" / f"{i}.png")
    (tmp_path / "corrupt" / "broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    folders = {"empty": tmp_path / "empty", "corrupt": tmp_path / "corrupt", "images": images}
    given = [option.format(**folders) for option in options]
    ended = run_cli("compress", dense, "-o", tmp_path / "out", "--architecture", "auto", *given)
    assert message in ended.error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_another_size_than_the_config_says(
    dtype: torch.dtype, tmp_path: Path, images: Path, run_cli: Callable[..., Ended]
) -> None:
    """As with DINOv2's own checkpoints: positions for 518 pixels, a processor of 224, and a model that adapts them."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["dinov2"](**CLASSES["vit"][1] | {"image_size": 28, "mlp_ratio": 2})
    config.architectures = ["Dinov2Model"]
    transformers.Dinov2Model(config).to(dtype).save_pretrained(tmp_path / "dense")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "dense")
    done = run_cli("compress", tmp_path / "dense", "-o", tmp_path / "out", "--architecture", "auto", *QUICK,
                   "--calibration", images, "--samples", "16")  # fmt: skip
    assert done.status == 0, done
    assert "dinov2.encoder" in done.stderr or "encoder.layer" in done.stderr


def test_images_are_upright_and_named_once(images: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers.image_utils import load_image

    picture = Image.fromarray((torch.rand(12, 20, 3) * 255).byte().numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    theirs = processor(images=[load_image(str(tmp_path / "turned.png"))], return_tensors="pt")["pixel_values"]
    assert torch.equal(read_pixels([tmp_path / "turned.png"], processor), theirs)
    with pytest.raises(UserError, match="the same file: name each folder once"):
        choose_images((str(images), str(images / "more")), 4, 0, use_all=False)


def test_another_processor_makes_other_data_of_the_same_images(images: Path) -> None:
    from transformers import ViTImageProcessor

    recipe = Recipe(calibration=(str(images),), samples=4, batch_size=2)

    def load(**changes: Any) -> Samples:
        processor = ViTImageProcessor(size={"height": 16, "width": 16}, **changes)
        model = SimpleNamespace(config=SimpleNamespace(image_size=16))
        return Images().load(SampleRequest(recipe, model, processor, "", torch.device("cpu"), None, Progress("quiet")))

    first, again, other = load(), load(), load(image_mean=[0.4, 0.5, 0.5])
    assert first.sha256 == again.sha256 != other.sha256
    (described,) = first.description.values()
    assert described["rows"] == 4


def text_request(model: Any, tokenizer: Any, text: Path, length: int) -> SampleRequest:
    recipe = Recipe(calibration=(str(text),), tokens=4 * length, sequence_length=length, batch_size=2)
    return SampleRequest(recipe, model, tokenizer, "", torch.device("cpu"), None, Progress("quiet"))


@pytest.mark.parametrize(
    ("model_type", "modality", "longest"),
    # RoBERTa's 64 positions begin with one that nothing has and that of the padding token, 1.
    [("bert", EncoderText(), 64), ("roberta", EncoderText(), 62), ("bart", EncoderDecoderText(), 64)],
)
def test_rows_longer_than_the_model_knows(
    model_type: str, modality: EncoderText, longest: int, calibration_text: Path, tiny_tokenizer: Any
) -> None:
    model = tiny(model_type)
    samples = modality.load(text_request(model, tiny_tokenizer, calibration_text, longest))
    with torch.no_grad():
        assert torch.isfinite(main_output(model(**samples.inputs))).all()
    message = f"--sequence-length {longest + 1} is more than the {longest} positions"
    with pytest.raises(UserError, match=message):
        modality.load(text_request(model, tiny_tokenizer, calibration_text, longest + 1))
    # An evaluation makes do with what the model knows.
    rows = modality.evaluation(model, tiny_tokenizer, EvaluationOptions(sequence_length=longest + 1, windows=2))
    assert f"2 rows of {longest} tokens" in rows.what


def test_other_special_tokens_make_other_data_of_the_same_text(calibration_text: Path, tiny_tokenizer: Any) -> None:
    class StackOutputs:
        """The tokenizer with another token in front of a text, or behind it."""

        def __init__(self, before: list[int], after: list[int]) -> None:
            self.before, self.after = before, after

        def __call__(self, text: str, add_special_tokens: bool = True, **more: Any) -> dict[str, list[int]]:
            ids = tiny_tokenizer(text, add_special_tokens=False, **more)["input_ids"]
            return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

    def sha256(modality: EncoderText, *ends: list[int]) -> str:
        return modality.load(text_request(model, StackOutputs(*ends), calibration_text, 16)).sha256

    model = tiny("bert")
    first, again = (sha256(EncoderText(), [2], []) for _ in range(2))
    assert first == again
    assert len({first, sha256(EncoderText(), [3], []), sha256(EncoderText(), [2], [3])}) == 3
    model = tiny("bart")
    both = sha256(EncoderDecoderText(), [2], [])
    model.config.decoder_start_token_id = 5
    assert sha256(EncoderDecoderText(), [2], []) != both


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("bert", {"hidden_size": 16, "vocab_size": 400}), r"other gives outputs of shape .*400\], dense .*384\]"),
        (("bert", {"vocab_size": 10}), "other cannot take the inputs of dense"),
        (("vit", {}), "other cannot take the inputs of dense"),
    ],
)
def test_models_whose_outputs_cannot_be_compared(
    other: tuple[str, dict[str, int]], message: str, calibration_text: Path, tiny_tokenizer: Any
) -> None:
    metric = OutputError(EncoderText())
    options = EvaluationOptions(data=str(calibration_text), sequence_length=16, windows=2)
    dense = Subject("dense", tiny("bert"), tiny_tokenizer)
    assert metric.measure(dense, options, print) == []
    with pytest.raises(UserError, match=message) as caught:
        metric.measure(Subject("other", tiny(other[0], **other[1]), tiny_tokenizer, baseline=dense), options, print)
    assert "--baseline" in str(caught.value)


@pytest.mark.parametrize("data", ["self", "absent.txt"])
def test_an_evaluation_needs_a_text_that_is_there(data: str) -> None:
    for check in (EncoderText().check_evaluation, Perplexity().check):
        with pytest.raises(UserError, match=r"--data must be a text|absent\.txt"):
            check(EvaluationOptions(data=data))


@pytest.mark.parametrize("dense", ["bert"], indirect=True)
def test_offered_and_planned(dense: Path, run_cli: Callable[..., Ended]) -> None:
    assert "--architecture auto" in run_cli("plan", dense).error
    planned = run_cli("plan", dense, "--architecture", "auto")
    assert planned.status == 0
    assert "stack encoder at bert.encoder.layer, 2 blocks of BertLayer, 6 maps in a block" in planned.stdout
