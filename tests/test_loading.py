"""A compressed directory in the hands of transformers: what works, and what must fail loudly."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lillama_core import LillamaError, Recipe
from lillama_core.models.loading import count_parameters
from lillama_core.output import verify
from lillama_core.pipeline import Request, compress


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, dense: Path, calibration_text: Path) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    recipe = Recipe(
        stacks=("decoder",), reduction=0.25, tokens=512, sequence_length=32, sensitivity_tokens=128, steps=0,
        calibration=(str(calibration_text),), self_share=0.0, compute="float32",
    )  # fmt: skip
    compress(Request(str(dense), out, recipe), "quiet")
    return out


def test_everybody_may_read_what_a_new_file_lets_them(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    assert {p.name: p.stat().st_mode for p in compressed.iterdir() if p.stat().st_mode != expected} == {}


def test_the_directory_is_complete(compressed: Path) -> None:
    names = {p.name for p in compressed.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md",
            "lillama.json", "report.html"} <= names  # fmt: skip
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert not list(compressed.parent.glob("*.partial"))


def stock(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def test_a_process_without_lillama_stops_with_an_error(compressed: Path) -> None:
    done = stock(
        # As if it were not installed: where it is, transformers finds it.
        "import sys; sys.modules['lillama_core'] = None; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(compressed)!r})\n"
        "print('loaded')"
    )
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "lillama_core" not in done.stderr or "size mismatch" in done.stderr
    assert "RuntimeError" in done.stderr


def test_a_process_with_lillama_loads_the_same_numbers(compressed: Path) -> None:
    script = (
        "import sys, lillama_core, torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(compressed)!r}).eval()\n"
        "print(m(torch.arange(5, 15)[None]).logits.double().sum().item())"
    )
    found = [float(stock(script).stdout.strip().splitlines()[-1]) for _ in range(2)]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(compressed).eval()
    here = model(torch.arange(5, 15)[None]).logits.double().sum().item()
    assert found[0] == found[1]
    assert found[0] == pytest.approx(here, rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
def test_the_file_leaves_memory_when_the_weights_are_converted(compressed: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = str(compressed / "model.safetensors")
    as_it_is = AutoModelForCausalLM.from_pretrained(compressed)
    assert any("permutation" in name for name, _ in as_it_is.named_buffers())
    del as_it_is
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float64)
    gc.collect()
    assert model.dtype == torch.float64
    assert file not in Path("/proc/self/maps").read_text()


def test_base_model_pipeline_dtype_and_training(compressed: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    tokens = torch.arange(5, 15)[None]
    whole = AutoModelForCausalLM.from_pretrained(compressed).eval()
    base = AutoModel.from_pretrained(compressed).eval()
    with torch.no_grad():
        expected = whole.model(tokens).last_hidden_state
        torch.testing.assert_close(base(tokens).last_hidden_state, expected)
    half = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    text = pipeline("text-generation", model=whole, tokenizer=tokenizer)("the", max_new_tokens=3)
    assert text[0]["generated_text"].startswith("the")
    # The stored weights are plain numbers, to be converted like any model's.
    assert {p.dtype for p in half.float().parameters()} == {torch.float32}
    assert {p.dtype for p in half.half().parameters()} == {torch.float16}
    whole.train().requires_grad_(True)
    whole(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_sharded_save_round_trip(compressed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(compressed).eval()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").eval()
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_the_file_holds_what_was_promised(compressed: Path) -> None:
    record = json.loads((compressed / "lillama.json").read_text())
    numbers = 0
    with safe_open(str(compressed / "model.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118  a safetensors file is no mapping
            tensor = file.get_tensor(key)
            numbers += tensor.numel() if tensor.is_floating_point() else 0
    assert numbers == record["parameters"]["parameters_after"]
    assert (compressed / "model.safetensors").stat().st_size == record["bytes"]["compressed"]


def edited(compressed: Path, target: Path, change: Any) -> Path:
    shutil.copytree(compressed, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def first_site(config: dict[str, Any]) -> dict[str, Any]:
    return next(site for site in config["sites"].values() if "rank" in site)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: first_site(c).update(rank=10**9), "rank"),
        (lambda c: first_site(c).update(rank=-1), "rank"),
        (lambda c: first_site(c).update(rank="5"), "rank"),
        (lambda c: first_site(c).update(format="nobody's"), "install the lillama plugin"),
        (lambda c: first_site(c).update(kind="nobody's"), "kind"),
        (lambda c: first_site(c).update(code="import os"), "exactly"),
        (lambda c: c.update(sites=[]), "sites"),
        (lambda c: c.update(version=99), "version"),
    ],
)
def test_a_hostile_config_is_refused(compressed: Path, tmp_path: Path, change: Any, message: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = edited(compressed, tmp_path / "edited", change)
    with pytest.raises(LillamaError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_registering_twice_does_nothing() -> None:
    from lillama_core.output.quantizer import register

    register()
    register()


def test_parameters_are_counted_once_when_tied(compressed: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_result_that_loads_otherwise_is_noticed_and_rounding_is_not(
    dtype: torch.dtype, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense).to(dtype)
    model.save_pretrained(tmp_path / "half")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        # The same weights in exact arithmetic.
        exact = model.double()(ids).logits.float()
    for factor, status in ((1.0, 0), (1.1, 1)):
        save_file({"inputs.input_ids": ids, "expected": exact * factor}, tmp_path / "probe.safetensors")
        arguments = (str(tmp_path / "half"), str(tmp_path / "probe.safetensors"), verify.WHOLE, "AutoModelForCausalLM")
        assert verify.main(*arguments) == status
    assert "outputs differ by 0.09" in capsys.readouterr().err
