"""Run as a module in a fresh process: does a directory load, and give the outputs that it should?"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import as_dtype
from lillama_core.models.loading import load_config
from lillama_core.models.outputs import main_output
from lillama_core.models.source import ModelSource
from lillama_core.output.shards import compressed_reader
from lillama_core.runtime.weight_source import run_blocks_from

TOLERANCE = 1e-3
"""On ||y - y0|| / ||y0||, for fp32: kernels may differ with the number of threads."""
TRUST = "--trust-remote-code"
WHOLE, BY_BLOCK = "whole", "by-block"
"""How the model is loaded."""
ROUNDINGS = 8
"""In half precision as many relative roundings of a number are allowed instead, if that is more."""


def main(folder: str, probe: str, how: str, name: str, *flags: str) -> int:
    """0 if the model in ``folder`` reproduces the outputs in ``probe``, else 1 with a line on stderr.

    ``how`` is WHOLE, with the ``name`` of a class of transformers, or BY_BLOCK, with that of an architecture, for a
    model that is not to be held as a whole. ``TRUST`` among the flags lets code that came with the model run: the user
    has allowed it for this run.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    saved = load_file(probe)
    trusted = TRUST in flags
    if how == BY_BLOCK:
        model = open_by_block(folder, name, trusted)
    else:
        model = getattr(transformers, name).from_pretrained(folder, dtype="auto", trust_remote_code=trusted)
    model.eval()
    inputs = {k.removeprefix("inputs."): v for k, v in saved.items() if k.startswith("inputs.")}
    with torch.no_grad():
        found = main_output(model(**as_dtype(inputs, next(model.parameters()).dtype))).double()
    # In double: the squares of small outputs are 0 in fp32. Outputs of 0 alone differ by 0.
    expected = saved["expected"].double()
    difference = (found - expected).norm().item() / max(expected.norm().item(), 1e-300)
    if difference <= max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps):
        return 0
    print(f"outputs differ by {difference:.3g} of their norm", file=sys.stderr)
    return 1


def open_by_block(folder: str, architecture: str, trust_remote_code: bool) -> Any:
    """The compressed model in ``folder``, that reads each of its blocks when it is run."""
    source = ModelSource(folder, folder, None, trust_remote_code)
    config = load_config(source, allow_compressed=True)
    found = find_architecture(config, architecture, trust_remote_code)
    reader, _ = compressed_reader(source, config, found)
    reader.load_shell()
    run_blocks_from(reader.model, reader.paths, reader.block)
    return reader.model


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
