"""The zoo: what its models are made of, and that they are worth compressing."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lillama_benchmarks.zoo import catalogue, fetch, mixtral, models, texts
from lillama_benchmarks.zoo.__main__ import main
from lillama_benchmarks.zoo.kneser_ney import KneserNey
from lillama_benchmarks.zoo.texts import held_out_text, training_text
from lillama_core.errors import UserError

ROOT = Path(__file__).parents[1]
GGUF = ROOT / ".venv" / "smollm2.gguf"
TINY = ("mamba-tiny", "falcon-mamba-tiny")


# Kneser-Ney


def test_kneser_ney_by_hand() -> None:
    """Bigrams of 0 1 0 2 0 1 1 2: 01 twice, 10, 02, 20, 11, 12 once; the stream begins with 0."""
    model = KneserNey([0, 1, 0, 2, 0, 1, 1, 2], 2)
    # Unigrams count their predecessors: 0 has 1, 2 and the beginning; 1 has 0, 1; 2 has 0, 1. n1 = 0, n2 = 2, n3 = 1.
    # Without n1, Y = 1/2: D2 = 2 - 3/2 * 1/2 = 5/4, D3 = 3 - 2 * 0 = 3. Left over: (3 + 5/4 + 5/4) / 7 = 11/14.
    unigram = [11 / 14 / 3, 0.75 / 7 + 11 / 14 / 3, 0.75 / 7 + 11 / 14 / 3]
    # Bigrams: n1 = 5, n2 = 1, Y = 5/7: D1 = 1 - 2 * 5/7 * 1/5 = 5/7, D2 = 2 - 0 = 2.
    # After 0: 01 twice, 02 once; left over (2 + 5/7) / 3.
    left = (2 + 5 / 7) / 3
    assert model.probability(0, [0]) == pytest.approx(left * unigram[0])
    assert model.probability(1, [0]) == pytest.approx(left * unigram[1])
    assert model.probability(2, [0]) == pytest.approx((1 - 5 / 7) / 3 + left * unigram[2])
    assert model.probability(2, []) == pytest.approx(unigram[2])


def slow_kneser_ney(tokens: list[int], order: int, vocabulary: int, context: tuple[int, ...], token: int) -> float:
    """The definition, word for word: every count is taken from the stream anew."""
    n = len(context) + 1
    padded = [None, *tokens]

    def count(gram: tuple[int, ...]) -> int:
        places = [i for i in range(1, len(padded) - len(gram) + 1) if tuple(padded[i : i + len(gram)]) == gram]
        if len(gram) == order:
            return len(places)
        # What stands before a gram within the highest order's reach: an n-gram longer by one, or the beginning.
        return len({padded[i - 1] for i in places})

    grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    counts = {g: count(g) for g in grams}
    values = list(counts.values())
    n1, n2, n3, n4 = (values.count(c) for c in (1, 2, 3, 4))
    Y = n1 / (n1 + 2 * n2)
    discounts = {1: 1 - 2 * Y * n2 / n1, 2: 2 - 3 * Y * n3 / n2, 3: 3 - 4 * Y * n4 / n3}
    lower = 1 / vocabulary if n == 1 else slow_kneser_ney(tokens, order, vocabulary, context[1:], token)
    after = {g[-1]: c for g, c in counts.items() if g[:-1] == context}
    if not after:
        return lower
    left = sum(discounts[min(c, 3)] for c in after.values())
    own = after.get(token, 0)
    return (own - (discounts[min(own, 3)] if own else 0) + left * lower) / sum(after.values())


def test_kneser_ney_is_its_definition() -> None:
    generator = random.Random(3)
    # Enough rare tokens that every order has n-grams seen once, twice, three and four times.
    tokens = [int(generator.paretovariate(0.7)) % 150 for _ in range(500)]
    model = KneserNey(tokens, 3, 151)
    for context in (tokens[:2], [1, 2], [1, 1], [149, 150], [1], []):
        for token in (0, 1, 2, 3, 5, 9, tokens[2], 150):
            expected = slow_kneser_ney(tokens, 3, 151, tuple(context), token)
            assert model.probability(token, context) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_kneser_ney_sums_to_one(order: int) -> None:
    generator = random.Random(order)
    tokens = [int(generator.expovariate(0.2)) % 30 for _ in range(600)]
    model = KneserNey(tokens, order, 31)
    for _ in range(20):
        context = [generator.randrange(31) for _ in range(4)]
        assert sum(model.probability(t, context) for t in range(31)) == pytest.approx(1)
        place = generator.randrange(len(tokens) - 4)
        seen = tokens[place : place + 4]
        assert sum(model.probability(t, seen) for t in range(31)) == pytest.approx(1)


def test_kneser_ney_windows_leave_their_first_token_out() -> None:
    model = KneserNey([0, 1, 0, 2, 0, 1, 1, 2], 2)
    logs = [math.log(model.probability(t, [c])) for c, t in ((0, 1), (1, 1), (2, 0), (0, 2))]
    assert model.window_perplexity([0, 1, 1, 2, 0, 2, 1], 3) == pytest.approx(math.exp(-sum(logs) / 4))


def test_kneser_ney_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="too few"):
        KneserNey([1, 2], 3)
    with pytest.raises(ValueError, match="token 5"):
        KneserNey([1, 5], 2, 4)


# The catalogue


def test_fetching_makes_a_model_once(tmp_path: Path) -> None:
    first = fetch("mamba-tiny", tmp_path)
    assert first.name == "mamba-tiny"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in first.iterdir()
    }
    changed = (first / "model.safetensors").stat().st_mtime_ns
    assert fetch("mamba-tiny", tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == changed


def test_a_model_that_could_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_SMOLLM2_GGUF", str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"absent\.gguf"):
        fetch("smollm2-135m", tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"] == ["smollm2-135m-r1"]


def test_what_a_wheel_does_not_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "CHECKPOINTS", tmp_path / "none")
    with pytest.raises(UserError, match="'mamba-tiny' comes with the repository, not with the package"):
        fetch("mamba-tiny", tmp_path / "cache")
    monkeypatch.setattr(texts, "DATA", tmp_path / "none")
    with pytest.raises(UserError, match="comes with the repository"):
        texts.training_text()


def test_an_unknown_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no model 'mamba-tin' .*did you mean 'mamba-tiny'"):
        fetch("mamba-tin", tmp_path)
    assert main(["nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoo: error: no model 'nothing'")
    assert error.count("\n") == 1


def test_without_names_the_zoo_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [m.name for m in models()]


def test_the_held_out_text_is_whole_articles_that_nothing_saw() -> None:
    assert held_out_text().startswith("= <unk> =")
    assert len(held_out_text().encode()) >= 200_000
    assert held_out_text()[:5000] not in training_text()
    assert held_out_text()[-5000:] not in training_text()


# Mamba and Falcon-Mamba


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple[str, Any, torch.Tensor]:
    """(name, model in float32, held-out windows [all, 512])."""
    folder = catalogue.CHECKPOINTS / request.param
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer.encode(held_out_text(), add_special_tokens=False))
    return request.param, model, ids[: len(ids) // 512 * 512].view(-1, 512)


def maps_of(model: Any) -> list[torch.nn.Linear]:
    return [m for block in model.backbone.layers for m in (block.mixer.in_proj, block.mixer.out_proj)]


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """By transformers' own forward pass, in float32."""
    loss = 0.0
    for batch in rows.split(8):
        logits = model(batch, use_cache=False).logits.float()
        loss += functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / (rows.numel() - len(rows)))


def test_tiny_checkpoints_are_small_and_mostly_maps(tiny: tuple[str, Any, torch.Tensor]) -> None:
    name, model, _ = tiny
    folder = catalogue.CHECKPOINTS / name
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 14_000_000
    assert len(AutoTokenizer.from_pretrained(folder)) <= 4096
    parameters = sum(p.numel() for p in model.parameters())
    assert 5_000_000 <= parameters <= 7_000_000
    assert sum(m.weight.numel() for m in maps_of(model)) >= 0.7 * parameters


def test_tiny_tokenizers_lose_nothing(tiny: tuple[str, Any, torch.Tensor]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(catalogue.CHECKPOINTS / tiny[0])
    for text in (held_out_text()[:2000], "  naïve \n\n 東京\t☃ "):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_tiny_models_beat_kneser_ney(tiny: tuple[str, Any, torch.Tensor]) -> None:
    """5-grams of the same training tokens, on the same held-out tokens, with the context before each window besides."""
    name, model, rows = tiny
    folder = catalogue.CHECKPOINTS / name
    tokens = AutoTokenizer.from_pretrained(folder).encode(training_text(), add_special_tokens=False)
    some = rows[:: len(rows) // 12]
    ngrams = KneserNey(tokens, 5, model.config.vocab_size)
    context = torch.cat([torch.zeros(1, 512, dtype=torch.long), rows[:-1]])[:: len(rows) // 12]
    logs = 0.0
    for row, before in zip(some.tolist(), context.tolist(), strict=True):
        stream = before[-4:] + row
        logs += sum(math.log(ngrams.probability(stream[i], stream[i - 4 : i])) for i in range(5, len(stream)))
    expected = math.exp(-logs / (some.numel() - len(some)))
    assert perplexity(model, some) < expected
    # What the files say was measured on all windows.
    record = json.loads((folder / "training.json").read_text())
    assert record["perplexity"] < record["kneser_ney_5gram_perplexity"]
    assert record["training_tokens"] == len(tokens)


def test_plain_svd_hurts_tiny_models(tiny: tuple[str, Any, torch.Tensor]) -> None:
    """A fifth of all parameters removed, uniform ranks, two factors a map: r (m + n) parameters."""
    _, model, rows = tiny
    some = rows[:: len(rows) // 6]
    dense = perplexity(model, some)
    maps = maps_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    kept = 1 - 0.2 * parameters / sum(m.weight.numel() for m in maps)
    weights = [m.weight.data for m in maps]
    for map_, W in zip(maps, weights, strict=True):
        m, n = W.shape
        rank = int(kept * m * n / (m + n))
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        map_.weight.data = U[:, :rank] * S[:rank] @ Vh[:rank]
    try:
        assert perplexity(model, some) >= 1.5 * dense
    finally:
        for map_, W in zip(maps, weights, strict=True):
            map_.weight.data = W


@pytest.mark.parametrize("name", TINY)
def test_compiled_scan_equals_transformers(name: str) -> None:
    """Logits and every gradient, on a small random model of each kind."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from lillama_benchmarks.zoo import fast_mamba
    from lillama_benchmarks.zoo.train_mamba import MODEL_TYPES, Settings, new_model

    model = new_model(MODEL_TYPES[name], Settings(vocabulary=50, width=32, layers=2, states=4)).train()
    tokens = torch.randint(0, 50, (3, 21), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    found = []
    fast_mamba.library(model.config.state_size)
    # What it is compiled with is its own: the process goes on to tell small numbers from zero.
    assert float("5e-324") * 1.0 > 0
    for logits in (fast_mamba.logits(model, tokens), model(tokens, use_cache=False).logits):
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        found.append([logits, *torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# Mixtral


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-4, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_an_upcycled_model_is_the_dense_one(tmp_path: Path) -> None:
    dense = tiny_llama()
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    model = mixtral.upcycle(dense)
    expected = dense(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.model.layers[0].mlp.gate.weight.normal_()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    mixtral.merge_experts(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_llama_with_biases_is_refused() -> None:
    dense = tiny_llama()
    dense.config.mlp_bias = True
    with pytest.raises(ValueError, match="biases"):
        mixtral.upcycle(dense)


def test_routers_choose_one_expert_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator) * torch.arange(1, 17) + 5
    router = mixtral.split_directions(x)
    logits = x @ router.T
    torch.testing.assert_close(logits.std(0), torch.ones(4))
    torch.testing.assert_close(logits.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    chosen = functional.one_hot(logits.topk(2).indices, 4).sum(1)
    assert (chosen[:, :2].sum(1) == 1).all()
    assert (chosen.float().mean(0) > 0.3).all()


def test_the_fitted_down_projection_minimises_its_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    H, Y, D = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((40, 6), (40, 3), (3, 6)))
    ridge = 0.1 * float((H.T @ H).diagonal().mean())
    X = mixtral.fit_down(H, Y, D, 0.1).requires_grad_(True)
    ((H @ X.T - Y).square().sum() + ridge * (X - D).square().sum()).backward()
    assert X.grad is not None
    assert X.grad.abs().max() < 1e-10


def test_experts_differ_and_learn(tmp_path: Path) -> None:
    """On a tiny Llama: the experts part, distillation brings the divergence down, and tokens are counted."""
    dense = tiny_llama()
    tokens = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(2))
    model = mixtral.upcycle(dense)
    settings = mixtral.Settings(renewed=0.25, steps=30, batch=8, length=16, rate=3e-3, minutes=5, fit_tokens=384)
    mixtral.differentiate(model, dense, tokens, settings)

    def divergence() -> float:
        said, target = (m(tokens).logits.log_softmax(-1).flatten(0, 1) for m in (model, dense))
        return float(functional.kl_div(said, target, log_target=True, reduction="batchmean"))

    before = divergence()
    assert before > 0
    mixtral.train(model, dense, tokens, settings)
    assert divergence() < before
    shares = mixtral.expert_shares(model, tokens)
    assert shares.shape == (2, 4)
    torch.testing.assert_close(shares.sum(1), torch.full((2,), 2.0))
    assert not any(p.requires_grad for p in model.parameters())
    trained = divergence()
    mixtral.merge_experts(model)
    assert divergence() > trained


# The real models


@pytest.fixture(scope="module")
def zoo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session, or the one named by LILLAMA_TEST_ZOO, whose models need not be made again."""
    if not GGUF.is_file():
        pytest.skip("run `make test`, which fetches the model")
    os.environ["LILLAMA_SMOLLM2_GGUF"] = str(GGUF)
    chosen = os.environ.get("LILLAMA_TEST_ZOO")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("zoo")


def wikitext_rows(folder: Path, windows: int) -> torch.Tensor:
    text = (ROOT / "benchmarks" / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder).encode(text[:200_000], add_special_tokens=False)
    return torch.tensor(ids[: windows * 512]).view(windows, 512)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.slow
def test_upcycled_smollm2_has_the_perplexity_of_smollm2(zoo_cache: Path) -> None:
    folder = fetch("smollm2-135m", zoo_cache)
    dense, rows = load(folder), wikitext_rows(folder, 1)
    assert perplexity(mixtral.upcycle(dense), rows) == pytest.approx(perplexity(dense, rows), rel=1e-4)


@pytest.mark.slow
def test_the_mixtral_is_worth_compressing(zoo_cache: Path) -> None:
    """Close to the dense model, every expert at work, and its experts' mean no substitute for them."""
    if not any(zoo_cache.glob("mixtral-4x-smollm2-r*/mixtral-4x-smollm2")):
        pytest.skip(f"training it takes long; it is tested where LILLAMA_TEST_ZOO (now {zoo_cache}) holds it")
    dense = fetch("smollm2-135m", zoo_cache)
    folder = fetch("mixtral-4x-smollm2", zoo_cache)
    rows = wikitext_rows(folder, 8)
    model = load(folder)
    routed = perplexity(model, rows)
    assert routed <= 1.1 * perplexity(load(dense), rows)
    assert mixtral.expert_shares(model, rows).min() >= 0.05
    mixtral.merge_experts(model)
    assert perplexity(model, rows) >= 1.1 * routed
