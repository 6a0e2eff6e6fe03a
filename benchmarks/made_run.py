"""Run as a module in a process of its own: compress a model, or measure the result beside it.

    python -P -m lillama_benchmarks.made_run compress|perplexity|speed SETTINGS.json

The settings are those of `Run`, written by whoever watches the process.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lillama_benchmarks.memory_sampling import MemoryLimit, Watched, watch
from lillama_core.system.files import write_json


@dataclass(frozen=True)
class Run:
    """One compression."""

    model: str
    output: str
    recipe: dict[str, Any]
    """Options over the recipe ``fast``."""
    stream: bool
    device: str = "cpu"
    evaluation: str = ""
    """The text for perplexity."""
    windows: int = 4
    """How many windows of the recipe's ``sequence_length``."""
    prompt: int = 512
    """Tokens of the prompt by which speed is measured."""
    new_tokens: int = 64
    repeats: int = 5


def start(
    what: str,
    run: Run,
    watched: Path | None,
    limit: MemoryLimit | None = None,
    may_fail: bool = False,
    here: bool = False,
) -> Watched:
    """Do ``what`` in a new process, watched; one that fails ends the program, unless it ``may_fail``.

    ``here``: in this process, where the libraries are loaded already. Its errors are this one's then, and nothing but
    the time is measured.
    """
    if here:
        started = time.monotonic()
        output = do(what, run)
        return Watched(seconds=round(time.monotonic() - started, 1), output=output)
    settings = Path(run.output).with_name(f"{Path(run.output).name}-run.json")
    write_json(settings, asdict(run))
    command = [sys.executable, "-P", "-m", "lillama_benchmarks.made_run", what, str(settings)]
    found = watch(command, watched, limit)
    if found.status != 0 and not may_fail:
        why = " (killed: over the limit of memory?)" if found.status == -9 else f": {found.last_line}"
        raise SystemExit(f"{what} of {run.model} failed with status {found.status}{why}")
    return found


def perplexities(run: Run) -> dict[str, float]:
    """Of the dense and of the compressed model, on the same windows, of which all go through a block at once."""
    from lillama_core.architecture.find import find_architecture
    from lillama_core.data.sources import Source
    from lillama_core.data.text.calibration import load_text_windows
    from lillama_core.evaluation.metrics.perplexity import perplexity
    from lillama_core.models.loading import load_config, load_tokenizer
    from lillama_core.models.source import locate
    from lillama_core.pipeline.opening import open_model

    length, device = run.recipe["sequence_length"], torch.device("cpu")
    rows = load_text_windows(Source.parse(run.evaluation), load_tokenizer(locate(run.model)), length, run.windows)
    found = {}
    for name, folder in (("dense", run.model), ("compressed", run.output)):
        print(f"Perplexity of the {name} model …", file=sys.stderr, flush=True)
        source = locate(folder)
        config = load_config(source, allow_compressed=True)
        opened = open_model(source, config, find_architecture(config), "auto", device, stream=True)
        found[name] = perplexity(opened.model, rows, device, batch=len(rows))[0]
    return found


def compress(run: Run) -> None:
    from lillama_core.pipeline.pipeline import compress as run_pipeline
    from lillama_core.pipeline.request import Request
    from lillama_core.recipe.loading import load_recipe

    recipe = load_recipe("fast").with_options(run.recipe)
    request = Request(run.model, Path(run.output), recipe, device=run.device, stream=run.stream, overwrite=True)
    run_pipeline(request)


def do(what: str, run: Run) -> str:
    """Compress, or measure; what was measured, as JSON."""
    if what == "compress":
        compress(run)
        return ""
    if what == "perplexity":
        return json.dumps(perplexities(run))
    from lillama_benchmarks.made_speed import speeds

    return json.dumps(speeds(run.model, run.output, run.device, run.prompt, run.new_tokens, run.repeats))


def main(what: str, settings: str) -> None:
    print(do(what, Run(**json.loads(Path(settings).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main(*sys.argv[1:])
