"""Compress a tiny model again and again in one process: memory, open files and temporary files must stay level.

    python benchmarks/soak.py --runs 200 --json results/soak.json

Each run has a thread of its own: tokenizers keep a cache of words in each thread that they work in, and tokenizers
0.23.3 frees it with the thread, not with the tokenizer (1.4 MB for each run here).

Exit status 1 says that one did not: more files or temporary files after the last run than after the first tenth,
or resident memory that has grown by more than `GROWTH` a run since then.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
GROWTH = 300_000
"""Bytes. What the process has allocated is level to a tenth of a megabyte over forty runs; safetensors 0.8.0 keeps 63
bytes of Python's for each tensor that it reads, and 200 runs grew by 184,000 each."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compress a tiny model many times in one process.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    # Processes that load the result again are forked, as in the tests.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    importlib.import_module("warm").fork_from_now_on()
    with tempfile.TemporaryDirectory() as work:
        # What is made in the system's temporary folder is then seen here.
        tempfile.tempdir = f"{work}/temporary"
        Path(tempfile.tempdir).mkdir()
        started = time.monotonic()
        looks = []
        for look in soak(Path(work), options.runs):
            looks.append(look)
            if len(looks) % 10 == 0:
                print(len(looks), look, flush=True)
        tempfile.tempdir = None
    settled = max(1, options.runs // 10)
    first, last = looks[settled - 1], looks[-1]
    level = last["files"] <= first["files"] and last["temporary"] <= first["temporary"]
    growth = (last["memory"] - first["memory"]) / max(1, options.runs - settled)
    level = level and growth <= GROWTH
    found = {"runs": options.runs, "settled": settled, "first": first, "last": last, "growth": round(growth)}
    found["level"] = level
    found["seconds"] = round(time.monotonic() - started)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not level)


def soak(work: Path, runs: int) -> Any:
    """After each of ``runs`` compressions: resident bytes, open files, entries of the temporary folder."""
    import shutil

    import psutil

    from lillama_core.pipeline import Request, compress
    from lillama_registry import registry
    from lillama_testing.tiny import make_tiny_model

    (architecture,) = registry().architectures_for("llama")
    tiny = make_tiny_model(architecture, "llama", work / "model")
    process = psutil.Process()
    temporary = Path(tempfile.gettempdir())
    for _ in range(runs):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(compress, Request(str(tiny.folder), work / "out", tiny.recipe()), "quiet").result()
        left = len(list(work.iterdir())) - len({"model", "out", "temporary"})
        shutil.rmtree(work / "out")
        yield {
            "memory": process.memory_info().rss,
            "files": process.num_fds(),
            "temporary": left + len(list(temporary.iterdir())),
        }


if __name__ == "__main__":
    sys.exit(main())
