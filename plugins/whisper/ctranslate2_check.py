"""Run by path in a process without lillama: what does CTranslate2 make of a Whisper directory?

    ctranslate2_check.py FOLDER PROBE ANSWER

writes the encoder's states, the prompts of PROBE with the tokens that a greedy search adds, and the logits at each of
these tokens.
"""

from __future__ import annotations

import json
import sys

import ctranslate2
import numpy as np
import torch
from safetensors.torch import load_file, save_file

STEPS = 4
"""Tokens that are added."""


def main(folder: str, probe: str, answer: str) -> None:
    """Write what the model puts out for the probe's inputs."""
    saved = load_file(probe)
    model = ctranslate2.models.Whisper(folder, device="cpu", compute_type="float32")
    features = ctranslate2.StorageView.from_array(saved["inputs.input_features"].float().numpy())
    states = model.encode(features)
    prompts = saved["inputs.decoder_input_ids"].tolist()
    found = model.generate(
        states,
        prompts,
        beam_size=1,
        # CTranslate2 allows a transcript half of this, its prompt included.
        max_length=2 * (len(prompts[0]) + STEPS),
        return_logits_vocab=True,
        suppress_blank=False,
        suppress_tokens=[],
    )
    # Scores and tokens begin behind the first token of the prompt. Rows that end early have fewer.
    steps = min(len(row.logits[0]) for row in found)
    logits = np.stack([[np.array(step) for step in row.logits[0][:steps]] for row in found])
    tokens = np.array([[prompt[0], *row.sequences_ids[0]][:steps] for prompt, row in zip(prompts, found, strict=True)])
    tensors = {"states": torch.tensor(np.array(states)), "logits": torch.tensor(logits), "tokens": torch.tensor(tokens)}
    save_file(tensors, answer)
    print(json.dumps({"steps": steps}))


if __name__ == "__main__":
    main(*sys.argv[1:])
