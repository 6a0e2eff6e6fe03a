"""A fresh process in which lillama cannot be imported: whatever runs there runs on any machine without it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.modality import Inputs
from lillama_core.errors import LillamaError, one_line
from lillama_core.system.files import write_tensors

if TYPE_CHECKING:
    from lillama_core.exporting.model import CompressedModel

PACKAGES = ("lillama_core", "lillama_registry", "lillama_plugins", "lillama_testing", "lillama_benchmarks")
LAUNCH = f"""
import runpy, sys
# None in this table makes an import fail as if the package were not installed.
sys.modules.update(dict.fromkeys({PACKAGES!r}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PLAIN_CHECK = Path(__file__).with_name("plain_check.py")
"""A script for `run_without_lillama` that compares what a directory of transformers, or a GGUF file, puts out."""
TOLERANCE = 1e-3
"""On ||y - y0|| / ||y0||, for fp32: kernels differ, and products are multiplied out in another order."""
ROUNDINGS = 2
"""In half precision as many times what one rounding of every weight does to the model is allowed, if that is more."""


def allowed(model: CompressedModel, dtype: torch.dtype) -> float:
    """The largest relative difference of outputs that rounding explains, where weights were rounded to ``dtype``."""
    return TOLERANCE if dtype == torch.float32 else max(TOLERANCE, ROUNDINGS * model.rounding(dtype))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def run_without_lillama(script: Path, scratch: Path, *arguments: str | Path) -> Any:
    """Run the Python file ``script`` in a new process without lillama, and return the JSON that it prints last.

    ``scratch`` takes what libraries keep in their caches. Raises LillamaError with the last line on stderr when the
    process fails.
    """
    # -P: files of the working directory, which may be an untrusted model, are not to be taken for modules.
    command = [sys.executable, "-P", "-c", LAUNCH, str(script), *map(str, arguments)]
    # Code that comes with a model is copied to a cache; nothing is fetched.
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    # Nobody could answer what it might ask.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return json.loads(lines[-1])
        except ValueError:
            pass
    reason = (done.stderr.strip().splitlines() or lines or ["no message"])[-1]
    raise LillamaError(f"a process without lillama cannot run the export: {one_line(reason)}")


def write_probe(path: Path, inputs: Inputs, expected: dict[str, torch.Tensor]) -> Path:
    """Write inputs and expected outputs where a script reads them: ``inputs.NAME`` and ``expected.NAME``."""
    tensors = {f"inputs.{name}": tensor for name, tensor in inputs.items()}
    write_tensors(path, {**tensors, **{f"expected.{name}": t.float() for name, t in expected.items()}}, durable=False)
    return path
