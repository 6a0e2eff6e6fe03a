"""What enters blocks: the same each time, and of a second stack also where the first hands on what it gave."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, T5Config, T5ForConditionalGeneration

from lillama_core import UserError, load_recipe
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import find_blocks
from lillama_core.data.modality import Samples
from lillama_core.distillation.stack import StackCompressor
from lillama_core.output.record import RunRecord
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.stages import report
from lillama_core.runtime import recording
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.weight_source import ResidentSource

CPU = torch.device("cpu")
T5 = Architecture(name="t", stacks={"encoder": "encoder.block", "decoder": "decoder.block"})


def tiny_t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.architectures = ["T5ForConditionalGeneration"]
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def compress_t5(dense: Any, folder: Path, tokenizer: Any, text: Path, **options: Any) -> RunRecord:
    """A small run on ``dense``; the result is in ``folder / "out"``."""
    dense.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    recipe = load_recipe("default").with_options({
        "calibration": [str(text)], "reduction": 0.2, "tokens": 512, "sequence_length": 32, "steps": 4,
        "sensitivity_tokens": 128, "rescaling_tokens": 64, "compute": "float32",
        **options,
    })  # fmt: skip
    return compress(Request(str(folder / "dense"), folder / "out", recipe, "auto"), "quiet")


def parts(model: nn.Module, architecture: Architecture) -> tuple[Recorder, StackHarness, StackHarness, ResidentSource]:
    blocks = find_blocks(architecture, model)
    encoder = StackHarness(model, architecture, blocks["encoder"])
    decoder = StackHarness(model, architecture, blocks["decoder"], (encoder,))
    return Recorder(architecture, CPU, None), encoder, decoder, ResidentSource(model, CPU)


def batch_of(rows: int = 3) -> Samples:
    tokens = torch.randint(2, 60, (rows, 7), generator=torch.Generator().manual_seed(1))
    return Samples({"input_ids": tokens, "decoder_input_ids": tokens[:, :5]})


def test_an_encoder_that_hands_on_is_not_run_again() -> None:
    model = tiny_t5()
    recorder, encoder, decoder, source = parts(model, T5)
    batch = batch_of()
    recorder.check(encoder, batch.inputs, source)
    recorder.check(decoder, batch.inputs, source)
    assert decoder.depends_only_on_upstream_output
    seen: list[torch.Tensor] = []
    handle = model.encoder.block[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    ((calls,), (hidden,)) = recorder.record(decoder, [batch.inputs])
    handle.remove()
    known = {"encoder": [seen[0]]}
    part = {"encoder": [seen[0][1:3]]}

    runs: list[int] = []
    for block in model.encoder.block:
        block.layer[0].register_forward_hook(lambda *_: runs.append(1))
    ((handed,), (entering,)) = recorder.record(decoder, [batch.inputs], known)
    first = len(runs)
    ((again,), _) = recorder.record(decoder, [batch.part(1, 3).inputs], part)
    recorder.record(decoder, [batch.inputs], known)
    # A block is looked at once for every shape, for what it returns besides.
    assert first <= 1
    assert len(runs) <= 2
    assert torch.equal(entering, hidden)
    for real, found, some in zip(calls, handed, again, strict=True):
        expected = tensors(real)
        assert expected
        for a, b in zip(expected, tensors(found), strict=True):
            torch.testing.assert_close(b, a)
        assert [len(t) for t in tensors(some) if len(t) > 1] == [2] * sum(len(t) == 3 for t in expected)


def tensors(call: Any) -> list[torch.Tensor]:
    return [v for v in [*call.args, *call.kwargs.values()] if isinstance(v, torch.Tensor)]


class TwoStacks(nn.Module):
    """A second stack that is also told what the first block of the first one gave, if it listens."""

    def __init__(self, listens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.listens = listens
        self.encoder = nn.ModuleList(Layer() for _ in range(2))
        self.decoder = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        first = self.encoder[0](x, 0 * x)
        last = self.encoder[1](first, 0 * x)
        for block in self.decoder:
            x = block(x, first if self.listens else last)
        return SimpleNamespace(logits=x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(hidden + other).tanh()


@pytest.mark.parametrize("listens", [False, True])
def test_what_is_told_of_other_blocks_cannot_be_handed_on(listens: bool) -> None:
    model = TwoStacks(listens).eval().requires_grad_(False)
    architecture = Architecture(name="t", stacks={"encoder": "encoder", "decoder": "decoder"})
    recorder, _, decoder, source = parts(model, architecture)
    batch = Samples({"x": torch.randn(3, 4, 8)})
    recorder.check(decoder, batch.inputs, source)
    assert decoder.depends_only_on_upstream_output is not listens
    # The real thing is run then, whatever is known.
    known = ActivationStore(recorder, [batch])
    known.keep_output("encoder", [torch.zeros(3, 4, 8)])
    (calls,) = known.record(decoder).runner.calls
    first = model.encoder[0](batch.inputs["x"], 0 * batch.inputs["x"])
    assert torch.equal(calls[0].args[0], first if listens else torch.zeros(3, 4, 8))


@pytest.mark.parametrize(
    ("hand_on", "options"),
    [
        (True, {}),
        (True, {"steps": 0}),
        (True, {"compress_embeddings": True}),
        (True, {"stacks": ["decoder"]}),
        (False, {"compress_embeddings": True}),
        (False, {"stacks": ["decoder"]}),
    ],
)
def test_what_is_reported_is_what_the_whole_models_say(
    hand_on: bool,
    options: dict[str, Any],
    tmp_path: Path,
    tiny_tokenizer: Any,
    calibration_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The streams through both stacks, block by block, end where the dense and the written model end."""
    dense = tiny_t5()
    held: list[Samples] = []
    measure = report.measure_fidelity

    def noting(parent: StackHarness, found: list[tuple[Samples, Any, Any]], *rest: Any) -> dict[str, Any]:
        held.extend(batch for batch, _, _ in found)
        assert parent.depends_only_on_upstream_output is hand_on
        return measure(parent, found, *rest)

    monkeypatch.setattr(report, "measure_fidelity", noting)
    if not hand_on:
        monkeypatch.setattr(recording, "_same", lambda *_: False)
    record = compress_t5(dense, tmp_path, tiny_tokenizer, calibration_text, dtype="float32", **options)
    assert record.fidelity is not None

    result = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    divergence, agreement, size = 0.0, 0, 0
    with torch.no_grad():
        for batch in held:
            kept = (
                torch.ones_like(batch.inputs["decoder_input_ids"]) if batch.output_mask is None else batch.output_mask
            )
            p, q = (m(**batch.inputs).logits[kept > 0].log_softmax(-1) for m in (dense, result))
            divergence += (p.exp() * (p - q)).sum().item()
            agreement += int((p.argmax(-1) == q.argmax(-1)).sum())
            size += len(p)
    assert record.fidelity["tokens"] == size > 0
    assert record.fidelity["divergence"] == pytest.approx(divergence / size, rel=1e-3)
    assert record.fidelity["agreement"] == pytest.approx(agreement / size, abs=2 / size)


@pytest.mark.parametrize("hand_on", [True, False])
def test_streams_of_a_stack_end_with_it(
    hand_on: bool, tmp_path: Path, tiny_tokenizer: Any, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last stack is compressed, what left those below it is in memory no more."""
    left: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    compress_stack = StackCompressor.compress

    def observe(self: StackCompressor, *args: Any) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in left))
        compress_stack(self, *args)
        left.extend(weakref.ref(hidden) for hidden in args[3].hidden)

    monkeypatch.setattr(StackCompressor, "compress", observe)
    if not hand_on:
        monkeypatch.setattr(recording, "_same", lambda *_: False)
    compress_t5(tiny_t5(), tmp_path, tiny_tokenizer, calibration_text, steps=1)
    assert len(left) >= 8
    assert alive == [0, 0]


def test_blocks_run_again_find_nothing_of_their_first_run() -> None:
    """The forward pass of this model takes no ``use_cache``, and its config asks for one."""
    torch.manual_seed(0)
    config = GraniteMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model: Any = GraniteMoeForCausalLM(config).eval().requires_grad_(False)
    architecture = Architecture(name="t", stacks={"decoder": "model.layers"})
    (block,) = find_blocks(architecture, model)["decoder"]
    harness, recorder = StackHarness(model, architecture, [block]), Recorder(architecture, CPU, None)
    calls, (hidden,) = recorder.record(harness, [{"input_ids": torch.arange(32).view(2, 16)}])
    module, runner = ResidentSource(model, CPU).block(block), recorder.runner(calls)
    first = runner(module, block, 0, hidden)
    assert torch.equal(runner(module, block, 0, hidden), first)
    for name in ("v_proj", "k_proj"):
        module.get_submodule(f"self_attn.{name}").weight.mul_(-3)
        second = runner(module, block, 0, hidden)
        assert not torch.allclose(second, first, rtol=1e-3, atol=0)
        first = second
    assert model.config.use_cache


class Remembering(nn.Module):
    """A block that finds what its first run gave in one of its arguments, or adds some of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.used, self.remembered = nn.Linear(8, 8), nn.Linear(8, 8)
        self.how = how

    def forward(self, hidden: torch.Tensor, memory: list[torch.Tensor]) -> torch.Tensor:
        found = self.remembered(hidden)
        if self.how == "adds":
            found = sum(memory, found)
        elif self.how == "finds" and memory:
            found = memory[0]
        if self.how != "forgets":
            memory.append(found.detach())
        return hidden + self.used(hidden) + found * (0 if self.how == "drops" else 1)


class WithMemory(nn.Module):
    def __init__(self, *how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.blocks = nn.ModuleList(map(Remembering, how))

    def forward(self, x: torch.Tensor) -> Any:
        memories: list[list[torch.Tensor]] = [[] for _ in self.blocks]
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, memory)
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        (("finds", "finds"), r"blocks\.0\.remembered has no effect on what its block gives.* --exclude 'remembered'"),
        (("forgets", "adds"), r"block blocks\.1 gives something else when it is run again with the same arguments"),
        (("forgets", "drops"), None),
    ],
)
def test_maps_must_have_an_effect(how: tuple[str, ...], complaint: str | None) -> None:
    """In some block at least: others may have been set to zero by whoever made the model."""
    model = WithMemory(*how).eval().requires_grad_(False)
    architecture = Architecture(name="t", stacks={"blocks": "blocks"})
    harness = StackHarness(model, architecture, find_blocks(architecture, model)["blocks"])
    recorder, source = Recorder(architecture, CPU, None), ResidentSource(model, CPU)
    inputs = {"x": torch.randn(2, 4, 8)}
    if complaint is not None:
        with pytest.raises(UserError, match=complaint):
            recorder.check(harness, inputs, source)
        return
    recorder.check(harness, inputs, source)
    assert harness.idle_maps == ("blocks.1.remembered",)
