"""``--compress-embeddings``: one low-rank table for lookups and logits, in memory, on disk, in the plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import QUICK_ANYHOW, WEIGHTS_ONLY, Ended, environment
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_generic import inputs_of, tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lillama_core import Recipe
from lillama_core.architecture.targets.bands import LEAST_ROWS, band_bounds, band_sizes
from lillama_core.architecture.targets.embedding import embedding_block, embedding_target, scale_of
from lillama_core.architecture.targets.embedding_modules import BandedEmbedding
from lillama_core.data.modality import Samples
from lillama_core.initialization import Fisher, MapStatistics
from lillama_core.models.loading import count_parameters
from lillama_core.models.outputs import main_output
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.modules import swapped_modules
from lillama_core.statistics.embedding import EmbeddingObserver
from lillama_core.statistics.sensitivity import draw_labels
from lillama_core.strategies import make


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
@pytest.mark.parametrize(
    ("model_type", "paths"),
    [
        ("t5", {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
        ("bart", {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"}),
        ("bert", {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}),
        ("rwkv", {"rwkv.embeddings"}),
    ],
)
def test_a_table_of_full_rank_changes_nothing(model_type: str, paths: set[str], format_name: str) -> None:
    model = tiny(model_type, **({"scale_embedding": True} if model_type == "bart" else {}))
    with torch.no_grad():
        # A bias of the head must survive.
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == model.config.vocab_size:
                module.bias is not None and module.bias.normal_()
    inputs = inputs_of(model.config)
    expected = main_output(model(**inputs))
    target = embedding_target(embedding_block(model))
    dense = target.modules(model)
    assert set(dense) == paths
    table = model.get_input_embeddings().weight.detach().clone() * scale_of(model.get_input_embeddings())
    target.order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))
    format_, layers, saved = make("formats", format_name), {}, 0
    # Every other band of full rank, the others dense.
    for map_ in target.maps[::2]:
        W = target.weight(model, map_).detach()
        U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
        layers[map_.name] = format_.from_factors((U * S).float(), Vt.float(), None)
        saved += W.numel() - format_.parameters(*W.shape, W.shape[1])
    before = count_parameters(model)
    target.replace(model, layers)
    assert before - count_parameters(model) == saved
    torch.testing.assert_close(main_output(model(**inputs)), expected, rtol=1e-3, atol=1e-4)
    rows = model.get_input_embeddings()(torch.arange(len(table)))
    torch.testing.assert_close(rows, table, rtol=1e-3, atol=1e-5)
    for path in paths:
        assert model.get_submodule(path).weight is model.get_input_embeddings().weight
    with swapped_modules(model, dense):
        assert torch.equal(main_output(model(**inputs)), expected)
    assert isinstance(model.get_input_embeddings(), BandedEmbedding)


@given(vocabulary=st.integers(1, 300_000), width=st.integers(1, 9000))
def test_bands_cover_the_vocabulary(vocabulary: int, width: int) -> None:
    sizes = band_sizes(vocabulary, width)
    assert sum(sizes) == vocabulary
    assert all(size > 0 for size in sizes)
    assert len(sizes) == 1 or min(sizes) >= LEAST_ROWS * width
    bounds = band_bounds(vocabulary, width)
    assert [stop - start for start, stop in bounds] == list(sizes)
    # Each is as large as all before it, but for rounding.
    assert all(abs(size - start) <= 1 for (start, _), size in zip(bounds[1:], sizes[1:], strict=True))


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
def test_compress_a_tied_model(
    format_name: str, tiny_model: Path, tmp_path: Path, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    out = tmp_path / "out"
    options = ["--compress-embeddings", "--format", format_name, "--reduction", "0.3", "--allocation", "uniform"]
    ended = run_cli("compress", tiny_model, "-o", out, *options, "--calibration", calibration_text, *QUICK_ANYHOW)
    assert ended.status == 0, ended
    written = json.loads((out / "lillama.json").read_text())
    ranks = {name.rpartition(".")[2]: r for name, r in written["plan"]["ranks"].items() if "embed_tokens" in name}
    shapes = [shape for name, shape in written["shapes"].items() if "embed_tokens" in name]
    vocabulary = sum(rows for rows, _ in shapes)
    assert len(shapes) == len(ranks) == 3
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (shapes[0][0], ranks["0"])
    order = torch.argsort(tensors["model.embed_tokens.positions"].long())
    assert order.sort().values.equal(torch.arange(vocabulary))
    assert not any(name.startswith("lm_head") for name in tensors)
    target = json.loads((out / "config.json").read_text())["quantization_config"]["sites"]["model.embed_tokens"]
    assert target == {"kind": "banded-embedding", "format": format_name, "ranks": ranks}

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert count_parameters(loaded) == written["parameters"]["parameters_after"]
    assert 0.69 < count_parameters(loaded) / count_parameters(dense) <= 0.7
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.randint(3, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    generated = loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 9
    # By hand: lookup and logits are products with the one table U A.
    table = loaded.model.embed_tokens(torch.arange(vocabulary))
    with torch.no_grad():
        hidden = loaded.model(tokens).last_hidden_state
        torch.testing.assert_close(loaded(tokens).logits, hidden @ table.T, rtol=1e-4, atol=1e-5)
    code = (
        "import sys, torch, lillama_core\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder, again = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "model.save_pretrained(again)\n"
        "other = AutoModelForCausalLM.from_pretrained(again).eval()\n"
        "tokens = torch.arange(12).view(2, 6)\n"
        "assert torch.equal(model(tokens).logits, other(tokens).logits)\n"
    )
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "again")]
    done = warm.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr

    # A loader that does not know the format must not fill the table with random numbers.
    settings = json.loads((out / "config.json").read_text())
    del settings["quantization_config"]
    (out / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(out)


def test_factors_minimise_the_errors_of_both_uses(make_model: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "tiny")).requires_grad_(False)
    target = embedding_target(embedding_block(model))
    observer = EmbeddingObserver(target)
    ids = torch.randint(0, 40, (6, 12))
    x = torch.randn(72, 32) @ torch.randn(32, 32)
    rows = x.clone().requires_grad_(True)
    with observer.observe(model):
        logits = model.lm_head(rows)
        gradient = logits.softmax(-1) - nn.functional.one_hot(torch.randint(0, 384, (72,)), 384)
        logits.backward(gradient)
    entry = torch.randn(50, 32) @ torch.randn(32, 32)
    observer.entry.add(entry)
    needed, tokens = observer.needed(Samples({"input_ids": ids}))
    frequency = torch.bincount(ids.flatten(), minlength=384) / ids.numel()
    expected = 0.9 * (logits.softmax(-1).mean(0) + frequency) / 2 + 0.1 / 384
    torch.testing.assert_close(needed.float(), expected.detach(), rtol=1e-4, atol=1e-7)
    assert tokens == 72
    target.order = needed.argsort(descending=True)
    inputs = x.T @ x / 72 + entry.T @ entry / 50
    for map_, (start, stop) in zip(target.maps, target.bounds, strict=True):
        W, often = target.weight(model, map_), needed[target.order[start:stop]]
        statistics = observer.statistics(W, often, 12)
        torch.testing.assert_close(statistics.inputs, inputs, rtol=1e-4, atol=1e-4)
        weights = often.float().diag()
        torch.testing.assert_close(statistics.gradients, W.T @ weights @ W, rtol=1e-3, atol=1e-9)
        assert statistics.gradient_scale == pytest.approx(often.mean().item(), rel=1e-4)
        found = Fisher().decompose(W, statistics)
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        for rank in (4, 16):
            B, A = found.factors(W, rank)
            errors = [
                torch.trace(weights @ (W - other) @ inputs @ (W - other).T).item()
                for other in (B @ A, U[:, :rank] * S[:rank] @ Vt[:rank])
            ]
            assert errors[0] < 0.9 * errors[1]


def test_a_scaled_table_has_the_factors_of_the_plain_one_that_it_stands_for(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows of W times 5 on their way in are the rows of 5 W: the gradients there are the same, and so is 5 W' ."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    config = AutoConfig.for_model("llama", tie_word_embeddings=False, vocab_size=60, hidden_size=16,
                                  intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    W, entry, ids = torch.randn(60, 16), torch.randn(50, 16) @ torch.randn(16, 16), torch.randint(0, 60, (4, 9))
    found = []
    for scale in (1.0, 5.0):
        table = Gemma2TextScaledWordEmbedding(60, 16, 0, embed_scale=scale)
        table.weight.data = W / scale
        model.set_input_embeddings(table)
        target = embedding_target(embedding_block(model))
        observer = EmbeddingObserver(target)
        gain = observer.gain(model, lambda table=table: [table(ids)])
        assert gain == pytest.approx(scale)
        observer.entry.add(gain * entry)
        assert len(target.maps) == 1
        needed, tokens = observer.needed(Samples({"input_ids": ids}))
        statistics = observer.statistics(table.weight, needed, tokens / 4)
        decomposed = Fisher().decompose(table.weight.detach(), statistics)
        B, A = decomposed.factors(table.weight.detach(), 6)
        found.append((scale * B @ A, decomposed.spectrum.squared_singular_values))
    torch.testing.assert_close(*(factors for factors, _ in found), rtol=1e-3, atol=1e-4)
    # And what is lost by cutting it off is the same number of nats.
    torch.testing.assert_close(*(squared_singular_values for _, squared_singular_values in found), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 1 / 16, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_predicted_losses_count_what_the_model_multiplies_around_the_table(
    model_type: str, settings: dict[str, Any]
) -> None:
    """Of noise on a tied table: twice the divergence that it causes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, initializer_range=0.1, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    observer = EmbeddingObserver.of(embedding_block(model))
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.randn(200, generator=generator).softmax(0)
    ids = torch.multinomial(frequencies, 16 * 64, True, generator=generator).view(16, 64)
    entering: list[torch.Tensor] = []

    def enter() -> list[torch.Tensor]:
        entering.clear()
        with torch.no_grad():
            model(ids, use_cache=False)
        return entering.copy()

    def note(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        entering.append([*args, *named.values()][0])

    model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    gain = observer.gain(model, enter)
    assert gain == pytest.approx(settings.get("embedding_multiplier", 1.0), rel=1e-3)
    with observer.observe(model):
        for row in ids:
            entering.clear()
            logits = model(row[None], use_cache=False).logits
            entering[0].retain_grad()
            labels = draw_labels(logits.detach()[0].softmax(-1), generator)
            logits.backward(logits.detach().softmax(-1).scatter_add(2, labels[None], -torch.ones(1, 64, 1)))
            assert entering[0].grad is not None
            observer.entry.add(gain * entering[0].grad[0])
    needed, tokens = observer.needed(Samples({"input_ids": ids}))
    W = model.get_input_embeddings().weight
    noise = 0.02 * W.std().item() * torch.randn(W.shape, generator=generator)
    statistics = observer.statistics(W.detach(), needed, tokens / len(ids))
    predicted = statistics.rows * (needed.float()[:, None] * (noise @ statistics.inputs) * noise).sum().item()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits.log_softmax(-1)
        W.add_(noise)
        after = model(ids, use_cache=False).logits.log_softmax(-1)
    measured = 2 * (before.exp() * (before - after)).sum().item() / len(ids)
    assert 0.8 < measured / predicted < 1.3


def test_without_sensitivity_the_frequencies_of_tokens_still_count(
    tiny_model: Path, tmp_path: Path, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    tables = []
    for init in ("activation", "svd"):
        ended = run_cli("compress", tiny_model, "-o", tmp_path / init, "--compress-embeddings",
                        "--allocation", "uniform", "--reduction", "0.3", "--calibration", calibration_text,
                        *WEIGHTS_ONLY, "--init", init, "--format", "factored")  # fmt: skip
        assert ended.status == 0, ended
        model = AutoModelForCausalLM.from_pretrained(tmp_path / init)
        tables.append(model.model.embed_tokens(torch.arange(100)).detach())
    assert (tables[0] - tables[1]).norm() > 0.01 * tables[1].norm()


def test_frequencies_of_tokens_are_those_of_training_rows(
    tiny_model: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is about rows that nothing was fitted to."""
    seen: list[Samples] = []
    take = EmbeddingObserver.needed

    def noting(observer: EmbeddingObserver, data: Samples) -> tuple[torch.Tensor, float]:
        seen.append(data)
        return take(observer, data)

    monkeypatch.setattr(EmbeddingObserver, "needed", noting)
    recipe = Recipe(
        calibration=(str(calibration_text),), self_share=0.0, tokens=512, sequence_length=32, batch_size=2,
        held_out=0.25, steps=0, compress_embeddings=True, sensitivity_tokens=64, rescaling_tokens=0,
        reduction=0.3, compute="float32",
    )  # fmt: skip
    record = compress(Request(str(tiny_model), tmp_path / "out", recipe), "quiet")
    (data,) = seen
    assert record.data["rows"] == 16
    assert len(data) == 12


def test_padding_counts_for_nothing(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Rows filled up with a token that is masked give what the rows alone give."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "tiny")).requires_grad_(False)
    target = embedding_target(embedding_block(model))
    torch.manual_seed(2)
    x, gradient = torch.randn(3, 5, 32), torch.randn(3, 5, 384)
    ids = torch.randint(2, 40, (3, 5))

    def statistics(padding: int) -> tuple[MapStatistics, torch.Tensor]:
        observer = EmbeddingObserver(target)
        mask = nn.functional.pad(torch.ones(3, 5), (0, padding))
        rows = torch.cat((x, torch.randn(3, padding, 32)), 1).requires_grad_(True)
        with observer.observe(model):
            model.lm_head(rows).backward(nn.functional.pad(gradient, (0, 0, 0, padding)))
        filled = nn.functional.pad(ids, (0, padding), value=1)
        needed, tokens = observer.needed(Samples({"decoder_input_ids": filled}, masks={"decoder": mask}))
        return observer.statistics(model.get_input_embeddings().weight, needed, tokens / 3), needed

    (alone, needed), (padded, needed_padded) = statistics(0), statistics(4)
    torch.testing.assert_close(padded.inputs, alone.inputs)
    torch.testing.assert_close(needed_padded, needed)
    assert padded.rows == alone.rows == 5


def test_mistakes(tiny_model: Path, run_cli: Callable[..., Ended]) -> None:
    plan: Any = run_cli("plan", tiny_model, "--compress-embeddings", "--stacks", "decoder")
    assert "--compress-embeddings and --stacks exclude each other" in plan.error
    planned = run_cli("plan", tiny_model, "--compress-embeddings")
    assert planned.status == 0
    assert "model.embed_tokens" in planned.stdout
    with pytest.raises(Exception, match="no token embedding"):
        embedding_block(tiny("vit"))
