"""The demonstration behind `make demo`: compress SmolLM2-135M by 20 %, measure both models, let both answer."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
QUESTION = "Why is the sky blue? Answer in two sentences."


def run(*words: str | Path) -> None:
    """Run a lillama command as a user would, showing it first; ends the program when it fails."""
    arguments = [str(w) for w in words]
    print(f"\n$ lillama {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-P", "-m", "lillama_core", *arguments], check=False).returncode
    if status != 0:
        sys.exit(status)


def answer(spec: str) -> str:
    """The greedy answer of a model to QUESTION."""
    import torch

    from lillama_core.architecture.find import find_architecture
    from lillama_core.models.loading import load_config, load_model, load_tokenizer
    from lillama_core.models.source import locate

    source = locate(spec)
    architecture = find_architecture(load_config(source, allow_compressed=True))
    model = load_model(source, architecture, torch.float32)
    tokenizer = load_tokenizer(source)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    result = options.output / "SmolLM2-135M-20"
    calibration = HERE / "data" / "wikitext2-valid.txt"
    # Fewer tokens and steps than the recipe has by default: the demonstration is to end within 12 minutes.
    budget = ["--tokens", "12288", "--sensitivity-tokens", "4096", "--rescaling-tokens", "1024", "--steps", "16"]
    run("compress", options.model, "--output", result, "--reduction", "0.2", "--calibration", calibration,
        *budget, "--overwrite")  # fmt: skip
    run("evaluate", result, "--baseline", options.model, "--windows", "16", "--limit", "60")
    print(f"\nQuestion: {QUESTION}")
    for name, spec in (("dense", options.model), ("20 % smaller", str(result))):
        print(f"\n{name}: {answer(spec)}")
    print(f"\nReport: {result / 'report.html'}")
    print(f"Time: {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
