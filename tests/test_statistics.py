"""Second moments and the block-wise backward pass, against the whole model's own arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import Samples
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.block_runner import BlockRunner, share_equal
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.recording import Recorder
from lillama_core.runtime.states import StateStore
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.moments import SecondMoment
from lillama_core.statistics.observers import InputObserver
from lillama_core.statistics.sensitivity import Piece, SensitivityPass, draw_labels, output_gradient
from lillama_core.system import seeds
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [5, 384, 900])
def test_second_moment_equals_the_plain_product(size: int) -> None:
    rows = torch.randn(64, size)
    moment = SecondMoment()
    for part in rows.split(20):
        moment.add(part)
    torch.testing.assert_close(moment.mean(), rows.T @ rows / 64, rtol=1e-4, atol=1e-5)


def test_second_moment_is_not_rounded_by_autocast() -> None:
    rows = torch.randn(64, 10)
    moment = SecondMoment()
    with torch.autocast("cpu", torch.bfloat16):
        moment.add(rows)
    torch.testing.assert_close(moment.mean(), rows.T @ rows / 64)


def parts(model: nn.Module):
    architecture = find_architecture(model.config)
    blocks = find_blocks(architecture, model)["decoder"]
    return architecture, blocks, StackHarness(model, architecture, blocks), ResidentSource(model, torch.device("cpu"))


def test_chained_blocks_equal_the_whole_forward() -> None:
    model = tiny_llama()
    architecture, blocks, parent, source = parts(model)
    tokens = torch.randint(0, 50, (2, 9))
    hidden, calls = parent.record({"input_ids": tokens})
    runner = BlockRunner(architecture, [calls], torch.device("cpu"), None)
    for block in blocks:
        hidden = runner(source.block(block), block, 0, hidden)
    torch.testing.assert_close(parent.outputs({"input_ids": tokens}, hidden).logits, model(tokens).logits)


def test_the_model_is_whole_again_after_its_blocks_were_bypassed() -> None:
    model = tiny_llama()
    _, _, parent, _ = parts(model)
    tokens = torch.randint(0, 50, (1, 5))
    before = model(tokens).logits
    parent.record({"input_ids": tokens})
    torch.testing.assert_close(model(tokens).logits, before)


def test_equal_arguments_are_held_once() -> None:
    model = tiny_llama()
    _, _, parent, _ = parts(model)
    _, first = parent.record({"input_ids": torch.randint(0, 50, (2, 9))})
    _, second = parent.record({"input_ids": torch.randint(0, 50, (2, 9))})
    shared = share_equal(first, second)
    for a, b in zip(first, shared, strict=True):
        assert a.kwargs["position_embeddings"][0] is b.kwargs["position_embeddings"][0]


def test_maps_that_read_one_tensor_share_a_moment() -> None:
    model = tiny_llama()
    _, blocks, parent, source = parts(model)
    hidden, calls = parent.record({"input_ids": torch.randint(0, 50, (2, 9))})
    module = source.block(blocks[0])
    observer = InputObserver(blocks[0])
    seen: dict[str, torch.Tensor] = {}
    for target in blocks[0].targets:
        module.get_submodule(target.name).register_forward_pre_hook(
            lambda _m, inputs, name=target.name: seen.update({name: inputs[0].reshape(-1, inputs[0].shape[-1])})
        )
    with observer.observe(module):
        module(hidden, *calls[0].args, **calls[0].kwargs)
    assert len(observer.moments) == 4  # q k v | o | gate up | down
    for name, rows in seen.items():
        torch.testing.assert_close(observer.moment(name), rows.T @ rows / len(rows))


def block_wise_gradients(
    stacks: list[StackHarness], samples: Samples, folder: Path, stop_after: str | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """What the backward pass finds for every block of a chain of stacks, by the block's name.

    Everything is made anew behind the block ``stop_after``, and goes on from the files.
    """
    recorder = Recorder(stacks[0].architecture, torch.device("cpu"), None)
    (folder / "states").mkdir()
    states, batches = StateStore(folder / "states", torch.float32), ActivationStore(recorder, [samples])
    for harness in stacks:
        found = batches.record(harness)
        states.write(harness.stack, 0, {0: found.hidden[0]})
        for block in harness.blocks:
            found.advance(harness.source.block(block), block)
            states.write(harness.stack, block.index + 1, {0: found.hidden[0]})
        batches.keep_output(harness.stack, found.hidden)

    def begin() -> SensitivityPass:
        pieces = [Piece(0, slice(0, len(samples)), len(samples))]
        return SensitivityPass(stacks, recorder, batches, pieces, range(len(samples)), states, folder, 7)

    measured = begin()
    measured.start()
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for position in reversed(range(len(stacks))):
        harness = stacks[position]
        for block in reversed(harness.blocks):
            seen[block.name] = measured.block(block, harness.source.block(block)).statistics()
            measured.forget(block)
            if block.name == stop_after:
                measured = begin()
                assert measured.resume(lambda b: b.name in seen) == (position, block.index)
        if position:
            measured.leave(harness)
    return seen


def draw(logits: torch.Tensor) -> torch.Tensor:
    """The labels [rows * length, 1] that the pass draws from logits [rows, length, classes]."""
    parts = [draw_labels(row.detach().softmax(-1), seeds.stream(7, "labels", i)) for i, row in enumerate(logits)]
    return torch.cat(parts)


def test_block_wise_gradients_equal_those_of_the_whole_model(tmp_path: Path) -> None:
    """The same labels, one ordinary backward pass through the whole model: the same second moments."""
    model = tiny_llama()
    _, blocks, parent, source = parts(model)
    tokens = torch.randint(0, 50, (2, 9))
    inputs = {"input_ids": tokens}
    found = block_wise_gradients([parent], Samples(inputs), tmp_path)

    gradients: dict[str, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []

    def keep(name: str):
        def hook(_m: nn.Module, _i: tuple, out) -> None:
            out = out[0] if isinstance(out, tuple) else out
            out.register_hook(lambda g: gradients.update({name: g.reshape(-1, g.shape[-1])}))
            outputs.append(out)

        return hook

    for block in blocks:
        module = model.get_submodule(block.path)
        module.register_forward_hook(keep(block.name))
        for target in block.targets:
            module.get_submodule(target.name).register_forward_hook(keep(f"{block.name}/{target.name}"))
    embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits
    labels = draw(logits)
    logits.reshape(-1, 50).log_softmax(-1).gather(1, labels).sum().neg().backward()
    for block in blocks:
        statistics = found[block.name]
        g = gradients[block.name]
        torch.testing.assert_close(statistics["output"], g.T @ g / 18, rtol=1e-3, atol=1e-6)
        module = source.block(block)
        for target in block.targets:
            g = gradients[f"{block.name}/{target.name}"]
            assert statistics[f"scale.{target.name}"].item() == pytest.approx(g.square().mean().item(), rel=1e-3)
            W = target.weight(module, target.maps[0])
            if W.shape[0] > W.shape[1]:
                g = g @ W
            torch.testing.assert_close(statistics[f"gradients.{target.name}"], g.T @ g / 18, rtol=1e-3, atol=1e-5)


def test_output_gradient_is_that_of_the_log_likelihood() -> None:
    model = tiny_llama()
    _, _, parent, _ = parts(model)
    tokens = torch.randint(0, 50, (1, 6))
    hidden = torch.randn(1, 6, 24)
    found = output_gradient(parent, {"input_ids": tokens}, hidden, torch.Generator().manual_seed(3))
    x = hidden.clone().requires_grad_(True)
    logits = model.lm_head(model.model.norm(x)).reshape(-1, 50)
    labels = draw_labels(logits.detach().softmax(-1), torch.Generator().manual_seed(3))
    logits.log_softmax(-1).gather(1, labels).sum().neg().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-6)


def test_labels_come_as_often_as_their_probabilities_say() -> None:
    probabilities = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    labels = draw_labels(probabilities.expand(20_000, -1), torch.Generator().manual_seed(0))
    often = torch.bincount(labels.flatten(), minlength=6) / 20_000
    assert often[[0, 2, 5]].sum() == 0
    # Four standard deviations of a binomial distribution.
    assert (often - probabilities).abs().max() < 4 * (0.6 * 0.4 / 20_000) ** 0.5


def test_core_names_no_architecture() -> None:
    """The core must not know which models there are."""
    import re

    import lillama_core

    folder = Path(lillama_core.__file__).parent
    names = re.compile(r"\b(whisper|mamba|mixtral|falcon|phi|gemma|qwen|gpt2|mistral)", re.IGNORECASE)
    for file in folder.rglob("*.py"):
        assert not names.search(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("stop_after", [None, "decoder.1", "decoder.0", "encoder.1"])
@pytest.mark.parametrize("length", [5, 8])
def test_gradients_reach_the_stack_below_and_maps_that_read_nothing_else(
    length: int, stop_after: str | None, tmp_path: Path
) -> None:
    """One backward pass through both stacks equals autograd's through the whole model; padding counts for nothing.

    Where both streams have one length, what counts follows the stream that a map reads, not its shape.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8, init_std=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    architecture = find_architecture(config)
    blocks = find_blocks(architecture, model)
    encoder = StackHarness(model, architecture, blocks["encoder"])
    decoder = StackHarness(model, architecture, blocks["decoder"], (encoder,))
    decoder.depends_only_on_upstream_output = True
    inputs = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.randint(3, 60, (2, length))}
    kept = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]]).float()
    written = torch.ones(2, length)
    written[0, 2:] = 0
    samples = Samples(inputs, masks={"decoder": written, "encoder": kept})
    found = block_wise_gradients([encoder, decoder], samples, tmp_path, stop_after)

    gradients: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(_m: nn.Module, _i: tuple, out: torch.Tensor) -> None:
            if not out.requires_grad:
                out.requires_grad_(True)
            out.register_hook(lambda g: gradients.update({name: g}))

        return watch

    # A frozen model: without this the encoder would have no graph.
    model.model.encoder.conv1.weight.requires_grad_(True)
    watched = [(b, m) for stack in blocks.values() for b in stack for m in b.maps]
    for block, map_ in watched:
        model.get_submodule(block.full_name(map_)).register_forward_hook(hook(block.full_name(map_)))
    logits = model(**inputs).logits
    logits.reshape(-1, 60).log_softmax(-1).gather(1, draw(logits)).sum().neg().backward()
    for block, map_ in watched:
        mask = written if block.stack == "decoder" and ".encoder_attn." not in block.full_name(map_) else kept
        if map_.name in ("encoder_attn.q_proj", "encoder_attn.out_proj"):
            mask = written
        g = gradients[block.full_name(map_)][mask > 0]
        W = model.get_submodule(block.full_name(map_)).weight
        if W.shape[0] > W.shape[1]:
            g = g @ W
        torch.testing.assert_close(found[block.name][f"gradients.{map_.name}"], g.T @ g / len(g), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reads_encoder", [False, True])
def test_what_comes_after_the_decoder_needs_no_encoder(reads_encoder: bool) -> None:
    """The encoder's blocks are passed over where the outputs do not tell the difference, and there alone."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=1, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    architecture = Architecture(name="t", stacks={"encoder": "encoder.block", "decoder": "decoder.block"})
    blocks = find_blocks(architecture, model)
    encoder = StackHarness(model, architecture, blocks["encoder"])
    decoder = StackHarness(model, architecture, blocks["decoder"], (encoder,))
    inputs = {"input_ids": torch.randint(2, 60, (2, 7)), "decoder_input_ids": torch.randint(2, 60, (2, 5))}
    if reads_encoder:
        seen: list[torch.Tensor] = []
        model.encoder.register_forward_hook(lambda *call: seen.append(call[2][0]))
        model.lm_head.register_forward_hook(lambda _m, _i, out: out + seen[-1].sum())
    last = torch.randn(2, 5, 16)
    expected = StackHarness(model, architecture, blocks["decoder"]).outputs(inputs, last).logits
    calls: list[int] = []
    model.encoder.block[0].layer[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        assert torch.equal(decoder.outputs(inputs, last).logits, expected)
    # Tried once with the encoder; its first block is also looked at once, for what it returns besides.
    assert len(calls) == 2 + (3 if reads_encoder else 0)


def test_what_a_stack_was_given_goes_when_the_way_back_has_passed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an encoder says of all recordings is several times as large as what its own way back needs."""
    made = make_tiny_model(registry().architectures_for("whisper")[0], "whisper", tmp_path / "dense")
    config, recipe = made.load().config, made.recipe(samples=24)
    # A batch of what the encoder gave, which the way back takes two rows of at a time.
    shape = (config.max_source_positions, config.d_model)
    size = 4 * recipe.batch_size * shape[0] * shape[1]
    batches: dict[str, int] = {}
    carry = SensitivityPass.block

    def look(self: SensitivityPass, block: Any, module: nn.Module) -> Any:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[1:] == shape]
        places = {t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes() == size}
        batches[block.stack] = max(batches.get(block.stack, 0), len(places))
        return carry(self, block, module)

    monkeypatch.setattr(SensitivityPass, "block", look)
    compress(Request(str(made.folder), tmp_path / "small", recipe), "quiet")
    # Of the first batch what the encoder gave, and a norm of it that the decoder's blocks read.
    assert batches == {"decoder": 2, "encoder": 0}
