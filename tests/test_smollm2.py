"""The real model, end to end by the command line; needs the GGUF that `make test` takes from its wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".venv" / "smollm2.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_file(), reason="run `make test`, which fetches the model"),
]


def test_smollm2_loses_a_fifth_of_its_parameters_and_little_of_its_sense(tmp_path: Path) -> None:
    """Without training and from few tokens; plain SVD at this size gives perplexities of 10^8."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "lillama_core", "compress", str(MODEL), "--output", str(out), "--reduction", "0.2",
        "--recipe", "fast", "--calibration", str(ROOT / "benchmarks" / "data" / "wikitext2-valid.txt"),
        "--self-share", "0", "--tokens", "2048", "--sequence-length", "256", "--sensitivity-tokens", "512",
        "--rescaling-tokens", "256", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "lillama.json").read_text())
    assert record["parameters"]["reduction"] == pytest.approx(0.2, abs=0.001)
    assert record["dtype"] == "float16"
    # A permutation's indices are bytes, though not parameters.
    assert record["bytes"]["compressed"] / record["bytes"]["dense"] == pytest.approx(0.8, abs=0.002)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lillama_core.data.sources import Source
    from lillama_core.data.text.calibration import load_text_windows
    from lillama_core.evaluation.metrics.perplexity import perplexity

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = ROOT / "benchmarks" / "data" / "wikitext2-test.txt"
    rows = load_text_windows(Source.parse(str(text)), tokenizer, 512, 4)
    assert perplexity(model, rows, torch.device("cpu"))[0] < 40
    # Text as that which it was calibrated on: of chats it has seen none.
    prompt = tokenizer("The town lies on the northern bank of the river , and its church", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    # A broken model repeats one token or says nothing.
    assert len(set(said.split())) > 2
