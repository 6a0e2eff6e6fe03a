"""Run as a module in a fresh process: does a directory load, and give the outputs that it should?"""

from __future__ import annotations

import sys

import torch
import transformers
from safetensors.torch import load_file

import lillama_core  # noqa: F401  registers the format

TOLERANCE = 1e-3
"""Relative to the largest logit; kernels may differ with the number of threads."""


def main(folder: str, probe: str, auto_class: str) -> int:
    """0 if the model in ``folder`` reproduces the logits in ``probe``, else 1 with a line on stderr."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    saved = load_file(probe)
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        found = model(input_ids=saved["tokens"]).logits.float()
    difference = (found - saved["expected"]).abs().max() / saved["expected"].abs().max()
    if difference <= TOLERANCE:
        return 0
    print(f"outputs differ by {difference:.3g} of the largest logit", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
