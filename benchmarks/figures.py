"""Measures the figures of the README on this machine and writes them to benchmarks/results/figures.json.

    python benchmarks/figures.py --model .venv/smollm2.gguf [--only quality speed initialization] [--recipes fast]

- quality: each recipe by the command line at 20 %, calibrated on WikiText-2's validation split and the model's own
  text; wall-clock time and peak memory of that process; perplexity in fp32 on the first 40 windows of 512 tokens of
  WikiText-2's test split and the first 24 of fiction that no recipe saw.
- speed: the blocks alone on a prompt of 512 tokens, compressed against dense in one process, beside what the
  multiply-adds promise.
- initialization: Gram matrices, decompositions, pivoting and replacement, against one forward pass of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lillama_core import Recipe
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import Samples
from lillama_core.data.sources import Source
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.evaluation.metrics.perplexity import perplexity
from lillama_core.models.loading import load_config, load_model, load_tokenizer
from lillama_core.models.source import locate
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.dense_pass import decompose_blocks
from lillama_core.statistics.sensitivity import measure_sensitivity
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import make
from lillama_core.system.devices import choose_autocast
from lillama_core.system.progress import Progress

HERE = Path(__file__).parent
DATA = HERE / "data"
TEXTS = {"wikitext2-test": 40, "tales-grimm": 24}
CPU = torch.device("cpu")


def load(spec: str, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any, Any]:
    """(model, tokenizer, architecture) of a dense or compressed model."""
    source = locate(spec)
    architecture = find_architecture(load_config(source, allow_compressed=True))
    return load_model(source, architecture, dtype), load_tokenizer(source), architecture


def text_perplexities(spec: str) -> dict[str, float]:
    model, tokenizer, _ = load(spec)
    found = {}
    for name, windows in TEXTS.items():
        rows = load_text_windows(Source.parse(str(DATA / f"{name}.txt")), tokenizer, 512, windows)
        found[name] = round(perplexity(model, rows, CPU)[0], 2)
    return found


def quality(model: str, recipe: str, folder: Path, extra: list[str]) -> dict[str, Any]:
    """Compress by the command line and measure the result."""
    output = folder / recipe
    command = [
        sys.executable, "-P", "-m", "lillama_core", "compress", model, "--output", str(output), "--reduction", "0.2",
        "--recipe", recipe, "--calibration", str(DATA / "wikitext2-valid.txt"), "--overwrite", *extra,
    ]  # fmt: skip
    started = time.monotonic()
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.monotonic() - started
    record = json.loads((output / "lillama.json").read_text())
    return {
        "recipe": recipe,
        "options": extra,
        "seconds": round(seconds, 1),
        "seconds_of_sampling": record["seconds"]["calibration data"],
        "seconds_of_ranks": record["seconds"]["ranks"],
        "peak_resident_mb": round(peak / 1e6),
        "parameters": [record["parameters"]["parameters_before"], record["parameters"]["parameters_after"]],
        "bytes": record["bytes"],
        "perplexity": text_perplexities(str(output)),
    }


def median_seconds(call: Any, runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def speed(model_spec: str, compressed: dict[str, str]) -> dict[str, Any]:
    """Seconds of all blocks on 512 tokens, the models in turn so that a drift of the machine hits all of them."""
    models = {name: load(spec) for name, spec in {"dense": model_spec, **compressed}.items()}
    tokens = torch.randint(0, 49152, (1, 512), generator=torch.Generator().manual_seed(0))
    chains, multiply_adds = {}, {}
    for name, (model, _, architecture) in models.items():
        blocks = find_dense_blocks(architecture, model)
        parent = StackHarness(model, architecture, blocks)
        hidden, calls = parent.record({"input_ids": tokens})
        runner = BlockRunner(architecture, [calls], CPU, None)
        modules = [model.get_submodule(block.path) for block in blocks]

        def chain(modules: Any = modules, blocks: Any = blocks, hidden: Any = hidden, runner: Any = runner) -> None:
            with torch.no_grad():
                h = hidden
                for block, module in zip(blocks, modules, strict=True):
                    h = runner(module, block, 0, h)

        chains[name] = chain
        # The maps, and attention's scores and sums over the tokens before: half of length x width each, twice.
        attention = len(blocks) * 512 * model.config.hidden_size
        multiply_adds[name] = attention + sum(p.numel() for m in modules for p in m.parameters() if p.dim() == 2)
    times: dict[str, list[float]] = {name: [] for name in chains}
    for round_ in range(13):
        for name, chain in chains.items():
            started = time.perf_counter()
            chain()
            if round_ >= 2:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "milliseconds": round(1000 * medians[name], 1),
            "speed_up": round(statistics.median(d / t for d, t in zip(times["dense"], times[name], strict=True)), 3),
            "promised_by_multiply_adds": round(multiply_adds["dense"] / multiply_adds[name], 3),
        }
        for name in chains
    }


def find_dense_blocks(architecture: Any, model: Any) -> Any:
    """The blocks of a model, by position alone: in a compressed one, low-rank modules hide some of the sites."""
    return find_blocks(architecture, model)["decoder"]


def initialization(model_spec: str, tokens: int) -> dict[str, Any]:
    """What the statistics and closed forms cost beyond the forward passes that they need."""
    autocast = choose_autocast("auto", CPU)
    model, tokenizer, architecture = load(model_spec)
    blocks = find_blocks(architecture, model)["decoder"]
    source = ResidentSource(model, CPU)
    rows = load_text_windows(Source.parse(str(DATA / "wikitext2-valid.txt")), tokenizer, 512, tokens // 512)
    harness = StackHarness(model, architecture, blocks)
    recorder = Recorder(architecture, CPU, autocast)
    activations = ActivationStore(recorder, [Samples({"input_ids": r}) for r in rows.split(4)]).record(harness)

    def forward() -> None:
        current = activations.fork()
        for block in blocks:
            current.advance(source.block(block), block)

    with tempfile.TemporaryDirectory() as folder:
        forward_seconds = median_seconds(forward, 1)
        started = time.perf_counter()
        small = [Samples({"input_ids": r}) for r in rows[: Recipe().sensitivity_tokens // 512].split(2)]
        store = DecompositionStore(Path(folder))
        few = ActivationStore(recorder, small).record(harness)
        for block, found in measure_sensitivity(harness, source, few, 0, Progress("quiet")):
            store.save_gradients(block, found)
        backward_seconds = time.perf_counter() - started

        started = time.perf_counter()
        initializer = make("initializers", "fisher")
        decompose_blocks(blocks, source, activations.fork(), initializer, store, Progress("quiet"))
        statistics_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for block in blocks:
            module = source.block(block)
            decompositions, _ = store.load(block)
            for target in block.targets:
                map_ = target.maps[0]
                W = target.weight(module, map_)
                rank = make("formats", "pivoted").largest_rank(
                    map_.out_features, map_.in_features, int(0.75 * map_.parameters)
                )
                B, A = decompositions[map_.name].factors(W, rank)
                target.replace(
                    module, {map_.name: make("formats", "pivoted").from_factors(B, A, target.bias(module, map_))}
                )
        replacement_seconds = time.perf_counter() - started
        second_forward = median_seconds(forward, 1)
    forward_seconds = (forward_seconds + second_forward) / 2
    beyond = statistics_seconds - forward_seconds + replacement_seconds
    return {
        "tokens": rows.numel(),
        "arithmetic": str(autocast),
        "forward_seconds": round(forward_seconds, 1),
        "gram_and_decomposition_seconds": round(statistics_seconds - forward_seconds, 1),
        "pivoting_and_replacement_seconds": round(replacement_seconds, 1),
        "ratio_to_one_forward_pass": round(beyond / forward_seconds, 2),
        "sensitivity_tokens": sum(b.inputs["input_ids"].numel() for b in small),
        "sensitivity_seconds": round(backward_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="+", default=["quality", "speed", "initialization"])
    parser.add_argument("--recipes", nargs="+", default=["fast", "default", "lillama"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-figures")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    file = HERE / "results" / "figures.json"
    file.parent.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value: Any) -> None:
        results[key] = value
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(key, json.dumps(value, indent=1), flush=True)

    if "quality" in options.only:
        keep("dense", {"perplexity": text_perplexities(options.model)})
        for recipe in options.recipes:
            keep(f"quality {recipe}", quality(options.model, recipe, options.work, []))
    if "speed" in options.only:
        compressed = {}
        for format_ in ("factored", "pivoted"):
            out = options.work / f"speed-{format_}"
            subprocess.run(
                [sys.executable, "-P", "-m", "lillama_core", "compress", options.model, "--output", str(out),
                 "--recipe", "fast", "--tokens", "8192", "--sensitivity-tokens", "2048", "--format", format_,
                 "--overwrite", "--calibration", str(DATA / "wikitext2-valid.txt"), "--quiet"],
                check=True,
            )  # fmt: skip
            compressed[format_] = str(out)
        keep("speed", speed(options.model, compressed))
    if "initialization" in options.only:
        keep("initialization", initialization(options.model, 32768))


if __name__ == "__main__":
    main()
