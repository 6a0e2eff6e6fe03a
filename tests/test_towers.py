"""Models of several towers: two side by side, a vision tower before a language model, an encoder before a decoder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from lillama_core import Architecture, Recipe, UserError
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.data.modality import Inputs, Modality, SampleRequest, Samples, pack_on_call, packed_inputs
from lillama_core.data.objects import given_data
from lillama_core.models.loading import count_parameters, load_config
from lillama_core.models.outputs import main_output
from lillama_core.models.shards import BlockReader
from lillama_core.models.source import ModelSource, locate
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.states import rows_of
from lillama_testing.checks import run_check
from lillama_testing.tiny import MATERIALS, QUICK, TinyModel

IMAGE, PATCH, IMAGE_TOKEN, VOCABULARY = 16, 4, 5, 384
PATCHES = (IMAGE // PATCH) ** 2
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "hidden_size": 24, "intermediate_size": 48, "image_size": IMAGE, "patch_size": PATCH}
WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


class Pictures(Modality):
    """An image and some tokens a row, of which ``leading`` stand for the image; given as batches."""

    name = "pictures"

    def __init__(self, tokens: str = "input_ids", leading: int = 0) -> None:
        self.tokens, self.leading = tokens, leading

    def rows(self, count: int, seed: int) -> Inputs:
        """``count`` random rows."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(6, VOCABULARY, (count, self.leading + 8), generator=generator)
        ids[:, : self.leading] = IMAGE_TOKEN
        # Text towers are read where a text ends: without it at the first token, whose attention has nothing to learn.
        ids[:, -1] = WORDS["eos_token_id"]
        return {self.tokens: ids, "pixel_values": torch.rand(count, 3, IMAGE, IMAGE, generator=generator)}

    def dummy_inputs(self, config: Any) -> Inputs:
        return self.rows(2, 0)

    def check(self, recipe: Recipe) -> None:
        pass

    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        return None

    def save_processor(self, processor: Any, folder: Path) -> None:
        pass

    def load(self, request: SampleRequest) -> Samples:
        raise UserError("pictures are given as batches: data=")


class SideBySide(Architecture):
    """Two towers that meet in the output alone."""

    model_types = ("clip", "siglip")
    auto_class = "AutoModel"
    modality = Pictures()
    stacks: Mapping[str, str] = {"vision": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}


class VisionLanguage(Architecture):
    """A vision tower, a projector that stays dense, and a language model that reads what it says among the tokens."""

    model_types = ("llava",)
    auto_class = "AutoModelForImageTextToText"
    modality = Pictures(leading=PATCHES)
    stacks: Mapping[str, str] = {"vision": "model.vision_tower.encoder.layers", "text": "model.language_model.layers"}
    read_after: Mapping[str, str] = {"vision": "vision_feature_layer"}


class Captions(Architecture):
    """An image encoder, a projector, and a decoder that looks at what it says by cross-attention."""

    model_types = ("vision-encoder-decoder",)
    auto_class = "AutoModelForImageTextToText"
    modality = Pictures("decoder_input_ids")
    stacks: Mapping[str, str] = {"encoder": "encoder.layers", "decoder": "decoder.transformer.h"}


class Patches(Pictures):
    """Two images of 4 x 4 patches, and tokens of which four stand for each, a row: as many patches for every row."""

    def rows(self, count: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(6, VOCABULARY, (count, 16), generator=generator)
        ids[:, 4:8] = ids[:, 10:14] = IMAGE_TOKEN
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
            "pixel_values": torch.randn(count, 2 * 16, 3 * PATCH * PATCH, generator=generator),
            "image_grid_thw": torch.tensor([1, 4, 4]).repeat(count, 2, 1),
        }


class PatchesInOneRow(Architecture):
    """A vision tower that takes the patches of all images in one row, and a language model."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    auto_class = "AutoModelForImageTextToText"
    modality = Patches()
    stacks: Mapping[str, str] = {"vision": "model.visual.blocks", "text": "model.language_model.layers"}
    packed: Mapping[str, int] = {"pixel_values": 2, "image_grid_thw": 2}


class DeepStack(Architecture):
    """A language model to which what inner blocks of a vision tower say is added between its first blocks."""

    model_types = ("qwen3_vl",)
    auto_class = "AutoModelForImageTextToText"
    modality = Patches()
    stacks: Mapping[str, str] = {"text": "model.language_model.layers"}
    packed: Mapping[str, int] = {"pixel_values": 2, "image_grid_thw": 2}


class BesideText(VisionLanguage):
    """A language model whose tower takes more patches than there are tokens for an image."""

    model_types = ("gemma3",)
    modality = Pictures(leading=4)
    stacks: Mapping[str, str] = {"text": "model.language_model.layers"}
    read_after: Mapping[str, str] = {}


KINDS = (SideBySide, VisionLanguage, Captions, PatchesInOneRow, DeepStack, BesideText)
PLUGINS = {t: kind for kind in KINDS for t in kind.model_types}


def pair(model_type: str) -> Any:
    sizes = {**TEXT, **WORDS, "max_position_embeddings": 32}
    # One says the width of both outputs, the other that of its first tower in the second.
    sizes["projection_size"] = VISION["hidden_size"]
    return AutoConfig.for_model(model_type, text_config=sizes, vision_config=VISION, projection_dim=16)


def llava(_: str, read: Any = -2) -> Any:
    return AutoConfig.for_model(
        "llava", vision_config={**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3},
        text_config={**TEXT, **WORDS, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64},
        image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES, vision_feature_layer=read,
    )  # fmt: skip


def captions(_: str) -> Any:
    decoder = {**WORDS, "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
               "add_cross_attention": True, "is_decoder": True}  # fmt: skip
    ends = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 1}
    return AutoConfig.for_model(
        "vision-encoder-decoder", encoder={**VISION, "model_type": "vit"}, decoder=decoder, **ends
    )


def patches(model_type: str) -> Any:
    first = {"embed_dim": 24, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    second = {"hidden_size": 24, "out_hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 48,
              "fullatt_block_indexes": [1], "window_size": 2 * PATCH}  # fmt: skip
    shared = {"in_channels": 3, "patch_size": PATCH, "temporal_patch_size": 1, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, **WORDS, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_parameters": rope}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": 4, "vision_start_token_id": 2, "vision_end_token_id": 3}
    third = {"hidden_size": 24, "out_hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 48,
             "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    vision = {**{"qwen2_vl": first, "qwen2_5_vl": second, "qwen3_vl": third}[model_type], **shared}
    if model_type == "qwen3_vl":
        text |= {"head_dim": 8, "num_hidden_layers": 4}
    return AutoConfig.for_model(model_type, vision_config=vision, text_config=text, **ids)


def pooled(_: str) -> Any:
    text = {**TEXT, **WORDS, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    return AutoConfig.for_model(
        "gemma3", vision_config=VISION, text_config=text, image_token_id=IMAGE_TOKEN, mm_tokens_per_image=4
    )


CONFIGS: dict[str, Callable[[str], Any]] = {
    "clip": pair,
    "siglip": pair,
    "llava": llava,
    "vision-encoder-decoder": captions,
    "qwen2_vl": patches,
    "qwen2_5_vl": patches,
    "qwen3_vl": patches,
    "gemma3": pooled,
}


def model_of(config: Any) -> Any:
    """A random model, of biases and norms that matter."""
    torch.manual_seed(0)
    auto = getattr(transformers, PLUGINS[config.model_type].auto_class)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """``tiny("clip")``: such a model on disk with its plugin."""
    made: dict[str, TinyModel] = {}

    def make_one(model_type: str) -> TinyModel:
        if model_type not in made:
            folder = tmp_path_factory.mktemp("towers") / model_type
            model_of(CONFIGS[model_type](model_type)).save_pretrained(folder)
            made[model_type] = TinyModel(PLUGINS[model_type](), model_type, folder, ())
        return made[model_type]

    return make_one


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_is_a_declaration(kind: type[Architecture]) -> None:
    kind().check_declaration()
    assert len(inspect.getsource(kind).splitlines()) <= 30


@pytest.mark.parametrize("check", ["maps", "observing", "chain", "full-rank", "training"])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_conformance(model_type: str, check: str, tiny: Callable[[str], TinyModel]) -> None:
    assert run_check(check, tiny(model_type)).error is None


def outputs(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval()(**inputs))


@pytest.mark.parametrize(
    "model_type", ["clip", "llava", "vision-encoder-decoder", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_compress_load_save_again(model_type: str, tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    specimen, out = tiny(model_type), tmp_path / "out"
    modality = specimen.architecture.modality
    assert isinstance(modality, Pictures)
    recipe = Recipe(reduction=0.2, samples=32, batch_size=4, steps=2, sensitivity_tokens=64, compute="float32")
    data = given_data([modality.rows(8, seed) for seed in range(1, 5)])
    record = compress(Request(str(specimen.folder), out, recipe, specimen.architecture, data=data), "quiet")
    smaller = json.loads((out / "config.json").read_text())["quantization_config"]["sites"]
    for path in specimen.architecture.stacks.values():
        assert any(name.startswith(path) for name in smaller)

    load = getattr(transformers, specimen.architecture.auto_class).from_pretrained
    inputs, others = (packed_inputs(modality.rows(3, seed), specimen.architecture.packed) for seed in (9, 10))
    dense, found = load(specimen.folder), load(out)
    assert count_parameters(found) == record.parameters["parameters_after"]
    assert count_parameters(found) == pytest.approx(0.8 * count_parameters(dense), rel=0.02)
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again"), inputs), outputs(found, inputs))
    # Each tower says something in it still.
    assert outputs(found, inputs).isfinite().all()
    for name in (modality.tokens, "pixel_values"):
        value = others[name]
        assert not torch.allclose(outputs(found, {**inputs, name: value}), outputs(found, inputs))


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_a_language_model_inside_is_compressed_on_text_alone(
    model_type: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    specimen, out = tiny(model_type), tmp_path / "out"
    text = MATERIALS["text"]
    text.write(specimen.folder)
    recipe = Recipe(**{**QUICK, "tokens": 512}, reduction=0.1, calibration=text.calibration)
    record = compress(Request(str(specimen.folder), out, recipe), "quiet")
    assert record.architecture == "transformer"
    path = specimen.architecture.stacks["text"]
    smaller = json.loads((out / "config.json").read_text())["quantization_config"]["sites"]
    assert any(name.startswith(path) for name in smaller)
    assert not any("vis" in name or "project" in name for name in smaller)

    load = transformers.AutoModelForImageTextToText.from_pretrained
    dense, found = load(specimen.folder), load(out)
    assert type(found) is type(dense)
    left, kept = dense.state_dict(), found.state_dict()
    beside = [name for name in left if "vis" in name or "project" in name]
    assert len(beside) > 20
    assert all(torch.equal(left[name], kept[name]) for name in beside)

    modality = specimen.architecture.modality
    assert isinstance(modality, Pictures)
    first, other = (packed_inputs(modality.rows(3, seed), specimen.architecture.packed) for seed in (9, 10))
    words = {"input_ids": first["input_ids"][:, -8:]}
    for inputs in (words, first):
        assert outputs(found, inputs).isfinite().all()
        # Outputs that had nothing to do with each other would differ by 1.4 of their norm.
        assert (outputs(found, inputs) - outputs(dense, inputs)).norm() < 0.8 * outputs(dense, inputs).norm()
    # The tower says something in it still.
    assert not torch.allclose(outputs(found, {**first, "pixel_values": other["pixel_values"]}), outputs(found, first))


def test_what_is_added_between_blocks_is_recorded(tiny: Callable[[str], TinyModel]) -> None:
    specimen, modality = tiny("qwen3_vl"), Patches()
    model = specimen.load()
    inputs = packed_inputs(modality.rows(2, 1), DeepStack.packed)
    (blocks,) = find_blocks(specimen.architecture, model).values()
    harness = StackHarness(model, specimen.architecture, blocks)
    _, calls = harness.record(inputs)
    assert harness.adds_between
    # Two inner blocks of the tower are read: behind the first two of the four blocks, where pictures stand.
    with torch.no_grad():
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).deepstack_features
    pictures = inputs["input_ids"] == IMAGE_TOKEN
    for call, of_block in zip(calls[:2], seen, strict=True):
        assert call.added is not None
        expected = torch.cat(tuple(of_block)) if isinstance(of_block, tuple | list) else of_block
        assert torch.allclose(call.added[pictures], expected, atol=1e-5)
        assert not call.added[~pictures].any()
    assert [call.added for call in calls[2:]] == [None, None]
    _, words = StackHarness(model, specimen.architecture, blocks).record({"input_ids": inputs["input_ids"][:, :4]})
    assert all(call.added is None for call in words)


def test_a_tower_that_is_read_at_several_places_is_refused(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    class Both(DeepStack):
        stacks: Mapping[str, str] = {"vision": "model.visual.blocks", **DeepStack.stacks}

    recipe = Recipe(reduction=0.1, samples=16, batch_size=4, steps=0, sensitivity_tokens=64, compute="float32")
    first, second = (given_data([Patches().rows(8, seed) for seed in (1, 2)]) for _ in range(2))
    folder = str(tiny("qwen3_vl").folder)
    with pytest.raises(UserError, match="between its blocks, and not what the last block of 'vision' gives"):
        compress(Request(folder, tmp_path / "both", recipe, Both(), data=first), "quiet")
    chosen = Recipe.model_validate({**recipe.to_dict(), "stacks": ["text"]})
    compress(Request(folder, tmp_path / "text", chosen, Both(), data=second), "quiet")
    smaller = json.loads((tmp_path / "text" / "config.json").read_text())["quantization_config"]["sites"]
    assert all(name.startswith("model.language_model.") for name in smaller)


def test_what_is_packed_is_taken_as_data_and_as_the_model_has_it() -> None:
    specimen, modality = model_of(patches("qwen2_vl")), Patches()
    rows, packed = modality.rows(3, 1), PatchesInOneRow.packed
    as_model = packed_inputs(rows, packed)
    assert as_model["pixel_values"].shape == (3 * 2 * 16, 3 * PATCH * PATCH)
    assert as_model["image_grid_thw"].shape == (6, 3)
    assert as_model["input_ids"] is rows["input_ids"]
    expected = outputs(specimen, as_model)
    pack_on_call(specimen, packed)
    for given in (rows, as_model):
        assert torch.equal(outputs(specimen, given), expected)
    # Without images there is nothing to join.
    words = {"input_ids": torch.randint(6, VOCABULARY, (2, 9)), "pixel_values": None}
    assert outputs(specimen, words).shape[:2] == (2, 9)


def test_rows_of_a_stream_that_has_none_are_equal_parts_of_it() -> None:
    stream = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(rows_of(stream, slice(1, 3), 3), stream[2:])
    assert torch.equal(rows_of(stream, slice(1, 3), 6), stream[1:3])


@pytest.mark.parametrize("packed", [["pixel_values"], {"pixel_values": "2"}])
def test_what_is_packed_is_declared_with_its_dimensions(packed: Any) -> None:
    architecture = PatchesInOneRow()
    architecture.packed = packed
    with pytest.raises(TypeError, match=r"packed of architecture .* number of dimensions"):
        architecture.check_declaration()


@pytest.mark.parametrize(("read", "count"), [(-1, 3), (-2, 2), (1, 1), (3, 3)])
def test_a_tower_ends_at_the_block_that_is_read(read: int, count: int) -> None:
    model, architecture = model_of(llava("llava", read)), VisionLanguage()
    blocks = find_blocks(architecture, model)
    assert len(blocks["vision"]) == count
    # What its last block gives is all that reaches the outputs: so does a gradient, the same as by the model itself.
    inputs = Pictures(leading=PATCHES).rows(2, 3)
    expected: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        expected.append(output)

    handle = model.get_submodule(blocks["vision"][-1].path).register_forward_hook(keep)
    logits = model(**inputs).logits
    logits.square().sum().backward()
    handle.remove()
    model.requires_grad_(False)
    last = expected[0].detach().clone().requires_grad_(True)
    found = StackHarness(model, architecture, blocks["vision"]).outputs(inputs, last).logits
    torch.testing.assert_close(found, logits)
    found.square().sum().backward()
    torch.testing.assert_close(last.grad, expected[0].grad)


@pytest.mark.parametrize("read", [0, -4, 4, [-1, -2]])
def test_a_tower_that_is_read_elsewhere_is_refused(read: Any) -> None:
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(llava("llava", read))
    with pytest.raises(UserError, match=r"vision_feature_layer of the config is .*the 3 blocks of 'vision'"):
        find_blocks(VisionLanguage(), model, choice=MapChoice())


def test_a_place_for_a_stack_that_is_none_is_refused() -> None:
    architecture = VisionLanguage()
    architecture.read_after = {"visual": "vision_feature_layer"}
    with pytest.raises(TypeError, match=r"read_after of architecture .* its stacks are vision, text"):
        architecture.check_declaration()


def test_blocks_that_nobody_reads_are_read_from_disk_with_what_is_around_them(tiny: Callable[[str], TinyModel]) -> None:
    specimen = tiny("llava")
    source = locate(str(specimen.folder))
    reader = BlockReader.of(source, specimen.architecture, load_config(source))
    reader.load_shell()
    path = specimen.architecture.stacks["vision"]
    assert [p for p in reader.paths if p.startswith(path)] == [f"{path}.0", f"{path}.1"]
    dense = specimen.load().get_submodule(f"{path}.2").state_dict()
    shell = reader.model.get_submodule(f"{path}.2").state_dict()
    assert all(torch.equal(shell[name], dense[name]) for name in dense)
    assert reader.model.get_submodule(f"{path}.1").layer_norm1.weight.is_meta
