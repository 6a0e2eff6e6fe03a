"""Peak anonymous memory of a compression by the depth of the model, held in memory and streamed.

    python benchmarks/memory_by_depth.py [--depths 4 8 16 32] [--width 1024 --intermediate 4096]

The models are Llamas of one width with random weights. Streamed, the peak should not depend on the depth: the largest
is compared with the smallest, and the exit status is 1 when they differ by more than --tolerance. The numbers go to
WORK/memory-by-depth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lillama_benchmarks.larger_than_memory import DATA, model_config
from lillama_benchmarks.made_models import check_disk, disk_needed, make_model
from lillama_benchmarks.made_run import Run, start

TOLERANCE = 0.05
"""By how much the largest streamed peak may exceed the smallest."""


def measure(
    work: Path, depth: int, width: int, intermediate: int, tokens: int, streamed: tuple[bool, ...] = (False, True)
) -> list[dict[str, Any]]:
    """Peaks of one depth, a row for each way to hold the model; the models are removed."""
    config = model_config("llama", width, intermediate, depth)
    check_disk(work, disk_needed(config, 0.2, tokens))
    dense, output = work / f"dense-{depth}", work / f"compressed-{depth}"
    shutil.rmtree(dense, ignore_errors=True)
    made = make_model(dense, config, report=lambda line: None)
    recipe = {
        "calibration": [str(DATA / "wikitext2-valid.txt")], "self_share": 0.0, "reduction": 0.2, "tokens": tokens,
        # Two batches of four rows are the least, and as many are held out.
        "sequence_length": min(128, tokens // 16), "sensitivity_tokens": tokens // 2, "rescaling_tokens": tokens // 4,
    }  # fmt: skip
    rows = []
    for stream in streamed:
        found = start("compress", Run(str(dense), str(output), recipe, stream), None)
        rows.append(
            {
                "blocks": depth,
                "streamed": stream,
                "model_bytes": made.bytes,
                "peak": found.peak,
                "peak_by_phase": found.peak_by_phase,
                "seconds": found.seconds,
            }
        )
        shutil.rmtree(output)
    shutil.rmtree(dense)
    return rows


def growth(rows: list[dict[str, Any]]) -> float:
    """The largest streamed peak over the smallest, less 1."""
    peaks = [row["peak"] for row in rows if row["streamed"]]
    return float(max(peaks) / min(peaks) - 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in MB of 10^6 bytes, with the phases in the order of the first run."""
    phases = list(dict.fromkeys(phase for row in rows for phase in row["peak_by_phase"]))
    lines = [f"{'blocks':>6} {'model':>8} {'held':>9} {'peak':>6}   by phase: {', '.join(phases)}"]
    for row in rows:
        held = "streamed" if row["streamed"] else "in memory"
        by_phase = " ".join(f"{row['peak_by_phase'].get(phase, 0) / 1e6:6.0f}" for phase in phases)
        lines.append(
            f"{row['blocks']:>6} {row['model_bytes'] / 1e6:>5.0f} MB {held:>9} {row['peak'] / 1e6:>6.0f}   {by_phase}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--streamed-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lillama-memory-by-depth")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    ways = (True,) if options.streamed_only else (False, True)
    rows: list[dict[str, Any]] = []
    for depth in options.depths:
        rows += measure(options.work, depth, options.width, options.intermediate, options.tokens, ways)
        (options.work / "memory-by-depth.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"Streamed, the largest peak is {growth(rows):.1%} above the smallest")
    return int(growth(rows) > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
