"""Mamba and Falcon-Mamba: compressed, loaded, trained, with and without kernels; mamba-ssm's own checkpoints."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import core_names, environment
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lillama_core import LillamaError, Recipe, UserError
from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.formats import LowRankLinear
from lillama_core.models.loading import count_parameters
from lillama_core.models.source import locate
from lillama_core.pipeline import Request, compress
from lillama_core.strategies import make
from lillama_plugins.mamba.mixer import call_maps_as_modules
from lillama_plugins.mamba.native import MambaSsmCheckpoint

FAMILIES = ("mamba", "falcon_mamba")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
TOKENS = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(0))
FACTORS = ("mixer.in_proj", "mixer.out_proj")


def tiny(family: str, vocabulary: int = 160, **changes: Any) -> Any:
    """A random model whose projections have biases, and whose scan is far from both forgetting and averaging."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, "vocab_size": vocabulary, "use_bias": True, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_proj.bias") or "norm" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compressed(
    family: str, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, calibration_text: Path
) -> Path:
    """Mamba comes as mamba-ssm's own checkpoint, Falcon-Mamba in transformers' format."""
    folder = tmp_path_factory.mktemp(family)
    dense = tiny(family, len(tiny_tokenizer))
    if family == "mamba":
        native(folder / "dense", dense, vocab_size=len(tiny_tokenizer))
    else:
        dense.save_pretrained(folder / "dense")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    recipe = Recipe(
        reduction=0.3, stacks=("decoder",), tokens=512, sequence_length=32, batch_size=4, sensitivity_tokens=128,
        steps=2, format="pivoted" if family == "mamba" else "factored", calibration=(str(calibration_text),),
        self_share=0.0, compute="float32",
    )  # fmt: skip
    request = Request(str(folder / "dense"), folder / "out", recipe, tokenizer=str(folder / "tokenizer"))
    record = compress(request, "quiet")
    assert record.parameters["parameters_before"] == count_parameters(dense)
    assert set(record.plan["ranks"]) <= {f"backbone.layers.{i}.{m}" for i in range(2) for m in FACTORS}
    assert {name.rpartition(".")[2] for name in record.plan["ranks"]} == {"in_proj", "out_proj"}
    return folder / "out"


@pytest.fixture
def model(compressed: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(compressed).eval()


def low_rank(module: nn.Module) -> list[LowRankLinear]:
    return [m for m in module.modules() if isinstance(m, LowRankLinear)]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, which must have one that is not zero."""
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for g in found.values()), found.keys()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


# --- maps, compression, loading


def test_the_maps_are_the_projections_that_are_called(family: str) -> None:
    model = tiny(family)
    blocks = find_blocks(find_architecture(model.config), model)["decoder"]
    assert [[m.name for m in block.maps] for block in blocks] == [list(FACTORS)] * 2
    asked = find_blocks(find_architecture(model.config), model, choice=MapChoice(include=("mixer.x_proj",)))["decoder"]
    assert {m.name for m in asked[0].maps} == {*FACTORS, "mixer.x_proj"}


def test_a_loaded_model_computes_with_the_products_of_its_factors(model: Any, family: str) -> None:
    """The same numbers from transformers' own dense model, whose weights are multiplied out by hand."""
    dense = tiny(family, model.config.vocab_size)
    state = {k: v for k, v in model.state_dict().items() if k in dense.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            eye = torch.eye(module.in_features)
            state[f"{name}.bias"] = module(torch.zeros(1, module.in_features))[0].detach()
            state[f"{name}.weight"] = (module(eye) - state[f"{name}.bias"]).T.detach()
    dense.load_state_dict(state)
    assert len(low_rank(model)) >= 3
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_generation_with_the_cache_equals_generation_without(model: Any) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert cached.shape[1] == TOKENS.shape[1] + 6
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


def test_saved_again_and_in_a_fresh_process(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.get("use_mambapy")
    assert "_is_quantized" not in config
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(TOKENS).last_hidden_state, model.backbone(TOKENS).last_hidden_state)
    script = (
        "import lillama_core, torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"t = torch.tensor({TOKENS.tolist()})\n"
        "print(m(t).logits.double().abs().sum().item())\n"
        "print(m.generate(t, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist())"
    )
    done = warm.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    total, generated = done.stdout.strip().splitlines()
    assert float(total) == pytest.approx(logits(model).double().abs().sum().item(), rel=1e-4)
    here = model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert json.loads(generated) == here.tolist()


def test_the_time_step_is_computed_as_in_the_dense_model(compressed: Path, family: str) -> None:
    """In a model marked as quantized, Falcon-Mamba's mixer calls dt_proj, which is dense, and takes its bias off again.

    Equal up to rounding, but to the rounding of the bias: in half precision the small steps lose their digits.
    """
    half = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16).eval()
    called: list[str] = []
    for block in half.backbone.layers:
        block.mixer.dt_proj.register_forward_hook(lambda *_: called.append("dt_proj"))
    assert torch.isfinite(logits(half)).all()
    assert not called
    model = AutoModelForCausalLM.from_pretrained(compressed)
    for mode in (False, True):
        expected = logits(model.train(mode))
        model.config._is_quantized = True
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        del model.config._is_quantized


# --- kernels are for CUDA

CUDA_ALONE = """
def {name}(*tensors, **options):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
"""


def test_installed_kernels_are_not_called_with_tensors_on_a_cpu(family: str, tmp_path: Path) -> None:
    """Packages as mamba-ssm and causal-conv1d lay them out, found by transformers itself, that want CUDA."""
    packages = {
        "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
        "mamba_ssm/ops/selective_scan_interface": ("selective_scan_fn", "mamba_inner_fn"),
        "mamba_ssm/ops/triton/selective_state_update": ("selective_state_update",),
    }
    for package, functions in packages.items():
        folder = tmp_path / "packages" / package
        folder.mkdir(parents=True)
        for parent in (folder, *folder.parents):
            if parent == tmp_path / "packages":
                break
            (parent / "__init__.py").touch()
        (folder / "__init__.py").write_text("".join(CUDA_ALONE.format(name=name) for name in functions))
    # First what transformers itself makes of them.
    script = (
        f"import sys, torch, transformers.models.{family}.modeling_{family} as m\n"
        "try:\n"
        "    m.causal_conv1d_fn(torch.ones(1))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "from lillama_core.cli.main import main\n"
        f"sys.exit(main(['plugin', 'check', {family!r}]))"
    )
    env = environment(PYTHONPATH=str(tmp_path / "packages"))
    done = warm.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Expected x.is_cuda()" in done.stdout, "the stand-ins were not found, nothing was tested"


# --- training mode, without kernels and with stand-ins


def test_train_equals_eval_without_kernels(model: Any) -> None:
    expected, wanted = logits(model), gradients(model)
    model.train()
    assert torch.equal(logits(model), expected)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, wanted[name]), name
    model.eval()
    assert torch.equal(logits(model), expected)


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


class StandIns:
    """What mamba-ssm and causal-conv1d would bring, with their signatures, in plain torch; every call is recorded."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
        width = weight.shape[1]
        x = nn.functional.pad(x, (width - 1, 0))
        taps = [weight[:, k, None] * x[:, :, k : x.shape[2] - width + 1 + k] for k in range(width)]
        assert activation == "silu"
        return nn.functional.silu(torch.stack(taps).sum(0) + bias[:, None])

    def scan(
        self, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert delta_softplus
        delta = nn.functional.softplus(delta + delta_bias[:, None])
        h = torch.zeros(*u.shape[:2], A.shape[1])
        rows = []
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
            rows.append((h * C[:, None, :, t]).sum(-1))
        return (torch.stack(rows, 2) + D[:, None] * u) * nn.functional.silu(z), h

    def causal_conv1d_fn(self, x, weight, bias=None, activation=None, **_):  # type: ignore[no-untyped-def]
        self.calls.append("conv")
        return self.conv(x, weight, bias, activation)

    def selective_scan_fn(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False, **_):  # type: ignore[no-untyped-def]  # fmt: skip
        self.calls.append("scan")
        out, last = self.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last) if return_last_state else out

    def mamba_inner_fn(self, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
                       out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, delta_softplus=True,
                       b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None,
                       b_c_dt_rms_eps=1e-6):  # type: ignore[no-untyped-def]  # fmt: skip
        self.calls.append("fused")
        x, z = xz.chunk(2, dim=1)
        x = self.conv(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
        states, rank = A.shape[1], delta_proj_weight.shape[1]
        delta, B, C = (x.transpose(1, 2) @ x_proj_weight.T).split([rank, states, states], -1)
        delta, B, C = (rms(v, w, b_c_dt_rms_eps) for v, w in
                       ((delta, None if dt_rms_weight is None else torch.ones(rank)), (B, b_rms_weight),
                        (C, c_rms_weight)))  # fmt: skip
        delta = (delta @ delta_proj_weight.T).transpose(1, 2)
        y, _ = self.scan(x, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias, delta_softplus)
        return nn.functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


@pytest.fixture
def kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Stand-ins where the family's mixer looks its kernels up."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = StandIns()
    monkeypatch.setattr(module, "causal_conv1d_fn", found.causal_conv1d_fn)
    monkeypatch.setattr(module, "mamba_selective_scan", found.selective_scan_fn)
    monkeypatch.setattr(module, "mamba_inner_fn", found.mamba_inner_fn)
    return found


@pytest.fixture
def reference(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients in eval mode, without any kernel."""
    return logits(model), gradients(model)


def check(model: Any, reference: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(logits(model), reference[0], rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model).items():
        wanted = reference[1][name]
        assert (gradient - wanted).abs().max() < 1e-3 * wanted.abs().max(), name


def test_train_equals_eval_with_kernels(reference: Any, model: Any, kernels: StandIns) -> None:
    """Low-rank maps are called as modules, between the kernels; the fused one would pass over them."""
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    for mode in (True, False):
        model.train(mode)
        kernels.calls.clear()
        called.clear()
        check(model, reference)
        low = [bool(low_rank(block)) for block in model.backbone.layers]
        assert all(low)
        # Two passes, each through both blocks.
        assert kernels.calls == ["conv", "scan"] * 4
        assert called == [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)] * 2


def test_a_dense_mixer_keeps_the_fused_kernel(family: str, kernels: StandIns) -> None:
    model = tiny(family)
    expected, wanted = logits(model), gradients(model)
    assert "fused" not in kernels.calls
    call_maps_as_modules(model)
    model.train()
    kernels.calls.clear()
    check(model, (expected, wanted))
    assert kernels.calls == ["fused"] * 4


def test_code_that_reads_the_weight_gets_the_product_and_its_gradients(
    reference: Any, model: Any, kernels: StandIns
) -> None:
    """As the fused kernel does, in a process where nothing has chosen the way through the modules."""
    for block in model.backbone.layers:
        block.mixer._forward_pre_hooks.clear()
    model.train()
    check(model, reference)
    assert kernels.calls == ["fused"] * 4


@pytest.mark.parametrize("format_name", core_names("formats"))
def test_a_low_rank_x_proj_runs_in_training_mode(family: str, format_name: str, kernels: StandIns) -> None:
    model = tiny(family)
    for block in model.backbone.layers:
        weight = block.mixer.x_proj.weight.detach()
        U, s, V = torch.linalg.svd(weight, full_matrices=False)
        block.mixer.x_proj = make("formats", format_name).from_factors(U[:, :5] * s[:5], V[:5], None)
    call_maps_as_modules(model)
    expected, wanted = logits(model), gradients(model)
    model.train()
    check(model, (expected, wanted))
    assert "fused" not in kernels.calls


def test_a_copy_of_a_block_chooses_for_itself(model: Any) -> None:
    block = copy.deepcopy(model.backbone.layers[0]).train()
    hidden = torch.randn(1, 6, 32)
    torch.testing.assert_close(block(hidden), model.backbone.layers[0](hidden), rtol=0, atol=0)
    assert block.mixer.in_proj.training
    assert not model.backbone.layers[0].mixer.in_proj.training


# --- the scan on a CPU


def test_mambapy_serves_fp32_and_only_that(family: str) -> None:
    pytest.importorskip("mambapy")
    model = tiny(family)
    expected = logits(model)
    assert not model.backbone.layers[0].mixer.use_mambapy
    call_maps_as_modules(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.backbone.layers[0].mixer.use_mambapy
    assert not model.config.use_mambapy
    # mambapy's scan is in fp32 and its product with a half-precision C fails.
    assert torch.isfinite(logits(model.bfloat16())).all()
    assert not model.backbone.layers[0].mixer.use_mambapy


# --- mamba-ssm's own checkpoints

NATIVE = {
    "d_model": 32, "n_layer": 2, "vocab_size": 157, "ssm_cfg": {"d_state": 4, "bias": True}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip


def native(folder: Path, model: Any, head: bool = True, **changes: Any) -> Path:
    """Write ``model`` as mamba-ssm would: its module tree is spelled out here."""
    state = {
        "backbone.embedding.weight": model.backbone.embeddings.weight,
        "backbone.norm_f.weight": model.backbone.norm_f.weight,
    }
    if head:
        state["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.backbone.layers):
        m = block.mixer
        state[f"backbone.layers.{i}.norm.weight"] = block.norm.weight
        for name, tensor in {
            "A_log": m.A_log, "D": m.D, "in_proj.weight": m.in_proj.weight, "in_proj.bias": m.in_proj.bias,
            "conv1d.weight": m.conv1d.weight, "conv1d.bias": m.conv1d.bias, "x_proj.weight": m.x_proj.weight,
            "dt_proj.weight": m.dt_proj.weight, "dt_proj.bias": m.dt_proj.bias,
            "out_proj.weight": m.out_proj.weight, "out_proj.bias": m.out_proj.bias,
        }.items():  # fmt: skip
            state[f"backbone.layers.{i}.mixer.{name}"] = tensor
    folder.mkdir(parents=True)
    torch.save({k: v.detach() for k, v in state.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**NATIVE, **changes}))
    return folder


reader = MambaSsmCheckpoint()


@pytest.mark.parametrize("tied", [True, False])
def test_a_native_checkpoint_converts_to_the_same_function(tied: bool, tmp_path: Path) -> None:
    """The vocabulary of 157 is padded to 160; an untied head is kept."""
    model = tiny("mamba", tie_word_embeddings=tied)
    folder = native(tmp_path / "native", model, **({} if tied else {"tie_embeddings": False}))
    assert reader.accepts(folder)
    reader.convert(folder, tmp_path / "converted")
    assert {p.name for p in (tmp_path / "converted").iterdir()} == {"config.json", "model.safetensors"}
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(notes[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert count_parameters(loaded) == count_parameters(model)
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_native_dtype_and_absent_head(tmp_path: Path) -> None:
    model = tiny("mamba").bfloat16()
    reader.convert(native(tmp_path / "native", model, head=False), tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype="auto").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", '{"d_model": 3}', '{"d_model": 3, "n_layer": 2, "model_type": "mamba"}', "[" * 99_999],
)
def test_what_is_no_native_checkpoint_is_not_accepted(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert not reader.accepts(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"ssm_cfg": {"d_states": 4}}, "d_states"),
        ({"ssm_cfg": {"d_state": "many", "bias": True}}, "state_size"),
        ({"ssm_cfg": [4]}, "not a table"),
        ({"ssm_cfg": {"d_state": -1, "bias": True}}, "cannot be built"),
        ({"ssm_cfg": {"expand": 0, "bias": True}}, "cannot be built"),
        ({"d_model": 10**12}, "cannot be built"),
        ({"depth": 3}, "'depth'"),
        ({"attn_layer_idx": [1]}, "attention"),
        ({"d_intermediate": 64}, "MLP"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"d_model": "wide"}, "d_model"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"n_layer": 3}, "lack backbone.layers.2"),
        ({"n_layer": 1}, "unknown tensor backbone.layers.1"),
        ({"vocab_size": 170}, "176, 32"),
        ({"ssm_cfg": {"d_state": 4}}, "unknown tensor .*bias"),
    ],
)
def test_an_unsuitable_native_checkpoint_is_one_clear_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = native(tmp_path / "native", tiny("mamba"), **changes)
    assert reader.accepts(folder)
    with pytest.raises(UserError, match=message) as caught:
        reader.convert(folder, tmp_path / "converted")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "converted").exists()


def test_a_native_checkpoint_on_the_command_line(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """What ails it is one line and status 2; without a tokenizer the line says what to do."""
    bad = native(tmp_path / "bad", tiny("mamba"), ssm_cfg={"layer": "Mamba2"})
    assert "Mamba2" in run_cli("compress", bad, "-o", tmp_path / "out", "--calibration", __file__).error
    good = native(tmp_path / "good", tiny("mamba"))
    assert "--tokenizer" in run_cli("compress", good, "-o", tmp_path / "out", "--calibration", __file__).error
    assert {p.name for p in tmp_path.iterdir()} == {"bad", "good"}


def test_a_refused_checkpoint_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="Mamba2"):
        locate(str(native(tmp_path / "bad", tiny("mamba"), ssm_cfg={"layer": "Mamba2"})))
    assert not [p for p in (tmp_path / "cache" / "converted").iterdir() if p.suffix != ".lock"]
    found = Path(locate(str(native(tmp_path / "good", tiny("mamba")))).location)
    assert found.name == "good"
    assert (found / "model.safetensors").is_file()


def spoil(write: Callable[[Path], object], tmp_path: Path) -> str:
    """The error for a checkpoint whose weight file ``write`` has replaced."""
    folder = native(tmp_path / "native", tiny("mamba"))
    write(folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        reader.convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a pickle was run",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.unlink(), "has no pytorch_model.bin"),
        (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes(pickle.dumps({"x": Harmful()})), "hold more than tensors"),
        (lambda p: torch.save({"x": Harmful()}, p), "hold more than tensors"),
        (lambda p: torch.save([torch.ones(2)], p), "not a table"),
        (
            lambda p: torch.save({**torch.load(p, weights_only=True), "lm_head.weight": torch.ones(160, 32)}, p),
            "differs from the emb",
        ),
        (
            lambda p: torch.save(
                {k: torch.zeros(1).expand(v.shape) for k, v in torch.load(p, weights_only=True).items()}, p
            ),
            "hold tensors that are larger than the file",
        ),
        (lambda p: torch.save({k: v.int() for k, v in torch.load(p, weights_only=True).items()}, p), "int32"),
        (
            lambda p: torch.save({k: v.to("meta") for k, v in torch.load(p, weights_only=True).items()}, p),
            "no plain tensor",
        ),
        (
            lambda p: torch.save({k: v.to_sparse() for k, v in torch.load(p, weights_only=True).items()}, p),
            "no plain tensor",
        ),
    ],
)
def test_bad_native_weights(
    write: Callable[[Path], object], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in spoil(write, tmp_path)
    assert "code of a pickle" not in capfd.readouterr().out


def test_a_compressed_config_of_another_mixer_is_refused(compressed: Path, tmp_path: Path, model: Any) -> None:
    """A site that the model does not have as a linear map."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    targets = config["quantization_config"]["sites"]
    targets["backbone.layers.0.mixer.conv1d"] = next(iter(targets.values()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LillamaError, match="conv1d"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
