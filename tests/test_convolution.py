"""Convolutions as linear maps of their patches, on request: alone, and in the blocks of a whole model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lillama_core import Architecture, LillamaError, Recipe, UserError
from lillama_core.architecture.targets.convolution import ConvolutionTarget, PatchLinear, convolution_targets
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.data.modality import Inputs, Modality, SampleRequest, Samples
from lillama_core.data.objects import given_data
from lillama_core.models.loading import count_parameters
from lillama_core.models.source import ModelSource
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.spec import check_choice
from lillama_core.strategies import get, make
from lillama_testing.checks import run_check
from lillama_testing.tiny import TinyModel

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pointwise": (nn.Conv1d(6, 10, 1), (2, 6, 7)),
    "pointwise of two axes": (nn.Conv2d(6, 4, 1, bias=False), (2, 6, 3, 5)),
    "stem": (nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 9)),
    "dilated": (nn.Conv1d(6, 5, 3, dilation=2, bias=False), (2, 6, 9)),
    "patches": (nn.Conv2d(3, 12, 4, stride=4), (2, 3, 8, 12)),
    "oblong": (nn.Conv2d(3, 7, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (2, 3, 8, 9)),
}


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def case(name: str) -> tuple[Block, ConvolutionTarget, torch.Tensor]:
    convolution, shape = CONVOLUTIONS[name]
    (target,) = convolution_targets(block := Block(convolution), ("inner",))
    assert isinstance(target, ConvolutionTarget)
    return block, target, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def full_rank(block: Block, target: ConvolutionTarget, format_name: str = "factored") -> dict[str, nn.Module]:
    (map_,) = target.maps
    U, S, Vt = torch.linalg.svd(target.weight(block, map_).detach(), full_matrices=False)
    bias = target.bias(block, map_)
    layer = make("formats", format_name).from_factors(U * S, Vt, None if bias is None else bias.detach().clone())
    return {"inner": layer}


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_full_rank_equals_the_convolution_forward_and_backward(name: str, format_name: str) -> None:
    block, target, x = case(name)
    low = copy.deepcopy(block)
    target.replace(low, full_rank(low, target, format_name))
    found = []
    for module in (block, low):
        y = x.clone().requires_grad_(True)
        out = module(y)
        out.square().sum().backward()
        found.append((out, y.grad))
    for expected, seen in zip(*found, strict=True):
        assert expected.shape == seen.shape
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)
    again = get("targets", target.kind).at("inner", low.inner)
    assert again.maps == target.maps
    dense = target.dense_tensors(low, Block(block.inner).to("meta"))
    assert dense.keys() == dict(block.named_parameters()).keys()
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(dense[key], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_rows_shown_explain_output_and_gradient(name: str) -> None:
    block, target, x = case(name)
    (map_,) = target.maps
    rows: list[torch.Tensor] = []
    outs: list[torch.Tensor] = []

    def on_output(_: Any, y: torch.Tensor) -> None:
        y.retain_grad()
        outs.append(y)

    with target.observe(block, lambda _, shown: rows.append(shown), on_output):
        out = block(x)
    torch.testing.assert_close(out, block(x))
    (shown,), (y,) = rows, outs
    assert shown.shape[-1] == map_.in_features
    assert y.shape[-1] == map_.out_features
    bias = target.bias(block, map_)
    torch.testing.assert_close(y, shown @ target.weight(block, map_).T + (0 if bias is None else bias))
    # torch's own backward pass through the convolution is the other way to the same numbers.
    out.square().sum().backward()
    assert y.grad is not None
    weight: Any = block.inner.weight
    torch.testing.assert_close(torch.einsum("nlo,nli->oi", y.grad, shown), weight.grad.flatten(1), rtol=1e-4, atol=1e-4)


def test_a_row_for_every_position_that_is_not_skipped() -> None:
    assert case("stem")[1].maps[0].token_fraction == 0.5
    assert case("patches")[1].maps[0].token_fraction == 1 / 16


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.each = nn.Conv1d(6, 6, 3, groups=6)
        self.same = nn.Conv1d(6, 6, 3, padding="same")
        self.round = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(6, 6, 2)


def test_convolutions_are_maps_on_request_alone() -> None:
    architecture = Architecture(stacks={"blocks": "0"})

    def names(choice: MapChoice) -> list[str]:
        return [m.name for target in architecture.targets(Mixed(), choice) for m in target.maps]

    assert names(MapChoice()) == ["fc"]
    everything = ("conv", "each", "same", "round", "up")
    assert names(MapChoice(include=everything)) == ["fc", "conv"]
    assert names(MapChoice(include=everything, exclude=("conv",))) == ["fc"]
    architecture.maps = ("conv", "fc")
    assert names(MapChoice()) == ["fc", "conv"]
    architecture.optional = ("conv",)
    assert names(MapChoice()) == ["fc"]
    with pytest.raises(LillamaError, match="'each' is a Conv1d, not a convolution of one group"):
        ConvolutionTarget.at("each", Mixed().each)


def test_a_convolution_that_is_no_map_is_an_error_that_names_those_that_are() -> None:
    model, architecture = nn.ModuleList([nn.ModuleList([Mixed()])]), Architecture(stacks={"blocks": "0"})
    check_choice(architecture, model, MapChoice(include=("conv",)))
    for name in ("each", "same", "up"):
        with pytest.raises(UserError, match=rf"'{name}' matches no linear map of a block.*there are: conv, fc"):
            check_choice(architecture, model, MapChoice(include=(name,)))


class Waves(Modality):
    """Sound as it is [rows, samples], given as batches."""

    name = "waves"

    def dummy_inputs(self, config: Any) -> Inputs:
        return {"input_values": torch.randn(2, 320, generator=torch.Generator().manual_seed(0))}

    def check(self, recipe: Recipe) -> None:
        pass

    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        return None

    def save_processor(self, processor: Any, folder: Path) -> None:
        pass

    def load(self, request: SampleRequest) -> Samples:
        raise UserError("waves are given as batches: data=")


class Conformer(Architecture):
    """Attention and convolutions by turns; those of a kernel of one position are most of the latter."""

    model_types = ("wav2vec2-conformer",)
    auto_class = "AutoModelForCTC"
    modality = Waves()
    stacks: Mapping[str, str] = {"encoder": "wav2vec2_conformer.encoder.layers"}
    optional = ("conv_module.pointwise_conv1", "conv_module.pointwise_conv2")


@pytest.fixture(scope="module")
def conformer(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=3, vocab_size=40, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Wav2Vec2ConformerForCTC(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("convolution") / "conformer"
    model.save_pretrained(folder)
    return TinyModel(Conformer(), "wav2vec2-conformer", folder, ())


@pytest.mark.parametrize("check", ["maps", "observing", "chain", "full-rank"])
def test_conformance(check: str, conformer: TinyModel) -> None:
    asked = Conformer()
    asked.maps = ("*.*", "*.*.*", *Conformer.optional)
    asked.optional = ()
    assert run_check(check, conformer).error is None
    assert run_check(check, TinyModel(asked, conformer.model_type, conformer.folder, ())).error is None


def test_compress_load_save_again(conformer: TinyModel, tmp_path: Path) -> None:
    out, names = tmp_path / "out", Conformer.optional
    recipe = Recipe(reduction=0.04, samples=32, batch_size=4, steps=2, sensitivity_tokens=64, compute="float32",
                    include=names, exclude=("ffn1.*", "ffn2.*", "self_attn.*"))  # fmt: skip
    data = given_data([{"input_values": torch.randn(32, 320, generator=torch.Generator().manual_seed(1))}])
    record = compress(Request(str(conformer.folder), out, recipe, conformer.architecture, data=data), "quiet")
    sites = json.loads((out / "config.json").read_text())["quantization_config"]["sites"]
    low = [path for path, entry in sites.items() if entry["kind"] == "convolution"]
    assert low

    load = transformers.AutoModelForCTC.from_pretrained
    found, dense = load(out).eval(), load(conformer.folder)
    assert count_parameters(found) == record.parameters["parameters_after"]
    assert isinstance(found.get_submodule(low[0]), PatchLinear)
    found.save_pretrained(tmp_path / "again")
    inputs = Waves().dummy_inputs(None)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again").eval()(**inputs).logits, found(**inputs).logits)
    target = ConvolutionTarget.at(low[0], found.get_submodule(low[0]))
    shape = dense.get_submodule(low[0]).weight.shape
    assert target.dense_tensors(found, dense)[f"{low[0]}.weight"].shape == shape
