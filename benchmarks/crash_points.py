"""Let every file operation of a small run fail in turn, or be the last of its process, and go on from there.

    python benchmarks/crash_points.py --every 1 --json results/crash_points.json

A point is an operation that writes: opening, renaming, making a directory, waiting for the disk, writing tensors. At
each a full disk and a disk that became read-only are tried in turns, and at one in `KILLS` the process is killed too.
What must hold: one line of error, nothing of what was there lost, no half of an output, and a run that goes on and ends
with the bytes of the undisturbed one. Exit status 1 says that something did not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MODELS = ("llama", "mixtral", "mamba", "whisper")
KILLS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description="Let file operations of small runs fail in turn, and go on.")
    parser.add_argument("--models", nargs="*", default=MODELS, help="model types (default: all four)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th operation alone (default: 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    # Processes that load the result again are forked, as in the tests.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from lillama_registry import registry
    from lillama_testing.crashing import Trial, killed, no_space, read_only

    importlib.import_module("warm").fork_from_now_on()
    figures, wrong = {}, 0
    for model_type in options.models:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            (architecture,) = registry().architectures_for(model_type)
            trial = Trial.of(architecture, model_type, Path(work))
            points = trial.count()
            tried = kills = 0
            for at in range(0, len(points), options.every):
                fault = read_only if tried % 2 else no_space
                for each in (fault, killed) if tried % KILLS == 0 else (fault,):
                    said = trial.disturbed(at, each, lasting=each is read_only)
                    kills += each is killed
                    if said is not None:
                        wrong += 1
                        print(f"{model_type}, {points[at]}, {each.__name__}: {said}", flush=True)
                tried += 1
        figures[model_type] = {
            "operations": len(points), "failed": tried, "killed": kills, "seconds": round(time.monotonic() - started),
        }  # fmt: skip
        print(model_type, figures[model_type], flush=True)
    if options.json:
        options.json.write_text(json.dumps({**figures, "wrong": wrong}, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
