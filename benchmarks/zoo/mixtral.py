"""A Mixtral upcycled from SmolLM2-135M: four experts that begin as its MLP, are made to differ, and are trained.

Sparse upcycling (Komatsuzaki et al. 2023) copies a dense MLP into every expert; the mixture then computes what the
dense model does. Copies hardly part in a few minutes of training, so each expert first loses a share of its hidden
units of its own, which begin anew (Drop-Upcycling, Nakamura et al. 2025), and its down projection is fitted in closed
form to what the MLP gives on the tokens that the router will send it. A short distillation from the dense model trains
experts and routers together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_benchmarks.zoo.texts import training_text

EXPERTS = 4
EXPERTS_A_TOKEN = 2


@dataclass(frozen=True)
class Settings:
    """How the experts come to differ, and their training."""

    renewed: float = 0.0625
    """Share of an expert's hidden units that begin anew; no two experts renew the same unit."""
    fit_tokens: int = 12_288
    minutes: float = 8.0
    steps: int = 60
    batch: int = 4
    length: int = 256
    rate: float = 5e-5
    router_rate: float = 5e-4
    balance: float = 0.02
    seed: int = 0


def upcycle(dense: Any, experts: int = EXPERTS, experts_a_token: int = EXPERTS_A_TOKEN) -> Any:
    """A MixtralForCausalLM whose experts are copies of the MLPs of ``dense``, a Llama: the same function.

    Routers are zero. Raises ValueError for a Llama that a Mixtral cannot represent.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    old = dense.config
    if old.attention_bias or old.mlp_bias or old.rope_parameters.get("rope_type", "default") != "default":
        raise ValueError("a Mixtral has no biases and plain rotary positions")
    config = MixtralConfig(
        **{
            name: getattr(old, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
                "initializer_range", "tie_word_embeddings", "rope_parameters", "attention_dropout",
                "bos_token_id", "eos_token_id", "pad_token_id",
            )
        },
        num_local_experts=experts,
        num_experts_per_tok=experts_a_token,
        sliding_window=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model.to_empty(device="cpu").to(dense.dtype)
    model.tie_weights()
    # Not a parameter, and therefore not copied below.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight)
        model.lm_head.weight.copy_(dense.lm_head.weight)
        model.model.norm.weight.copy_(dense.model.norm.weight)
        for new, layer in zip(model.model.layers, dense.model.layers, strict=True):
            for name in ("input_layernorm", "post_attention_layernorm", "self_attn"):
                getattr(new, name).load_state_dict(getattr(layer, name).state_dict())
            new.mlp.gate.weight.zero_()
            new.mlp.experts.gate_up_proj.copy_(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
            new.mlp.experts.down_proj.copy_(layer.mlp.down_proj.weight)
    model.generation_config = dense.generation_config
    return model.eval().requires_grad_(False)


def split_directions(x: torch.Tensor) -> torch.Tensor:
    """Router weights [4, width] that send each row of ``x`` [tokens, width] to one of two pairs of experts each.

    With the two principal directions p, q of x that are orthogonal to its mean, the weights are p, -p, q, -q: two
    opposite experts are never chosen together, and each pair halves the tokens. Projections have unit variance.
    """
    mean = x.mean(0)
    along = mean / mean.norm()
    rest = x - (x @ along)[:, None] * along
    _, directions = torch.linalg.eigh(rest.T @ rest)
    chosen = directions[:, -2:].T
    chosen = chosen / (x @ chosen.T).std(0)[:, None]
    return torch.stack([chosen[0], -chosen[0], chosen[1], -chosen[1]])


def hidden_units(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Outputs of an expert's hidden units, [tokens, units], from its ``gate_up`` [2 units, width]."""
    gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
    return functional.silu(gate) * up


def fit_down(H: torch.Tensor, Y: torch.Tensor, D: torch.Tensor, ridge: float = 1e-2) -> torch.Tensor:
    """The down projection [width, units] nearest to ``D`` in ridge's sense with H downᵀ ≈ Y.

    H [tokens, units], Y [tokens, width]; minimises |H Xᵀ - Y|² + λ|X - D|², λ a share of H's mean energy a unit.
    """
    G = H.T @ H
    G.diagonal().add_(ridge * G.diagonal().mean())
    return D + torch.linalg.solve(G, H.T @ (Y - H @ D.T), left=True).T


@torch.no_grad()
def differentiate(model: Any, dense: Any, tokens: torch.Tensor, settings: Settings) -> None:
    """Give the routers of ``model``, fresh from `upcycle`, their directions, and each expert units of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    inputs: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(dense.model.layers))}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0].flatten(0, 1).half()))
        for i, layer in enumerate(dense.model.layers)
    ]
    for rows in tokens.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            dense.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for i, (new, layer) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        x = torch.cat(inputs.pop(i)).float()
        with torch.autocast("cpu", torch.bfloat16):
            Y = layer.mlp(x).float()
        router = split_directions(x)
        new.mlp.gate.weight.copy_(router)
        chosen = (x @ router.T).topk(EXPERTS_A_TOKEN, dim=-1).indices
        units = layer.mlp.down_proj.weight.shape[1]
        shares = torch.randperm(units, generator=generator)[: int(settings.renewed * units) * EXPERTS].chunk(EXPERTS)
        for e, renewed in enumerate(shares):
            gate_up, down = new.mlp.experts.gate_up_proj[e], new.mlp.experts.down_proj[e]
            rows_of_units = torch.cat([renewed, renewed + units])
            fresh = torch.randn(len(rows_of_units), gate_up.shape[1], generator=generator)
            gate_up[rows_of_units] = fresh * gate_up.std()
            down[:, renewed] = 0
            own = (chosen == e).any(-1)
            with torch.autocast("cpu", torch.bfloat16):
                H = hidden_units(x[own], gate_up)
            down.copy_(fit_down(H.float(), Y[own], down))


def balance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Switch Transformers' load balancing (Fedus et al. 2022, equation 4) for top-k routing: 1 when even."""
    probabilities = router_logits.float().softmax(-1)
    experts = probabilities.shape[-1]
    chosen = functional.one_hot(probabilities.topk(EXPERTS_A_TOKEN, dim=-1).indices, experts).float().sum(1)
    return experts * (chosen.mean(0) / EXPERTS_A_TOKEN * probabilities.mean(0)).sum()


def train(model: Any, dense: Any, tokens: torch.Tensor, settings: Settings) -> None:
    """Distil experts and routers of ``model`` in place from the next-token distributions of ``dense``."""
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    routers = [p for n, p in model.named_parameters() if ".gate." in n]
    for p in experts + routers:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": experts, "base": settings.rate}, {"params": routers, "base": settings.router_rate}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    logits: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, __, out: logits.append(out[0])) for gate in gates]
    generator = torch.Generator().manual_seed(settings.seed)
    rows = tokens.reshape(-1, settings.length)
    passes = -(-settings.steps * settings.batch // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
    started = time.monotonic()
    model.train()
    for step in range(settings.steps):
        done = max(step / settings.steps, (time.monotonic() - started) / (60 * settings.minutes))
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min((step + 1) / 5, 1.0, 2 * (1.0 - done))
        batch = rows[order[step * settings.batch : (step + 1) * settings.batch]]
        logits.clear()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = dense(batch, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            said = model(batch, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            divergence = functional.kl_div(said, target, log_target=True, reduction="batchmean")
            balance = torch.stack([balance_loss(found) for found in logits]).mean()
        optimizer.zero_grad()
        (divergence + settings.balance * balance).backward()
        nn.utils.clip_grad_norm_(experts + routers, 1.0)
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:3d}  KL {divergence.item():.3f}  balance {balance.item():.3f}"
                  f"  {time.monotonic() - started:4.0f} s", flush=True)  # fmt: skip
    for hook in hooks:
        hook.remove()
    model.eval().requires_grad_(False)


@torch.no_grad()
def expert_shares(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """The share of a layer's tokens that each expert gets, [layers, experts]; a row sums to the experts a token."""
    shares: list[torch.Tensor] = []

    def count(_: Any, __: Any, out: Any) -> None:
        shares.append(functional.one_hot(out[2], model.config.num_local_experts).float().sum(1).mean(0))

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    batches = rows.split(8)
    for batch in batches:
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = len(model.model.layers)
    # Every batch adds a share for each layer; the last batch may be smaller.
    weights = torch.tensor([len(b) / len(rows) for b in batches])
    return (torch.stack(shares).view(len(batches), layers, -1) * weights[:, None, None]).sum(0)


@torch.no_grad()
def merge_experts(model: Any) -> None:
    """Replace every expert of ``model``, in place, by the mean of its layer's experts."""
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.copy_(weight.mean(0, keepdim=True).expand_as(weight).clone())


def text_rows(tokenizer: Any, settings: Settings) -> torch.Tensor:
    """Windows of the zoo's training text, [rows, length], in random order."""
    ids = torch.tensor(tokenizer.encode(training_text(), add_special_tokens=False))
    rows = ids[: len(ids) // settings.length * settings.length].view(-1, settings.length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))]


def make(folder: Path, settings: Settings | None = None) -> None:
    """Build the model from the zoo's SmolLM2 and write it into ``folder`` in float16; some ten minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lillama_benchmarks.zoo.catalogue import fetch

    settings = settings or Settings()
    origin = fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(origin)
    dense: Any = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32).eval().requires_grad_(False)
    rows = text_rows(tokenizer, settings)
    model = upcycle(dense)
    differentiate(model, dense, rows[: settings.fit_tokens // settings.length], settings)
    train(model, dense, rows, settings)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
