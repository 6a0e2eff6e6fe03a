"""Tell where a model is: a GGUF file, a directory, another program's checkpoint or a name on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lillama_core.errors import UserError, one_line
from lillama_core.models.integrity import check_gguf, check_safetensors
from lillama_core.system.regular import check_folder, check_regular

QUANT_METHOD = "lillama"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers calls the file of all weights, and the list of where they are among several."""


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
    files = sorted(f for f in folder.iterdir() if f.is_file())
    return made_once(f"{reader.name} {reader.version}", folder, files, lambda made: reader.convert(folder, made))


def made_once(what: str, origin: Path, files: Iterable[Path], make: Callable[[Path], None]) -> Path:
    """Return the directory of the cache that ``make`` fills, which gets an empty one, and has filled before.

    It is made anew when ``what``, the path ``origin`` or the sizes and times of its ``files`` are others. What
    ``make`` raises leaves no directory behind.
    """
    from filelock import FileLock

    from lillama_core.system.cache import default_cache_dir

    digest = hashlib.sha256(f"{what} {origin.resolve()}\n".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = default_cache_dir() / "converted"
    target = cache / digest.hexdigest()[:24] / origin.resolve().name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.parent) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                made = Path(unfinished) / "model"
                made.mkdir()
                make(made)
                target.parent.mkdir(exist_ok=True)
                made.rename(target)
    return target


def locate(spec: str, trust_remote_code: bool = False, with_weights: bool = True) -> ModelSource:
    """Tell a GGUF file, a local directory and a hub id apart, and check what can be checked without loading.

    A directory may hold its config alone where nothing is to be done ``with_weights``.
    Raises UserError for a missing or empty directory, a file that is no model, and damaged weight files.
    """
    path = Path(spec)
    if not spec:
        # Path("") is the current directory.
        raise UserError("no model at ''")
    try:
        return _locate(spec, path, trust_remote_code, with_weights)
    except OSError as error:
        raise UserError(f"model {spec!r} cannot be read: {error.strerror or error}") from None


def _locate(spec: str, path: Path, trust_remote_code: bool, with_weights: bool) -> ModelSource:
    check_regular(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{spec!r} is a file, but not a .gguf file; give a model directory, a .gguf file or a hub id"
            )
        check_gguf(path)
        return ModelSource(spec, str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        from lillama_core import strategies

        check_folder(path)
        for name in strategies.names("checkpoints"):
            reader: CheckpointReader = strategies.make("checkpoints", name)
            if reader.accepts(path):
                return ModelSource(spec, str(_converted(path, reader)), None, trust_remote_code)
        _check_directory(path, with_weights)
        return ModelSource(spec, spec, None, trust_remote_code)
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(f"no model at {spec!r}")
    return ModelSource(spec, spec, None, trust_remote_code)


def _check_directory(path: Path, with_weights: bool) -> None:
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
        if with_weights:
            raise UserError(f"model directory {str(path)!r} has no .safetensors weights")
    for file in weights:
        check_safetensors(file)
    if (path / INDEX).is_file():
        check_index(path / INDEX)


def check_index(index: Path) -> dict[str, Path]:
    """Return where the tensors of the shards lie that a weight index beside them names: name on disk -> file.

    Raises UserError when the index is damaged, or names a file outside of its folder, a file that is not there or a
    tensor that its file does not hold, and when two files hold a tensor of one name.
    """
    folder, named = index.parent, _read_index(index)
    # os.path: pathlib raises for what no file can be called.
    absent = sorted(n for n in named.values() if not os.path.isfile(folder / n))
    if absent:
        raise UserError(f"model directory {str(folder)!r} lacks {absent[0]}, which its weight index names")
    found: dict[str, Path] = {}
    # Like transformers: all that the named files hold, whether the index lists it or not.
    for name in sorted(set(named.values())):
        for key in check_safetensors(folder / name):
            if key in found:
                raise UserError(f"model directory {str(folder)!r} has {key} in both {found[key].name} and {name}")
            found[key] = folder / name
    for key, name in named.items():
        if found.get(key) != folder / name:
            raise UserError(f"weight index {str(index)!r} says that {name} holds {key}, which it does not")
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Name on disk -> name of the file, of an index that may not be trusted."""
    try:
        named = {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"weight index {str(index)!r} is corrupt: {one_line(error)}") from None
    # By the names alone: in the cache of the hub the files are links to elsewhere.
    outside = sorted(n for n in named.values() if Path(n).is_absolute() or ".." in Path(n).parts)
    if outside:
        raise UserError(f"weight index {str(index)!r} names {outside[0]!r}, which is outside of the model directory")
    other = sorted(n for n in named.values() if not n.endswith(".safetensors"))
    if other:
        raise UserError(
            f"weight index {str(index)!r} names {other[0]!r}: weights are read from .safetensors files alone; convert"
            " them first"
        )
    return named


def weight_files(source: ModelSource) -> dict[str, Path]:
    """Return where the weights of a model in safetensors lie: name on disk -> file; from the hub they are fetched.

    Of several sets of weights the same as transformers': one whole file before shards. Raises UserError when there
    are none, or damaged ones.
    """
    whole, index = (local_file(source, name) for name in (WEIGHTS, INDEX))
    if whole is not None:
        return dict.fromkeys(check_safetensors(whole), whole)
    if index is None:
        raise UserError(f"model {source.spec!r} has neither {WEIGHTS} nor {INDEX}")
    if not source.is_local:
        for name in sorted(set(_read_index(index).values())):
            local_file(source, name)
    return check_index(index)


def local_file(source: ModelSource, name: str) -> Path | None:
    """The file ``name`` of a model, fetched if it is on the hub; None where it has none."""
    if source.is_local:
        file = Path(source.location) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.location, name))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"cannot load model {source.spec!r}: {one_line(error)}") from None


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
