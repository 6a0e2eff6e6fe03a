"""What enters the blocks of a second stack: the same, whether the first is run again or hands on what it gave."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lillama_core import Request, compress, load_recipe
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import find_blocks
from lillama_core.data.modality import Samples
from lillama_core.output.record import RunRecord
from lillama_core.pipeline import engine
from lillama_core.pipeline.engine import has_stale_upstream
from lillama_core.pipeline.stack import CalibrationSplit, StackCompressor
from lillama_core.runtime import recording
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
    ((calls,), (hidden,)) = recorder.record(decoder, [batch])
    handle.remove()
    known = batch.after("encoder", seen[0])

    runs: list[int] = []
    for block in model.encoder.block:
        block.layer[0].register_forward_hook(lambda *_: runs.append(1))
    ((handed,), (entering,)) = recorder.record(decoder, [known])
    first = len(runs)
    ((again,), _) = recorder.record(decoder, [known.part(1, 3)])
    recorder.record(decoder, [known])
    # A block is looked at once for every shape, for what it returns besides.
    assert first <= 1
    assert len(runs) <= 2
    assert torch.equal(entering, hidden)
    for real, found, part in zip(calls, handed, again, strict=True):
        expected = tensors(real)
        assert expected
        for a, b in zip(expected, tensors(found), strict=True):
            torch.testing.assert_close(b, a)
        assert [len(t) for t in tensors(part) if len(t) > 1] == [2] * sum(len(t) == 3 for t in expected)


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
    known = batch.after("encoder", torch.zeros(3, 4, 8))
    ((calls,), _) = recorder.record(decoder, [known])
    first = model.encoder[0](batch.inputs["x"], 0 * batch.inputs["x"])
    assert torch.equal(calls[0].args[0], first if listens else torch.zeros(3, 4, 8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 0},
        {"compress_embeddings": True},
        {"stacks": ["decoder"]},
    ],
)
@pytest.mark.parametrize("hand_on", [True, False])
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
    measure = engine.measure_fidelity

    def noting(parent: StackHarness, found: list[tuple[Samples, Any, Any]], *rest: Any) -> dict[str, Any]:
        held.extend(batch for batch, _, _ in found)
        assert parent.depends_only_on_upstream_output is hand_on
        return measure(parent, found, *rest)

    monkeypatch.setattr(engine, "measure_fidelity", noting)
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

    def observe(self: StackCompressor, *args: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in left))
        found = compress_stack(self, *args)
        left.extend(weakref.ref(hidden) for stream in found for hidden in stream)
        return found

    monkeypatch.setattr(StackCompressor, "compress", observe)
    if not hand_on:
        monkeypatch.setattr(recording, "_same", lambda *_: False)
    compress_t5(tiny_t5(), tmp_path, tiny_tokenizer, calibration_text, steps=1)
    assert len(left) >= 16
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("chosen", "expected"), [("abc", False), ("c", False), ("bc", False), ("ab", False), ("ac", True)]
)
def test_a_dense_stack_above_a_compressed_one_has_to_be_run(chosen: str, expected: bool) -> None:
    a: Any = SimpleNamespace(stack="a", earlier=())
    b: Any = SimpleNamespace(stack="b", earlier=(a,))
    c: Any = SimpleNamespace(stack="c", earlier=(a, b))
    assert has_stale_upstream(c, chosen) is expected


@pytest.mark.parametrize(
    ("correction", "trains", "expected", "fitted"),
    [
        (0.0, False, [8, 9], 0),
        (0.5, False, [0, 1, 2, 3, 8, 9], 4),
        (3.0, False, list(range(10)), 8),
        (0.1, True, list(range(10)), 1),
    ],
)
def test_batches_that_are_followed(
    correction: float, trains: bool, expected: list[int], correction_batches: int
) -> None:
    batches = [Samples({"x": torch.tensor([[i]])}) for i in range(10)]
    found = CalibrationSplit.of(batches, 2, correction, trains)
    assert [int(batch.inputs["x"]) for batch in found.batches] == expected
    assert found.correction_batches == correction_batches
    assert [expected[i] for i in found.held_out] == [8, 9]


@pytest.mark.parametrize(("tokens", "corrects", "fitted"), [(320, True, 4), (99 * 32, True, 4), (320, False, 0)])
def test_as_many_rows_are_corrected_by_as_were_asked_for(tokens: int, corrects: bool, correction_batches: int) -> None:
    """Of data that is less than the recipe asks for (``--use-all-tokens``), too."""
    compressor: Any = SimpleNamespace(
        recipe=SimpleNamespace(tokens=tokens, correction_tokens=160, steps=0),
        record=SimpleNamespace(data={"tokens": 320}),
        initializer=SimpleNamespace(corrects=corrects),
    )
    batches = [Samples({"x": torch.tensor([[i]])}) for i in range(10)]
    found = StackCompressor.follow(compressor, batches, 2)
    assert (found.correction_batches, len(found.batches)) == (correction_batches, correction_batches + 2)
