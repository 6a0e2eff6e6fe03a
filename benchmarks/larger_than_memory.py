"""Compresses a made model that is larger than the memory it may use, reading it block by block.

    python benchmarks/larger_than_memory.py --gigabytes 12 --memory 3GB --work /somewhere/with/room
    python benchmarks/larger_than_memory.py --kind mixtral --width 1024 --intermediate 2048 --gigabytes 8

Writes a model of random weights, shard by shard, compresses it by the recipe `fast` with few tokens, and measures the
perplexity of both models, all in processes that are held to the limit by a cgroup where one can be made, and whose
anonymous memory is sampled in any case. The numbers go to WORK/larger-than-memory.json.

Random weights mean nothing: the perplexities are near the number of tokens in the vocabulary, and say only that the
result is read and run as what was written. What a compression costs in quality is measured in `figures.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from lillama_benchmarks.made_models import MadeModel, block_bytes, check_disk, disk_needed, make_model
from lillama_benchmarks.made_run import Run, start
from lillama_benchmarks.memory_sampling import MemoryLimit, Watched, folder_bytes, memory_limit

DATA = Path(__file__).parent / "data"
SIZES = {"llama": (1536, 6144), "mixtral": (1024, 2048)}
"""Width and intermediate size by default: decompositions grow with the cube of these, so a deep model is the cheap
way to a large file."""
EXPERTS = 8
HEAD = 128


def bytes_of(text: str) -> int:
    """``3GB`` or ``1.5GiB`` as bytes."""
    for unit, size in {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * size)
    raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 3GB")


def model_config(kind: str, width: int, intermediate: int, blocks: int) -> Any:
    """The config of a made model; heads of 128 features, one of keys and values for four of queries."""
    from transformers import LlamaConfig, MixtralConfig

    heads = max(1, width // HEAD)
    common = {
        "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "vocab_size": 384, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        return LlamaConfig(**common)
    return MixtralConfig(**common, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None)


def result_of(
    options: argparse.Namespace,
    made: MadeModel,
    seconds_to_make: float,
    record: dict[str, Any],
    limit: MemoryLimit,
    compressed: Watched,
    measured: Watched,
) -> dict[str, Any]:
    """All numbers, ready for JSON."""
    peak = max(compressed.peak, measured.peak)
    return {
        "kind": options.kind,
        "width": options.width,
        "intermediate": options.intermediate,
        "blocks": made.blocks,
        "model_bytes": made.bytes,
        "parameters": [record["parameters"]["parameters_before"], record["parameters"]["parameters_after"]],
        "compressed_bytes": record["bytes"]["compressed"],
        "tokens": options.tokens,
        "sequence_length": options.sequence_length,
        "limit_bytes": limit.bytes,
        "limit_enforced": limit.enforced,
        "limit_how": limit.how,
        "group_peak_bytes": limit.peak(),
        "peak_anonymous_bytes": peak,
        "within_limit": peak <= limit.bytes,
        "peak_anonymous_bytes_by_phase": {**compressed.peak_by_phase, **measured.peak_by_phase},
        "disk_peak_bytes": max(compressed.disk_peak, measured.disk_peak),
        "seconds": {
            "making the model": seconds_to_make,
            "compression, by phase": record["seconds"],
            "compression, with the start of its process": compressed.seconds,
            "perplexity of both": measured.seconds,
        },
        "perplexity": json.loads(measured.output),
        "perplexity_windows": options.windows,
        "estimate": record.get("estimate"),
        "versions": record["versions"],
        "machine": record["machine"],
        "meaning": "random weights: time, memory and disk are real, perplexities say nothing of quality",
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(SIZES), default="llama")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of the model's weights, 10^9 bytes each")
    parser.add_argument("--memory", type=bytes_of, default=bytes_of("3GB"), help="the limit, such as 3GB")
    parser.add_argument("--width", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--sensitivity-tokens", type=int, default=1024)
    parser.add_argument("--rescaling-tokens", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8, help="windows of that length for perplexity")
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-larger-than-memory")
    parser.add_argument("--keep", action="store_true", help="keep both models")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    width, intermediate = SIZES[options.kind]
    options.width, options.intermediate = options.width or width, options.intermediate or intermediate
    a_block, around = block_bytes(model_config(options.kind, options.width, options.intermediate, 1))
    blocks = max(2, math.ceil((options.gigabytes * 1e9 - around) / a_block))
    config = model_config(options.kind, options.width, options.intermediate, blocks)
    size = blocks * a_block + around
    print(f"A {options.kind} of {blocks} blocks of {a_block / 1e6:.0f} MB: {size / 1e9:.2f} GB", flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    dense, output = options.work / "dense", options.work / "compressed"
    for old in (dense, output, output.with_name("compressed.partial")):
        shutil.rmtree(old, ignore_errors=True)
    check_disk(options.work, disk_needed(config, options.reduction, options.tokens))
    started = time.monotonic()
    made = make_model(dense, config)
    seconds_to_make = round(time.monotonic() - started, 1)
    recipe = {
        "calibration": [str(DATA / "wikitext2-valid.txt")], "self_share": 0.0, "reduction": options.reduction,
        "tokens": options.tokens, "sequence_length": options.sequence_length,
        "sensitivity_tokens": options.sensitivity_tokens, "rescaling_tokens": options.rescaling_tokens,
    }  # fmt: skip
    run = Run(str(dense), str(output), recipe, True, options.device, str(DATA / "wikitext2-test.txt"), options.windows)
    with memory_limit(options.memory) as limit:
        print(f"Limit: {limit.bytes / 1e9:.2f} GB, {limit.how}", flush=True)
        compressed = start("compress", run, options.work, limit)
        measured = start("perplexity", run, options.work, limit)
        record = json.loads((output / "lillama.json").read_text(encoding="utf-8"))
        found = result_of(options, made, seconds_to_make, record, limit, compressed, measured)
    (options.work / "larger-than-memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    share = found["peak_anonymous_bytes"] / made.bytes
    print(f"Peak of anonymous memory: {found['peak_anonymous_bytes'] / 1e9:.2f} GB, {share:.2f} of the model's weights")
    if not options.keep:
        shutil.rmtree(dense)
        shutil.rmtree(output)
        print(f"Both models are removed; {folder_bytes(options.work) / 1e3:.0f} kB are left in {options.work}")
    return found


if __name__ == "__main__":
    main()
