"""Run as a module in a fresh process: does a directory load, and give the outputs that it should?"""

from __future__ import annotations

import sys

import torch
import transformers
from safetensors.torch import load_file

from lillama_core.data.modality import as_dtype
from lillama_core.models.outputs import main_output

TOLERANCE = 1e-3
"""On ||y - y0|| / ||y0||, for fp32: kernels may differ with the number of threads."""
TRUST = "--trust-remote-code"
ROUNDINGS = 8
"""In half precision as many relative roundings of a number are allowed instead, if that is more."""


def main(folder: str, probe: str, auto_class: str, *flags: str) -> int:
    """0 if the model in ``folder`` reproduces the outputs in ``probe``, else 1 with a line on stderr.

    ``TRUST`` among the flags lets code that came with the model run: the user has allowed it for this run.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    saved = load_file(probe)
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto", trust_remote_code=TRUST in flags)
    model.eval()
    inputs = {k.removeprefix("inputs."): v for k, v in saved.items() if k.startswith("inputs.")}
    with torch.no_grad():
        found = main_output(model(**as_dtype(inputs, next(model.parameters()).dtype))).float()
    difference = ((found - saved["expected"]).norm() / saved["expected"].norm()).item()
    if difference <= max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps):
        return 0
    print(f"outputs differ by {difference:.3g} of their norm", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
