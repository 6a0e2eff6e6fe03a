"""Which models of transformers that write text can be compressed without a plugin of their own.

    python benchmarks/coverage.py            # every model type; about an hour on one core
    python benchmarks/coverage.py olmo2 glm  # these anew, the others as they stand

makes a tiny random model of each model type, finds the blocks that text runs through, tries it by the conformance kit,
compresses and reloads it, and writes what came of it into ``plugins/transformer/coverage.py`` and ``docs/models.md``.
Towers for images or sounds stay dense. No checkpoint is read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import check_apart
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.cli.silence import silence_transformers
from lillama_core.data.text.modality import random_tokens
from lillama_core.errors import UserError, one_line
from lillama_core.models.transformers_adapter import writing_classes
from lillama_plugins.transformer import coverage as written
from lillama_plugins.transformer.declared import Declared
from lillama_registry import registry
from lillama_testing.checks import CHECKS, run_check
from lillama_testing.tiny import HEADS, SIZES, WIDTH, TinyModel, make_tiny_model, merged

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "plugins" / "transformer" / "coverage.py"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
SECONDS = 180.0
"""That one model type may take."""
MOST_LETTERS = 105
"""Of a reason."""
MOST_KINDS = 4
"""Of layers in one model."""

MORE_SIZES: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("index_topk", "linear_num_heads"), 4),
    **{"linear_head_dim": 8, "num_expert_group": 1},
    "num_experts_per_token": 2,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
}
"""Dimensions of some families, which their tiny models need beside the usual ones."""
TOWER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("embed_dim", "out_hidden_size", "output_dim", "projection_dim", "text_hidden_size"), WIDTH),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "adapter_output_size"), WIDTH),
    **dict.fromkeys(("depth", "layers"), 2),
    **{"image_size": 32, "patch_size": 8},
}
"""Those of what reads images and sounds."""
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
PARTS = {"rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]}}
"""Positions in time, height and width turn a part of each head."""
CODES = {"vocabulary_map": {"<image>": 300, "IMGIMGAAAAAZ": 301}, "vq_config": {"base_channels": 32}}
"""Images are tokens, which a network of its own makes."""
CONFORMER = {"hidden_dim": 32, "output_dim": 32}
START_OF_IMAGE = {"vision_start_token_id": 300}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), PARTS),
    **dict.fromkeys(("cosmos3_edge_text", "hunyuan_vl_text", "glm4v_text", "glm_ocr_text"), PARTS),
    **dict.fromkeys(("chameleon", "emu3"), CODES),
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], **PARTS},
    "glm4v_moe_text": {"rope_parameters": {**ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [0, 1, 1]}},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    **dict.fromkeys(("granite_speech_encoder", "granite_speech_plus_encoder"), CONFORMER),
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 64},
    "nemotron_h_omni": {
        **{"vision_hidden_size": 32, "projector_hidden_size": 64},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), START_OF_IMAGE),
    "janus": {"vq_config": {"base_channels": 32}},
    "mistral4": {"head_dim": 16},
    "mllama_text_model": {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROTARY, "full_attention": ROTARY},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        **{"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16},
        "per_layer_config": {},
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384,
    },
    "gemma4_unified_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "mamba_dt_rank": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **{"num_hidden_layers": 4, "layer_types": ["chunked_attention", "full_attention"] * 2},
        **{"no_rope_layers": [1, 0] * 2, "moe_layers": [1, 2], "intermediate_size_mlp": 64},
    },
    "longcat_flash": {"n_routed_experts": 4, "moe_topk": 3, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "ssm_state_size": 8},
        **{"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"], "moe_latent_size": 16},
        "moe_shared_expert_intermediate_size": 64,
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "hc_lowrank": 8},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlm": {"emb_dim": 32, "n_words": 384},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 8},
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""Model type -> what its config needs beside that."""

SEVERAL, MORE, AHEAD = "encoder-decoders", "more than text", "encoders"
NO_MODEL, BLOCKS, EXPERTS, KIT = "no tiny model", "blocks", "experts", "conformance kit"
TEXT_ALONE = "AutoModelForCausalLM"
"""The auto class of most models."""
CAUSES = {
    SEVERAL: "a decoder reads what an encoder says; a causal class, where there is one, is a part of the model",
    MORE: "the models do not run on text alone",
    AHEAD: "a token sees those that follow unless a config says otherwise",
    EXPERTS: "their experts are held in a layout that is not read; with `--architecture auto` they may stay dense",
    BLOCKS: "the blocks are not one list that runs once, one after the other",
    KIT: "a check of the conformance kit fails",
    NO_MODEL: "no tiny model could be made, so that nothing is known",
}
"""Why a model type is refused, and what that means."""


class Refused(Exception):  # noqa: N818  it is an answer
    """A model type cannot be claimed: the cause, one of `CAUSES`, and the reason in one line."""

    def __init__(self, cause: str, reason: object) -> None:
        # The reason in brackets of what the kit says when a tiny model cannot be made, or cannot be run.
        text = re.sub(r"^no tiny \S+ can be made \((.*)\); say the .*", r"\1", one_line(reason, None))
        text = re.sub(r"^the dense \S+ model cannot be run on .*? \((.*)\)$", r"it cannot be run: \1", text)
        text = re.sub(r"^model '[^']*' ", "its checkpoint ", text)
        super().__init__(cause, one_line(text.replace('"', "'").replace("\\", "/"), MOST_LETTERS))


# A tiny model of any type


def layers_of_each_kind(default: Any) -> dict[str, Any]:
    """Settings for two layers of each kind that the config ``default`` has; none when all layers are alike."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in default.to_dict().items()
        if isinstance(value, list) and len(value) == count and name not in SIZES
    }
    kinds = list({str(row): row for row in zip(*lists.values(), strict=True)}.values())[:MOST_KINDS]
    if len(kinds) < 2:
        return {}
    # Twice: layers of one kind may share something.
    columns = zip(lists, zip(*kinds, *kinds, strict=True), strict=True)
    return {"num_hidden_layers": 2 * len(kinds), **{name: list(column) for name, column in columns}}


def settings_of(model_type: str, default: Any) -> dict[str, Any]:
    """What makes a config of ``model_type`` a tiny one beside what the kit knows, and the configs in it."""
    known = default.to_dict()
    more = {name: size for name, size in MORE_SIZES.items() if isinstance(known.get(name), int)}
    if "kv_lora_rank" in known:
        more["num_key_value_heads"] = HEADS  # as many as there are queries, of which these models speak apart
    inner = {name: getattr(default, name, None) for name in default.sub_configs}
    for name, config in inner.items():
        if config is not None:
            tower = {} if "text" in name else TOWER_SIZES
            sizes = {n: size for n, size in tower.items() if isinstance(known[name].get(n), int)}
            more[name] = {**sizes, **settings_of(config.model_type, config)}
    return merged({**more, **layers_of_each_kind(default)}, CHANGES.get(model_type, {}))


def loaded_by(model_type: str) -> str:
    """The auto class that loads whole models of a type: with their towers, where they have any."""
    return next(name for name, types in writing_classes().items() if model_type in types)


def tiny_model(model_type: str, folder: Path) -> tuple[TinyModel, Any]:
    """The tiny model of a type in ``folder``, as the kit has it, and loaded."""
    from transformers import CONFIG_MAPPING

    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise Refused(NO_MODEL, error) from error
    if default.is_encoder_decoder:
        raise Refused(SEVERAL, writing_classes()[loaded_by(model_type)][model_type])
    if getattr(default.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        raise Refused(BLOCKS, "later blocks take the keys and values of earlier ones")
    if loaded_by(model_type) == TEXT_ALONE and any(n.startswith(("audio", "vision")) for n in default.sub_configs):
        raise Refused(MORE, f"{writing_classes()[TEXT_ALONE][model_type]} is a part of them")
    architecture = Declared(model_types=(model_type,), stacks={"decoder": ""})
    architecture.auto_class = loaded_by(model_type)
    try:
        architecture.tiny_config = settings_of(model_type, default)
        tiny = make_tiny_model(architecture, model_type, folder)
        return tiny, tiny.load()
    except Exception as error:
        alone = loaded_by(model_type) == TEXT_ALONE or "cannot be run" not in str(error)
        raise Refused(NO_MODEL if alone else MORE, error) from error


# Whether it works


def check_causal(model: nn.Module) -> None:
    """Refuse a model of which a token sees those that follow."""
    tokens = random_tokens(model.config)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 100 + 10
    with torch.no_grad():
        first, second = (model(input_ids=rows).logits[:, :-1] for rows in (tokens, other))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
        raise Refused(AHEAD, type(model).__name__)


def path_of_blocks(model: nn.Module) -> str:
    """The one outermost list of modules with linear maps of which a pass over text runs any."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if any(linear_targets(item) for item in module) and not any(isinstance(item, nn.Linear) for item in module):
            found[path] = module
    ran: dict[str, None] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda *_: ran.setdefault(path)

    handles = [item.register_forward_pre_hook(note(p)) for p, modules in found.items() for item in modules]
    with torch.no_grad():
        model(input_ids=random_tokens(model.config))
    for handle in handles:
        handle.remove()
    if len(ran) != 1:
        lists = f"{len(ran)} lists of blocks run: {', '.join(ran)}"
        raise Refused(BLOCKS, lists if ran else "no list of blocks has plain linear layers")
    return next(iter(ran))


def check_kit(tiny: TinyModel) -> None:
    """Refuse a model type with the first check of the kit that fails."""
    for name in CHECKS:
        error = run_check(name, tiny).error
        if error is None:
            continue
        if (unknown := re.search(r"the experts '(\S+)' are a (\w+), whose layout", error)) is not None:
            raise Refused(EXPERTS, f"{unknown[2]} at {unknown[1]}")
        raise Refused(BLOCKS if "in the order" in error else KIT, f"{name}: {error}")


def try_type(model_type: str) -> str:
    """The path of the decoder's blocks of a model type that works; raise Refused for one that does not."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny, model = tiny_model(model_type, Path(scratch))
        check_causal(model)
        path = path_of_blocks(model)
        if getattr(model.config, "rescale_every", 0):
            raise Refused(BLOCKS, "rescale_every has to be 0, which --architecture auto sees to")
        tiny.architecture.stacks = {"decoder": path}
        try:
            check_apart(tiny.architecture, model)
        except UserError as error:
            raise Refused(BLOCKS, error) from error
        check_kit(tiny)
    return path


def _answer(model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    with silence_transformers():
        try:
            pipe.send(try_type(model_type))
        except Refused as refused:
            pipe.send(refused.args)
        except Exception as error:  # whatever a model's own code raises
            pipe.send(Refused(KIT, f"{type(error).__name__}: {error}").args)


def tried(model_type: str) -> str | tuple[str, str]:
    """The path of the blocks, or cause and reason, found in a process of its own and within `SECONDS`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(model_type, there))
    process.start()
    there.close()
    try:
        found: Any = here.recv() if here.poll(SECONDS) else (NO_MODEL, f"it took more than {SECONDS:g} s")
    except EOFError:
        found = (NO_MODEL, "its process died")
    process.kill()
    process.join()
    return found if isinstance(found, str) else (str(found[0]), str(found[1]))


# What is written


def shown(name: str, cause: str, reason: str) -> str:
    """Return an entry of the table of what is refused, as ruff formats it."""
    line = f'    "{name}": ("{cause}", "{reason}"),'
    return line if len(line) <= 120 else f'    "{name}": (\n        "{cause}",\n        "{reason}",\n    ),'


Refusals = Mapping[str, tuple[str, str]]


def write_table(
    version: str, works: Mapping[str, str], loaders: Mapping[str, str], refused: Refusals, named: int
) -> None:
    """Write the module of the plugin; ``named`` are the model types that plugins name."""
    lines = [
        '"""Generated by ``python benchmarks/coverage.py``, which says how each line was found: do not edit."""',
        "",
        f'TRANSFORMERS = "{version}"',
        '"""The version whose model types these are."""',
        f"NAMED = {named}",
        '"""How many model types of it a plugin names."""',
        "WORKS: dict[str, str] = {",
        *(f'    "{name}": "{path}",' for name, path in sorted(works.items())),
        "}",
        '"""Model type -> where the blocks of its decoder are."""',
        "LOADED_BY: dict[str, str] = {",
        *(f'    "{name}": "{loader}",' for name, loader in sorted(loaders.items())),
        "}",
        f'"""Those that read more than text -> the auto class that loads them whole; {TEXT_ALONE} loads the others."""',
        "REFUSED: dict[str, tuple[str, str]] = {",
        *(shown(name, *why) for name, why in sorted(refused.items())),
        "}",
        '"""Model type -> cause and reason."""',
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def section(version: str, works: Mapping[str, str], loaders: Mapping[str, str], refused: Refusals, named: int) -> str:
    """Return the part of the page that says what works: the two tables, and how many there are of each."""
    total = len(works) + len(refused) + named
    places: dict[tuple[str, str], list[str]] = {}
    for name, path in sorted(works.items()):
        places.setdefault((loaders.get(name, TEXT_ALONE), path), []).append(f"`{name}`")
    ordered = sorted(places.items(), key=lambda item: (item[0][0] != TEXT_ALONE, item[0][0], -len(item[1])))
    rows = [f"| `{path}` | `{loader}` | {', '.join(names)} |" for (loader, path), names in ordered]
    reasons = []
    for cause, meaning in CAUSES.items():
        # A class of transformers says nothing that the cause does not.
        bare = cause in (SEVERAL, AHEAD)
        found = [(name, why) for name, (own, why) in sorted(refused.items()) if own == cause]
        if found:
            names = [f"`{name}`" if bare else f"`{name}` ({_plain(why)})" for name, why in found]
            reasons.append(f"| {cause}: {meaning} | {', '.join(names) if bare else '; '.join(names)} |")
    counted = (
        f"Of the {total} model types that transformers {version} lists as models that write text, whatever else they"
        f" read, {named} are named by a plugin, {len(works)} work by this table ({len(loaders)} of them are listed as"
        f" reading images or sounds as well), and {len(refused)} are refused."
    )
    return "\n".join([
        *textwrap.wrap(counted, 128), "",
        "| blocks at | loaded by | model types |", "|---|---|---|", *rows, "",
        "| refused | model types |", "|---|---|", *reasons,
    ])  # fmt: skip


def _plain(reason: str) -> str:
    """Return ``reason`` so that it can stand in a cell."""
    return re.sub(r"([|<>*_\[\]`])", r"\\\1", reason)


def write_page(text: str) -> None:
    """Put ``text`` between the marks on the page."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def known_types() -> set[str]:
    """The model types that transformers lists as models that write text."""
    return set().union(*writing_classes().values())


def named_by_plugins() -> set[str]:
    """Those of them that a plugin names."""
    return {t for a in registry().architectures if not a.fallback for t in a.model_types} & known_types()


def main() -> None:
    """Try the model types that the command names, or all, and write what came of it."""
    import transformers

    parser = argparse.ArgumentParser(description="Try every model of transformers that writes text.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types to try anew (default: all)")
    known = sorted(known_types())
    chosen = parser.parse_args().types or known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"transformers {transformers.__version__} knows no such model that writes text: {unknown}")
    whole = set(chosen) == set(known)
    works = {} if whole else {t: path for t, path in written.WORKS.items() if t not in chosen}
    refused = {} if whole else {t: why for t, why in written.REFUSED.items() if t not in chosen}
    for model_type in chosen:
        if model_type in named_by_plugins():
            continue
        start = time.monotonic()
        found = tried(model_type)
        if isinstance(found, str):
            works[model_type] = found
        else:
            refused[model_type] = found
        print(f"{model_type:28} {time.monotonic() - start:5.1f} s  {found}", flush=True)
    loaders = {t: loader for t in works if (loader := loaded_by(t)) != TEXT_ALONE}
    table = (transformers.__version__, works, loaders, refused, len(named_by_plugins()))
    write_table(*table)
    write_page(section(*table))
    print(f"{len(works)} work, {len(refused)} are refused")


if __name__ == "__main__":
    main()
