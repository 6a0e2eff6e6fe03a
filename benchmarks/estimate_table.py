"""The table of docs/estimates.md: six published models on 1 and 8 GPUs of 80 GB, from their configs alone.

Run as ``python -m lillama_benchmarks.estimate_table``; prints Markdown. The configs are made here, with the sizes that
the models' authors publish, and each is what ``lillama plan CONFIG_DIR --machine a100-80gb`` is given.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # arXiv 2310.06825, table 1
    "Mistral-7B": (
        "mistral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
    # arXiv 2410.05355, section 2
    "Falcon-Mamba-7B": (
        "falcon_mamba",
        {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "num_hidden_layers": 64,
            "state_size": 16,
            "vocab_size": 65024,
            "tie_word_embeddings": False,
        },
    ),
    # arXiv 2404.14219, section 2: phi-3-medium
    "Phi-3-14B": (
        "phi3",
        {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "vocab_size": 32064,
        },
    ),
    # arXiv 2401.04088, table 1
    "Mixtral-8x7B": (
        "mixtral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
    ),
    # arXiv 2407.21783, table 3
    "Llama-70B": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    # arXiv 2212.04356, table 1; large-v3 has 128 mel bins
    "Whisper-large": (
        "whisper",
        {
            "d_model": 1280,
            "encoder_layers": 32,
            "decoder_layers": 32,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "vocab_size": 51866,
        },
    ),
}
MACHINES = ("a100-80gb", "8xa100-80gb")


def write_config(name: str, folder: Path) -> Path:
    """A directory with the config of a published model in bfloat16."""
    from transformers import CONFIG_MAPPING

    model_type, sizes = MODELS[name]
    target = folder / name
    CONFIG_MAPPING[model_type](dtype="bfloat16", **sizes).save_pretrained(str(target))
    return target


def rows() -> list[str]:
    """The table as lines of Markdown."""
    from lillama_core.estimates.sizes import show_seconds, show_size
    from lillama_core.pipeline.dry_run import dry_run
    from lillama_core.recipe.model import Recipe

    lines = [
        "| model | parameters | GPUs | held | a GPU's memory | host memory | disk | time | the most of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = write_config(name, Path(folder))
            for machine in MACHINES:
                # Text of the model's own needs all of it at once, which not all of these have room for.
                recipe = Recipe(calibration=["data.txt"], self_share=0.0)
                found = dry_run(str(path), recipe, machine=machine)
                e = found["estimate"]
                phases = {k: v for k, v in e["seconds"].items() if k not in ("total", "profile")}
                most = max(phases, key=lambda k: phases[k])
                host = max(e["peak_memory_bytes"], e["memory_bytes_while_checking"])
                held = "refused" if e["refused"] else e["residency"]
                lines.append(
                    f"| {name} | {found['parameters_before'] / 1e9:.3g} B | {8 if machine.startswith('8x') else 1}"
                    f" | {held} | {show_size(e['peak_device_memory_bytes'])} | {show_size(host)}"
                    f" | {show_size(e['disk_bytes'])} | {show_seconds(e['seconds']['total'])} | {most} |"
                )
                print(lines[-1], file=sys.stderr)
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
