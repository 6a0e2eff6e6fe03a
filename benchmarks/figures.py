"""Measures the figures of SmolLM2 in docs/results.md here and writes them to benchmarks/results/figures.json.

    python benchmarks/figures.py --model .venv/smollm2.gguf [--only quality speed] [--methods fast svd-llm]
        [--reductions 0.1 0.2] [--work DIR]

- quality: each method by the command line at each reduction, calibrated on WikiText-2's validation split and the
  model's own text; seconds and peak memory as its record says, those of sampling apart; perplexity in fp32 on the first
  40 windows of 512 tokens of WikiText-2's test split and the first 24 of fiction that no method saw. A model that is in
  the working folder already is measured as it is.
- speed: the blocks alone on a prompt of 512 tokens, compressed against dense in one process, beside what the
  multiply-adds promise.
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

import torch

from lillama_benchmarks.methods import Method, find_methods
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.data.sources import Source
from lillama_core.data.text.calibration import load_text_windows
from lillama_core.evaluation.metrics.perplexity import perplexity
from lillama_core.models.loading import load_config, load_model, load_tokenizer
from lillama_core.models.source import locate
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness

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


def quality(
    model: str, method: Method, reduction: float, folder: Path, calibration: Path = DATA / "wikitext2-valid.txt"
) -> dict[str, Any]:
    """Compress by the command line, unless that was done before, and measure the result."""
    output = folder / f"{method.name}-{reduction:g}"
    if not output.exists():
        recipe = output.with_name(f"{output.name}.yaml")
        recipe.write_text(json.dumps({"recipe": method.recipe, **method.options, "reduction": reduction}))
        again = ["--resume"] if output.with_name(f"{output.name}.partial").exists() else []
        subprocess.run(
            [sys.executable, "-P", "-m", "lillama_core", "compress", model, "--output", str(output),
             "--recipe", str(recipe), "--calibration", str(calibration), *again],
            check=True,
        )  # fmt: skip
    record = json.loads((output / "lillama.json").read_text())
    return {
        "seconds": {phase: round(seconds, 1) for phase, seconds in record["seconds"].items()},
        "threads": torch.get_num_threads(),
        "peak_memory_mb": round(record["peak_memory_bytes"] / 1e6),
        "compute": record["compute"],
        "parameters": [record["parameters"]["parameters_before"], record["parameters"]["parameters_after"]],
        "bytes": record["bytes"],
        "perplexity": text_perplexities(str(output)),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="+", default=["quality", "speed"])
    parser.add_argument("--methods", nargs="+", default=["fast", "default", "lillama"])
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-figures")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    file = HERE / "results" / "figures.json"
    file.parent.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value: Any) -> None:
        # Read again: another process may be at other methods.
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**known, key: value}, indent=1) + "\n")
        print(key, json.dumps(value, indent=1), flush=True)

    if "quality" in options.only:
        if "dense" not in results:
            keep("dense", {"perplexity": text_perplexities(options.model)})
        for reduction in options.reductions:
            for method in find_methods(tuple(options.methods)):
                keep(f"{method.name} {reduction:.0%}", quality(options.model, method, reduction, options.work))
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


if __name__ == "__main__":
    main()
