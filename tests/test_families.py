"""Every family of the built-in plugin: its maps are found, its blocks chain, and it survives compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lillama_core import Recipe
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.models.loading import count_parameters
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import ResidentSource

SMALL = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 56, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 8},
    "phi": {**SMALL, "intermediate_size": 56, "max_position_embeddings": 128},
    "phi3": {**GATED, "pad_token_id": 0},
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 8},
    "gemma": {**GATED, "head_dim": 8},
    "gemma2": {**GATED, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**GATED, "head_dim": 8, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {**GATED, "pad_token_id": 0},
    "stablelm": GATED,
    "opt": {
        "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56,
        "word_embed_proj_dim": 32, "max_position_embeddings": 128,
    },
    "gpt2": {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**SMALL, "intermediate_size": 56, "max_position_embeddings": 128},
}  # fmt: skip
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def tiny(model_type: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], **ENDS)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def linear_weights(module: nn.Module) -> set[str]:
    """Every two-dimensional weight below ``module``: what a map list must not miss."""
    return {name.removesuffix(".weight") for name, p in module.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_all_linear_weights_of_the_blocks_are_found(model_type: str) -> None:
    model = tiny(model_type)
    for block in find_blocks(find_architecture(model.config), model)["decoder"]:
        module = model.get_submodule(block.path)
        assert {m.name for m in block.maps} == linear_weights(module)
        for target in block.targets:
            x = torch.randn(3, target.maps[0].in_features)
            y = module.get_submodule(target.name)(x)
            bias = target.bias(module, target.maps[0])
            expected = x @ target.weight(module, target.maps[0]).T + (0 if bias is None else bias)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_chained_blocks_equal_the_whole_forward(model_type: str) -> None:
    model = tiny(model_type)
    architecture = find_architecture(model.config)
    blocks = find_blocks(architecture, model)["decoder"]
    parent, source = StackHarness(model, architecture, blocks), ResidentSource(model, torch.device("cpu"))
    inputs = {"input_ids": torch.randint(3, 160, (2, 20))}
    hidden, calls = parent.record(inputs)
    runner = BlockRunner(architecture, [calls], torch.device("cpu"), None)
    for block in blocks:
        hidden = runner(source.block(block), block, 0, hidden)
    torch.testing.assert_close(parent.outputs(inputs, hidden).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


# One for each way of holding a weight: separate, fused, transposed with bias, and each path to the blocks.
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("format_name", ["pivoted", "factored"])
def test_compress_load_generate_save_again(
    model_type: str, format_name: str, tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(model_type)
    model.resize_token_embeddings(len(tiny_tokenizer))
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    tiny_tokenizer.save_pretrained(dense)
    recipe = Recipe(
        reduction=0.2, stacks=("decoder",), tokens=512, sequence_length=32, batch_size=4, sensitivity_tokens=128,
        steps=2, format=format_name, calibration=(str(calibration_text),), self_share=0.0, compute="float32",
    )  # fmt: skip
    out = tmp_path / "out"
    record = compress(Request(str(dense), out, recipe), "quiet")

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert count_parameters(loaded) == record.parameters["parameters_after"]
    blocks = model.get_submodule(next(iter(find_architecture(model.config).stacks.values())))
    wanted = 0.2 * count_parameters(blocks)
    assert record.parameters["parameters_before"] - count_parameters(loaded) == pytest.approx(wanted, rel=0.1)
    plan = json.loads((out / "lillama.json").read_text())["plan"]
    ranks = plan["ranks"]
    assert ranks or plan["channels"]
    for name, rank in ranks.items():
        assert 1 <= rank < min(record.shapes[name])

    tokens = torch.randint(3, len(tiny_tokenizer), (2, 10))
    generated = loaded.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 10
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight or not (
        model.config.tie_word_embeddings
    )
