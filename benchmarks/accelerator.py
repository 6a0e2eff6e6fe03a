"""Compresses models of real shapes where there is a GPU, held in memory and streamed; needs no network.

    python benchmarks/accelerator.py --device cuda --models mistral-7b --work /somewhere/with/room
    python benchmarks/accelerator.py --scale tiny          # every part, small, on the CPU

The models have the shapes of the published ones and random weights, which mean nothing: what is measured is seconds by
phase, peak memory of host and device, and speed of the dense and the compressed model in turns. Each has as many
layers as the published one, or --layers, or what the disk holds; speed and memory of a block do not depend on it. The
numbers go to WORK/accelerator.json after each part. At the tiny scale all runs in one process, to be quick: its memory
means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_benchmarks.made_models import MadeModel, disk_needed, make_model
from lillama_benchmarks.made_run import Run, start
from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.system.files import write_json

DATA = Path(__file__).parent / "data"
SPEECH = OFFLINE_TEXT.parent / "speech" / "synthetic" / "manifest.jsonl"
DISK_SHARE = 0.9
"""Of the free disk, what a model and its compression may take."""
FRAMES = 1500
"""Positions of Whisper's encoder for each sample of 30 s."""


@dataclass(frozen=True)
class Shape:
    """A published model by its sizes, and the same made tiny."""

    model_type: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    layers: tuple[str, ...] = ("num_hidden_layers",)
    """What the config calls its numbers of blocks."""
    is_speech: bool = False

    def config(self, scale: str, layers: int | None) -> Any:
        from transformers import CONFIG_MAPPING

        sizes = self.sizes | (self.tiny if scale == "tiny" else {})
        return CONFIG_MAPPING[self.model_type](**sizes | ({} if layers is None else dict.fromkeys(self.layers, layers)))

    def depth(self, scale: str) -> int:
        """Blocks of a stack of the published model, or of the tiny one."""
        return int(getattr(self.config(scale, None), self.layers[0]))


_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 384}
_TINY_ATTENTION = {
    **_TINY,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SHAPES = {
    # Config of mistralai/Mistral-7B-v0.3, but for rows of the vocabulary.
    "mistral-7b": Shape(
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None},
        _TINY_ATTENTION,
    ),
    # Config of mistralai/Mixtral-8x7B-v0.1.
    "mixtral-8x7b": Shape(
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8,
         "num_experts_per_tok": 2},
        {**_TINY_ATTENTION, "num_local_experts": 4},
    ),
    # Config of openai/whisper-large-v3.
    "whisper-large": Shape(
        "whisper",
        {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
         "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 128,
         "vocab_size": 51866, "max_source_positions": 1500, "max_target_positions": 448},
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 80,
         "vocab_size": 384, "max_source_positions": 500,
         **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)},
        ("encoder_layers", "decoder_layers"),
        True,
    ),
    # Config of tiiuae/falcon-mamba-7b.
    "falcon-mamba-7b": Shape(
        "falcon_mamba",
        {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 64, "state_size": 16, "expand": 2,
         "time_step_rank": 256, "conv_kernel": 4, "vocab_size": 65024, "tie_word_embeddings": False},
        {**_TINY, "intermediate_size": 128, "state_size": 4, "time_step_rank": 4},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is calibrated on, and measured."""

    recipe: dict[str, Any]
    prompt: int
    new_tokens: int
    repeats: int
    samples: dict[str, Any] = field(default_factory=dict)
    """Of the recipe for speech."""


SCALES = {
    "full": Scale(
        {"tokens": 8192, "sequence_length": 512, "sensitivity_tokens": 2048, "rescaling_tokens": 1024},
        prompt=512, new_tokens=64, repeats=5, samples={"samples": 16},
    ),
    "tiny": Scale(
        {"tokens": 512, "sequence_length": 32, "sensitivity_tokens": 128, "rescaling_tokens": 64},
        prompt=16, new_tokens=4, repeats=2, samples={"samples": 8, "batch_size": 4},
    ),
}  # fmt: skip


def layers_that_fit(shape: Shape, scale: str, work: Path, positions: int, reduction: float) -> int:
    """As many layers as published, or as the disk has room for; 0: not one."""
    free = DISK_SHARE * shutil.disk_usage(work).free
    one, two = (disk_needed(shape.config(scale, n), reduction, positions) for n in (1, 2))
    return max(0, min(shape.depth(scale), 1 + int((free - one) // (two - one))))


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make a model, compress it in both ways and time both models; give what is known so far after each part."""
    shape, scale = SHAPES[name], SCALES[options.scale]
    calibration = SPEECH if shape.is_speech else DATA / "wikitext2-valid.txt"
    recipe = {**scale.recipe, "calibration": [str(calibration)], "self_share": 0.0, "reduction": options.reduction}
    if options.tokens is not None:
        recipe["tokens"] = options.tokens
    if shape.is_speech:
        recipe |= scale.samples
    positions = FRAMES * recipe["samples"] if shape.is_speech else recipe["tokens"]
    fitting = layers_that_fit(shape, options.scale, options.work, positions, options.reduction)
    layers = options.layers or fitting
    if not 0 < layers <= fitting:
        yield {"model": name, "error": f"the disk has room for {fitting} layers of {name}"}
        return
    dense, output = options.work / f"{name}-dense", options.work / f"{name}-compressed"
    for old in (dense, output, output.with_name(f"{output.name}.partial")):
        shutil.rmtree(old, ignore_errors=True)
    print(f"{name}: {layers} of {shape.depth(options.scale)} layers", flush=True)
    started = time.monotonic()
    made = make_model(dense, shape.config(options.scale, layers))
    row = {
        "model": name,
        "layers": layers,
        "published_layers": shape.depth(options.scale),
        "model_bytes": made.bytes,
        "device": options.device,
        "seconds_to_make": round(time.monotonic() - started, 1),
    }
    for way in options.ways:
        run = Run(
            str(dense), str(output), recipe, way == "streamed", options.device,
            prompt=scale.prompt, new_tokens=scale.new_tokens, repeats=scale.repeats,
        )  # fmt: skip
        print(f"{name}, {way}", flush=True)
        row[way] = compression(run, made, here=options.scale == "tiny")
        yield row
    if (output / "lillama.json").is_file():
        print(f"{name}, speed", flush=True)
        found = start("speed", run, None, may_fail=True, here=options.scale == "tiny")
        row["speed"] = json.loads(found.output) if found.status == 0 else {"error": found.last_line}
        yield row
    if not options.keep:
        for used in (dense, output, output.with_name(f"{output.name}.partial")):
            shutil.rmtree(used, ignore_errors=True)


def compression(run: Run, made: MadeModel, here: bool) -> dict[str, Any]:
    """What one compression took; its error, when it failed, which is a result too: a model may not fit in memory."""
    partial = Path(run.output).with_name(f"{Path(run.output).name}.partial")
    found = start("compress", run, partial, may_fail=True, here=here)
    taken = {"wall_seconds": found.seconds, "peak_host_anonymous": found.peak, "peak_by_phase": found.peak_by_phase}
    if found.status != 0:
        return {**taken, "error": found.last_line or f"status {found.status}"}
    record = json.loads((Path(run.output) / "lillama.json").read_text(encoding="utf-8"))
    return {
        **taken,
        "seconds": record["seconds"],
        "peak_device": record["peak_device_memory_bytes"],
        "disk_peak": made.bytes + found.disk_peak,
        "parameters": [record["parameters"]["parameters_before"], record["parameters"]["parameters_after"]],
        "compressed_bytes": record["bytes"]["compressed"],
        # Not every version of a record has one.
        "estimate": record.get("estimate"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, as text; GB are 10^9 bytes."""
    lines = []
    for row in rows:
        if "error" in row:
            lines.append(f"{row['model']}: {row['error']}")
            continue
        lines.append(
            f"{row['model']}, {row['layers']} of {row['published_layers']} layers, {row['model_bytes'] / 1e9:.2f} GB"
        )
        for way in ("resident", "streamed"):
            if found := row.get(way):
                lines.append(f"  {way}: {_compression_line(found)}")
                if found.get("estimate"):
                    lines.append(f"    estimate: {json.dumps(found['estimate'])}")
        for what, times in row.get("speed", {}).items():
            lines.append(f"  {what}: {json.dumps(times)}")
    return "\n".join(lines)


def _compression_line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"failed after {found['wall_seconds']:.0f} s: {found['error']}"
    device = "" if found["peak_device"] is None else f", device {found['peak_device'] / 1e9:.2f} GB"
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items())
    return f"seconds: {phases}; peak: host {found['peak_host_anonymous'] / 1e9:.2f} GB{device}"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--ways", nargs="+", choices=("resident", "streamed"), default=["resident", "streamed"])
    parser.add_argument("--layers", type=int, help="of each stack; default: as published, or what the disk holds")
    parser.add_argument("--tokens", type=int, help="calibration tokens of models that read text")
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--device", help="cuda or cpu; default: cuda at full scale, cpu at tiny")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-accelerator")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.scale == "tiny" else "cuda")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.models:
        for row in measure(name, options):
            rows[name] = row
            # After each part: what was measured is there, whatever ends the program.
            write_json(options.work / "accelerator.json", list(rows.values()))
    print(table(list(rows.values())))
    return list(rows.values())


if __name__ == "__main__":
    main()
