"""Trains the zoo's Mamba, and a Falcon-Mamba that may begin as it, on the repository's text.

    python -m lillama_benchmarks.zoo.train_mamba NAME OUTPUT [--steps N] [--minutes M] [--start MAMBA]

The maps are trained by Muon, whose orthogonalised updates learn most from few tokens; everything else by AdamW.
The checkpoint is float16. The perplexities of the model and of a Kneser-Ney 5-gram that saw the same tokens go
to ``training.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_benchmarks.zoo import fast_mamba
from lillama_benchmarks.zoo.kneser_ney import KneserNey
from lillama_benchmarks.zoo.texts import held_out_text, training_text

END = "<|endoftext|>"
MODEL_TYPES = {"mamba-tiny": "mamba", "falcon-mamba-tiny": "falcon_mamba"}


@dataclass(frozen=True)
class Settings:
    """Shape of the model and course of its training."""

    vocabulary: int = 2048
    width: int = 320
    layers: int = 8
    states: int = 8
    steps: int = 600
    minutes: float = 20.0
    batch: int = 8
    length: int = 256
    map_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.05
    dropout: float = 0.05
    flatten: float = 0.0
    """How far, every 10 steps of the first 70 %, the singular values of the maps go towards their mean."""
    seed: int = 0


def finishing(first: Settings) -> Settings:
    """The course of the second phase, which spreads what the maps hold over all their singular directions."""
    return replace(first, steps=700, minutes=18.0, map_rate=0.01, other_rate=1e-3, flatten=0.3, seed=first.seed + 1)


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with ``vocabulary`` entries, of which the first ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=4096
    )


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """All tokens of ``text``, one row."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def new_model(model_type: str, settings: Settings) -> nn.Module:
    """A randomly initialised language model of ``model_type``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        state_size=settings.states,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(settings.seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # While it is set, transformers (5.23) divides out_proj again whenever the weights are loaded.
    model.config.rescale_prenorm_residual = False
    return model


def batches(tokens: torch.Tensor, settings: Settings) -> Any:
    """Endless batches [batch, length + 1]: all the text in random order, cut elsewhere in each pass."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows: list[torch.Tensor] = []
    while True:
        shift = int(torch.randint(settings.length, (1,), generator=generator))
        windows = tokens[shift:].unfold(0, settings.length + 1, settings.length)
        rows += list(windows[torch.randperm(len(windows), generator=generator)])
        while len(rows) >= settings.batch:
            yield torch.stack(rows[: settings.batch])
            rows = rows[settings.batch :]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, length: int = 512) -> float:
    """Perplexity over whole windows of ``length`` tokens, each begun afresh, ``length`` - 1 predictions a window."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    model.eval()
    total = 0.0
    for rows in windows.split(8):
        logits = fast_mamba.logits(model, rows[:, :-1])
        total += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return float(torch.tensor(total / (len(windows) * (length - 1))).exp())


@torch.no_grad()
def copy_into_falcon(mamba: Any, falcon: Any, tokens: torch.Tensor) -> None:
    """Begin a Falcon-Mamba with a Mamba's weights; ``tokens`` [batch, length] show how large dt, B and C are.

    Falcon-Mamba divides dt, B and C by their root mean square. Their usual sizes go into what comes after: dt_proj,
    and, for the product of B and C, out_proj, with D made smaller by as much.
    """
    found: list[torch.Tensor] = []
    blocks = mamba.backbone.layers
    hooks = [b.mixer.x_proj.register_forward_hook(lambda _, __, out: found.append(out.float())) for b in blocks]
    fast_mamba.features(mamba, tokens)
    for hook in hooks:
        hook.remove()
    falcon.load_state_dict(mamba.state_dict())
    for block, out in zip(falcon.backbone.layers, found, strict=True):
        m = block.mixer
        dt, B, C = (
            part.square().mean(-1).sqrt()
            for part in out.split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], dim=-1)
        )
        m.dt_proj.weight.mul_(dt.mean())
        product = (B * C).mean()
        m.D.div_(product)
        m.out_proj.weight.mul_(product)


@torch.no_grad()
def flatten_spectra(model: Any, share: float) -> None:
    """Move every singular value of in_proj and out_proj by ``share`` of its distance to the map's mean one."""
    for block in model.backbone.layers:
        for map_ in (block.mixer.in_proj, block.mixer.out_proj):
            U, S, Vh = torch.linalg.svd(map_.weight, full_matrices=False)
            map_.weight.copy_(U * torch.lerp(S, S.mean(), share) @ Vh)


def train(model: nn.Module, tokens: torch.Tensor, held_out: torch.Tensor, settings: Settings) -> int:
    """Train ``model`` in place on ``tokens``, print the losses, and return the number of steps."""
    maps = [p for n, p in model.named_parameters() if "_proj.weight" in n and "dt_proj" not in n]
    chosen = {id(p) for p in maps}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(maps, lr=settings.map_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    started = time.monotonic()
    source = batches(tokens, settings)
    for step in range(settings.steps):
        # A busy machine makes fewer steps, but ends its training with small ones all the same.
        done = max(step / settings.steps, (time.monotonic() - started) / (60 * settings.minutes))
        if done >= 1.0:
            break
        # Up over 20 steps, level, then down in a line over the last 60 %.
        rate = min((step + 1) / 20, 1.0, (1.0 - done) / 0.6)
        for optimizer, base in zip(optimizers, (settings.map_rate, settings.other_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * base
        if settings.flatten and step % 10 == 0 and done < 0.7:
            flatten_spectra(model, settings.flatten)
        model.train()
        rows = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            logits = fast_mamba.logits(model, rows[:, :-1], settings.dropout)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:5.0f} s", flush=True)
        if step % 100 == 99:
            print(f"held out, first 24 windows: {perplexity(model, held_out[: 24 * 512]):.2f}", flush=True)
    return step + (done < 1.0)


def card(record: dict[str, Any]) -> str:
    """The checkpoint's README, from what ``training.json`` holds."""
    shape, *later = record["phases"]
    steps = " + ".join(str(p["steps"]) for p in (shape, *later))
    name, kind, minutes = record["model"], MODEL_TYPES[record["model"]], record["seconds"] // 60
    origin = ""
    if kind == "falcon_mamba":
        origin = "\n  The first steps were mamba-tiny's, whose weights it took over (`copy_into_falcon`)."
    return f"""---
license: cc-by-sa-3.0
language: en
---
# {name}

A small `{kind}` language model ({shape["layers"]} blocks of width {shape["width"]}, state {shape["states"]}, float16)
for testing compression. It knows little: it is small, and so is its text.

- Made by `python -m lillama_benchmarks.zoo.train_mamba {name} FOLDER` from random weights: {steps} steps of
  {shape["batch"]} x {shape["length"]} tokens ({record["passes"]:.1f} passes over the text), seed {shape["seed"]},
  {minutes} minutes on one busy CPU core, whose clock ended each phase (`training.json`).
  The later steps also pull the singular values of in_proj and out_proj together, so that no direction of a map is
  spare: a model that has seen little text leaves many unused.{origin}
- Text: WikiText-2 (Merity et al. 2016; CC BY-SA 3.0), the validation split and the test split up to its last 218 kB,
  which are held out (`lillama_benchmarks.zoo.texts`). Tokenizer: byte-level BPE of {shape["vocabulary"]} entries,
  trained on the same text.
- Perplexity on the held-out text, {record["held_out_tokens"] // 512} windows of 512 tokens: {record["perplexity"]:.2f}.
  An interpolated modified Kneser-Ney 5-gram of the same {record["training_tokens"]} training tokens:
  {record["kneser_ney_5gram_perplexity"]:.2f}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MODEL_TYPES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="end by then, with fewer steps")
    parser.add_argument("--start", type=Path, help="begin the second phase with this Mamba of the first")
    options = parser.parse_args()
    settings = Settings(steps=options.steps, minutes=options.minutes)
    text = training_text()
    tokenizer = train_tokenizer(text, settings.vocabulary)
    tokens, held_out = encode(tokenizer, text), encode(tokenizer, held_out_text())
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out", flush=True)

    started = time.monotonic()
    model: Any = new_model(MODEL_TYPES[options.name], settings)
    courses = [settings, finishing(settings)]
    earlier: dict[str, Any] = {"phases": [], "seconds": 0}
    if options.start is not None:
        from transformers import AutoModelForCausalLM

        start: Any = AutoModelForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        if start.config.model_type == model.config.model_type:
            model.load_state_dict(start.state_dict())
        else:
            copy_into_falcon(start, model, tokens[:4096].view(8, 512))
        courses = courses[1:]
        earlier = json.loads((options.start / "training.json").read_text())
    phases = [{**asdict(s), "steps": train(model, tokens, held_out, s)} for s in courses]
    phases, seconds = earlier["phases"] + phases, earlier["seconds"] + time.monotonic() - started

    model.eval().to(torch.float16)
    model.generation_config.max_new_tokens = 64
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    write_record(options.output, options.name, model.float(), tokens, held_out, phases, seconds)


def write_record(
    folder: Path,
    name: str,
    model: nn.Module,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    phases: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Measure ``model``, and a 5-gram of the same tokens, and write ``training.json`` and the README."""
    seen = sum(p["steps"] * p["batch"] * p["length"] for p in phases)
    record = {
        "model": name,
        "phases": phases,
        "training_tokens": len(tokens),
        "passes": seen / len(tokens),
        "seconds": round(seconds),
        "held_out_tokens": len(held_out),
        "perplexity": perplexity(model, held_out),
        "kneser_ney_5gram_perplexity": KneserNey(tokens.tolist(), 5).window_perplexity(held_out.tolist(), 512),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(card(record))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
