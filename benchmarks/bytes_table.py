"""Measures what bytes buy: SmolLM2 dense, in 8 and 4 bits, in low rank, and both, by sizes of files and perplexity.

Of sizes, 'lillama compress --target-size' chooses itself what to do.

    python benchmarks/bytes_table.py --model .venv/smollm2.gguf --work DIR [--reduction 0.2] [--only "low rank, int4"]

Every row is a directory under DIR and an entry of DIR/table.json, made once: a table that was interrupted goes on where
it was. Sizes are sums of the safetensors files (1 MB = 10^6 bytes); perplexities those of `figures.text_perplexities`,
in fp32. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CALIBRATION = str(HERE / "data" / "wikitext2-valid.txt")
CALIBRATED = ["--calibration", CALIBRATION]
ROWS: dict[str, tuple[str, list[str]]] = {
    "dense": ("dense", []),
    "int8": ("dense", ["--bits", "8"]),
    "int4, plain": ("dense", ["--bits", "4"]),
    "int4": ("dense", ["--bits", "4", *CALIBRATED]),
    "int4 throughout": ("dense", ["--bits", "4", "--embedding-bits", "4", *CALIBRATED]),
    "low rank": ("low rank", []),
    "low rank, int8": ("low rank", ["--bits", "8"]),
    "low rank, int4": ("low rank", ["--bits", "4", *CALIBRATED]),
    **{f"{size}MB": ("size", ["--target-size", f"{size}MB"]) for size in (100, 80, 70, 60)},
}
"""Name of a row -> what it is made of, and options of 'quantize', or for a size of 'compress'; none: as it is."""


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-P", "-m", "lillama_core", *arguments], check=True)


def compress(model: str, folder: Path, reduction: float, extra: list[str]) -> None:
    options = ["--recipe", "fast", "--format", "factored", "--compress-embeddings", "--calibration", CALIBRATION]
    again = ["--resume"] if folder.with_name(folder.name + ".partial").exists() else []
    run("compress", model, "-o", str(folder), "--reduction", str(reduction), *options, *extra, *again)


def directory(row: str, model: str, work: Path, reduction: float, extra: list[str]) -> str:
    """Where the model of a row is, made if it is not there yet."""
    origin, rounding = ROWS[row]
    base = model
    if origin == "low rank":
        folder = work / f"low-rank-{reduction}"
        if not folder.exists():
            compress(model, folder, reduction, extra)
        base = str(folder)
    if origin == "size":
        folder = work / row
        if not folder.exists():
            run("compress", model, "-o", str(folder), "--recipe", "fast", *CALIBRATED, *rounding, *extra)
        return str(folder)
    if not rounding:
        return base
    folder = work / f"{row.replace(', ', '-').replace(' ', '-')}{f'-{reduction}' if origin != 'dense' else ''}"
    if not folder.exists():
        run("quantize", base, "-o", str(folder), *rounding)
    return str(folder)


def file_bytes(spec: str, parameters: int) -> int:
    """Bytes of the weights' files; those that the dense model has in half precision, where it is a GGUF file."""
    return sum(f.stat().st_size for f in Path(spec).glob("*.safetensors")) if Path(spec).is_dir() else 2 * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--compress", nargs="*", default=[], help="more options of 'lillama compress', without dashes")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # It loads torch.
    from lillama_benchmarks.figures import load, text_perplexities

    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "table.json"
    table: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    extra = [word for pair in options.compress for word in (f"--{pair.split('=')[0]}", pair.split("=")[1])]
    for row in options.only:
        key = row if ROWS[row][0] != "low rank" else f"{row}, {options.reduction:g} removed"
        if key in table:
            continue
        spec = directory(row, options.model, options.work, options.reduction, extra)
        parameters = 0 if Path(spec).is_dir() else sum(p.numel() for p in load(spec)[0].parameters())
        table[key] = {"MB": round(file_bytes(spec, parameters) / 1e6, 1), **text_perplexities(spec)}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        temporary.replace(file)
        print(key, json.dumps(table[key]), flush=True)


if __name__ == "__main__":
    main()
