"""Tiny models with their tokenizer, a text to calibrate on, and the command line as tests call it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before transformers is imported: nothing here needs the network, and a mistyped name must not look for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Code that comes with a model is copied there, by this process and by those that it starts.
os.environ["HF_MODULES_CACHE"] = f"{tempfile.gettempdir()}/lillama-modules-{os.getpid()}"

import torch
import warm
from tokenizers import processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lillama_core.cli.main import main
from lillama_core.output.quantizer import LillamaConfig, LillamaHfQuantizer, attach
from lillama_registry import registry
from lillama_testing.tiny import byte_level_tokenizer

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

TEXT = Path(__file__).parents[1] / "benchmarks" / "data" / "wikitext2-valid.txt"
VOCABULARY = 384
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"

QUICK_ANYHOW = (
    *("--tokens", "1024", "--sequence-length", "32", "--batch-size", "4", "--sensitivity-tokens", "128"),
    *("--steps", "3", "--self-share", "0"),
)
"""Options of a run of a tiny model that takes about a second; the calibration data is still to be named."""

QUICK = (*QUICK_ANYHOW, "--rescaling-tokens", "128")
"""The same for an initialiser that predicts losses, and an allocator that asks for them."""

WEIGHTS_ONLY = (
    *("--tokens", "1024", "--sequence-length", "32", "--batch-size", "4", "--self-share", "0"),
    *("--recipe", "fast", "--init", "svd", "--allocation", "uniform"),
)
"""The same for plain SVD with even ranks: nothing that has to do with gradients or training."""


def core_names(kind: str) -> list[str]:
    """The names of one kind of strategy that lillama brings itself."""
    (core,) = (plugin for plugin in registry().loaded if plugin.name == "core")
    return sorted(core.named[kind])


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line of a user's mistake; fails when stderr holds anything else."""
        assert self.status == 2, self
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("lillama: error: "), self
        return lines[0].removeprefix("lillama: error: ")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sampled text of one session must not serve the next."""
    os.environ["LILLAMA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _forking() -> None:
    """A fresh process for each result that is loaded again would be most of the time of all tests."""
    warm.fork_from_now_on()


@pytest.fixture(scope="session", autouse=True)
def _collected_once() -> None:
    """What has been loaded by now is half a million objects that stay: no collection has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, with begin and end of text and a chat template."""
    text = TEXT.read_text(encoding="utf-8")[:50_000]
    tokenizer = byte_level_tokenizer(text, VOCABULARY, bos_token="<s>", eos_token="</s>")
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}
"""Where a family's config departs from the usual names."""


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """``make_model(folder, family="llama", dtype=…, change=…, **config)`` saves a random model and its tokenizer.

    ``change`` may edit the model in place before it is saved.
    """

    def make(
        folder: Path,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        change: Callable[[Any], None] = lambda model: None,
        **changes: Any,
    ) -> Path:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        config = CONFIG_MAPPING[family](**(settings | SIZES.get(family, {}) | changes))
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            change(model)
        model.save_pretrained(str(folder))
        tiny_tokenizer.save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def _tiny_model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_model(_tiny_model: Path, tmp_path: Path) -> Path:
    """A Llama of two layers, in a directory that the test may spoil."""
    return Path(shutil.copytree(_tiny_model, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[60_000:90_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def compressed(_tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run makes of the tiny model, from a process of its own; ``stdout`` and ``stderr`` lie beside it."""
    output = tmp_path_factory.mktemp("compressed") / "small"
    done = run_process("compress", _tiny_model, "-o", output, "--calibration", calibration_text, *QUICK)
    assert done.status == 0, done
    (output.parent / "stdout").write_text(done.stdout)
    (output.parent / "stderr").write_text(done.stderr)
    return output


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``run_cli("compress", …)``: the command line within this process."""

    def run(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as ended:
            # --help and --version.
            status = int(ended.code or 0)
        return Ended(status, *capsys.readouterr())

    return run


def command(*arguments: str | Path) -> list[str]:
    """The command line for a process of its own."""
    return [sys.executable, "-m", "lillama_core", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of such a process: one thread, so that its numbers and its memory are always the same."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default", **changes}


def run_process(*arguments: str | Path, fresh: bool = False, **options: Any) -> Ended:
    """The command line in a process of its own; ``fresh``: one that loads its libraries itself, as a user's does."""
    env = options.pop("env", environment())
    run: Callable[..., Any] = subprocess.run if fresh else warm.run
    done = run(command(*arguments), capture_output=True, text=True, env=env, timeout=300, check=False, **options)
    return Ended(done.returncode, done.stdout, done.stderr)


def save_with_random_factors(model: Any, sites: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write ``model`` as a compression leaves it whose config names ``sites``, but with random factors."""
    config = LillamaConfig(sites)
    before = list(model.parameters())  # held, so that no new one gets the place of an old one
    known = {id(p) for p in before}
    LillamaHfQuantizer(config, pre_quantized=True)._process_model_before_weight_loading(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in known:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith((".permutation", ".positions")):
                buffer.copy_(torch.randperm(len(buffer)))
    model.tie_weights()
    attach(model, config)
    model.save_pretrained(folder)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder``, with the contents of files: equal before and after when nothing was touched."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in folder.rglob("*")
    }
