"""Tell where a model is: a GGUF file, a directory, another program's checkpoint or a name on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lillama_core.errors import UserError, one_line
from lillama_core.models.integrity import check_gguf, check_safetensors

QUANT_METHOD = "lillama"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, as transformers wants it: ``from_pretrained(location, **extra)``."""

    spec: str
    """What the user wrote."""
    location: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def extra(self) -> dict[str, Any]:
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None:
            found["gguf_file"] = self.gguf_file
        return found

    @property
    def short_name(self) -> str:
        """A name for tables and files."""
        name = self.gguf_file or Path(self.location).name or self.location
        return name.removesuffix(".gguf")


class CheckpointReader(Protocol):
    """Turns a checkpoint directory of another program into one of transformers."""

    name: str
    version: int
    """Raised when the result changes, so that older ones are made anew."""

    def accepts(self, folder: Path) -> bool:
        """Whether ``folder`` is such a checkpoint, seen by its cheapest sign; never raises."""
        ...

    def convert(self, folder: Path, target: Path) -> None:
        """Write config, weights and what there is of tokenizer or processor into the new, empty folder ``target``.

        Raises UserError when the checkpoint is damaged or of a kind that is not supported.
        """
        ...


def _converted(folder: Path, reader: CheckpointReader) -> Path:
    """``folder`` as a transformers directory, made once and kept in the cache."""
    from filelock import FileLock

    from lillama_core.system.cache import default_cache_dir

    digest = hashlib.sha256(f"{reader.name} {reader.version} {folder.resolve()}\n".encode())
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = default_cache_dir() / "converted"
    target = cache / digest.hexdigest()[:24] / folder.resolve().name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.parent) + ".lock"):
        if not target.is_dir():
            # A checkpoint that is refused leaves no directory.
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                made = Path(unfinished) / "model"
                made.mkdir()
                reader.convert(folder, made)
                target.parent.mkdir(exist_ok=True)
                made.rename(target)
    return target


def locate(spec: str, trust_remote_code: bool = False) -> ModelSource:
    """Tell a GGUF file, a local directory and a hub id apart, and check what can be checked without loading.

    Raises UserError for a missing or empty directory, a file that is no model, and damaged weight files.
    """
    path = Path(spec)
    if not spec:
        # Path("") is the current directory.
        raise UserError("no model at ''")
    try:
        return _locate(spec, path, trust_remote_code)
    except OSError as error:
        raise UserError(f"model {spec!r} cannot be read: {error.strerror or error}") from None


def _locate(spec: str, path: Path, trust_remote_code: bool) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{spec!r} is a file, but not a .gguf file; give a model directory, a .gguf file or a hub id"
            )
        check_gguf(path)
        return ModelSource(spec, str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        from lillama_core import strategies

        for name in strategies.names("checkpoints"):
            reader: CheckpointReader = strategies.make("checkpoints", name)
            if reader.accepts(path):
                return ModelSource(spec, str(_converted(path, reader)), None, trust_remote_code)
        _check_directory(path)
        return ModelSource(spec, spec, None, trust_remote_code)
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(f"no model at {spec!r}")
    return ModelSource(spec, spec, None, trust_remote_code)


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: give that file's path" if ggufs else ""
        what = "is empty" if not any(path.iterdir()) else "has no config.json"
        raise UserError(f"model directory {str(path)!r} {what}{hint}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise UserError(
                f"model directory {str(path)!r} holds {pickles[0]}, a pickle, which is never loaded;"
                " convert it to safetensors first"
            )
        raise UserError(f"model directory {str(path)!r} has no .safetensors weights")
    for file in weights:
        check_safetensors(file)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"weight index {str(index)!r} is corrupt: {one_line(error)}") from None
        absent = sorted(name for name in named if not (path / str(name)).is_file())
        if absent:
            raise UserError(f"model directory {str(path)!r} lacks {absent[0]}, which its weight index names")


def model_fingerprint(source: ModelSource) -> str:
    """A hash over the model's files: sizes, and 64 samples of 64 KiB of each.

    Reading a large model whole would take minutes; a changed weight file differs all over.
    """
    digest = hashlib.sha256()
    if source.gguf_file is not None:
        files = [Path(source.location) / source.gguf_file]
    elif source.is_local:
        folder = Path(source.location)
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.location, "config.json")
        # The snapshot folder is named by the commit.
        digest.update(f"{source.location} {Path(str(cached)).parent.name}".encode())
        files = []
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(65536))
    return digest.hexdigest()
