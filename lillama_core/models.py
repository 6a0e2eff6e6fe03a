"""Finding, checking and loading the model to compress."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lillama_core.architecture import Architecture, Block, find_blocks
from lillama_core.errors import UserError, is_out_of_memory, nearest, one_line
from lillama_core.maps import MapChoice
from lillama_core.weight_files import check_gguf, check_safetensors

QUANT_METHOD = "lillama"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    from lillama_core.calibration.cache import default_cache_dir

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
        from lillama_registry import registry

        for reader in registry().strategies("checkpoints").values():
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


def load_config(source: ModelSource, allow_compressed: bool = False) -> Any:
    """The model's transformers config; raises UserError when there is none, or for an unsuitable model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, **source.extra)
    except Exception as error:
        raise _bad_config(source, error) from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and source.gguf_file is None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if str(method) == QUANT_METHOD:
            if allow_compressed:
                return config
            raise UserError(f"model {source.spec!r} is already compressed by lillama; start from its base model")
        raise UserError(f"model {source.spec!r} is quantized ({method}); start from its unquantized weights")
    return config


def _bad_config(source: ModelSource, error: Exception) -> UserError:
    """Why there is no config, in the words of the user's request instead of the library's."""
    from transformers import CONFIG_MAPPING

    if "trust_remote_code" in str(error):
        return UserError(
            f"model {source.spec!r} brings code of its own, which is not run unless you pass --trust-remote-code"
        )
    if not source.is_local:
        return UserError(f"no file or directory {source.spec!r}, and not to be had from the hub: {one_line(error)}")
    model_type = None
    if source.gguf_file is None:
        with contextlib.suppress(Exception):
            found = json.loads((Path(source.location) / "config.json").read_text(encoding="utf-8"))
            model_type = found.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        return _no_plugin(model_type, " (nor does this version of transformers know it)")
    return UserError(f"cannot read the config of model {source.spec!r}: {one_line(error)}")


def _no_plugin(model_type: str, remark: str = "") -> UserError:
    import difflib

    from lillama_registry import registry

    found = registry()
    known = sorted({t for a in found.architectures for t in a.model_types})
    near = difflib.get_close_matches(model_type, known, n=3, cutoff=0.3) or known[:3]
    nearest_ones = f"nearest: {', '.join(near)}" if near else "no plugin is loaded"
    broken = f"; not loaded: {', '.join(f.name for f in found.failures)}" if found.failures else ""
    return UserError(
        f"no plugin handles model type {model_type!r}{remark} ({nearest_ones}); use --architecture auto"
        " to have its blocks found, --architecture NAME if they are built like those of a known one, or add a plugin:"
        f" see 'Add an architecture' in the README{broken}"
    )


def find_architecture(
    config: Any, name: str | Architecture | None = None, trust_remote_code: bool = False
) -> Architecture:
    """The architecture named ``name`` (``auto``: found in the model itself), or the one that claims its model type.

    An architecture instead of a name is taken as it is: one under test need not be installed. Raises UserError that
    lists the nearest when there is none, and that names both when two plugins claim one.
    """
    from lillama_registry import registry

    if isinstance(name, Architecture):
        return name
    if name == "auto":
        from lillama_core.generic import discover

        return discover(config, trust_remote_code)
    found = registry()
    model_type = str(getattr(config, "model_type", ""))
    claiming: list[Architecture] = found.architectures_for(model_type)
    if name is not None:
        named = [a for a in found.architectures if name in (a.name, found.plugin_of(a).name)]
        if not named:
            known = sorted({n for a in found.architectures for n in (a.name, found.plugin_of(a).name)} | {"auto"})
            raise UserError(f"no architecture named {name!r} (there are: {', '.join(known)}){nearest(name, known)}")
        claiming = [a for a in named if model_type in a.model_types]
        if not claiming:
            return next((a for a in named if _fits(a, config)), named[0])
    if len(claiming) > 1:
        plugins = [found.plugin_of(a) for a in claiming]
        owners = " and ".join(f"{p.name!r} ({p.distribution} {p.version})" for p in plugins)
        raise UserError(
            f"model type {model_type!r} is claimed by the plugins {owners}; choose with --architecture"
            f" {' or --architecture '.join(p.name for p in plugins)}"
        )
    if not claiming:
        raise _no_plugin(model_type)
    return claiming[0]


def _fits(architecture: Architecture, config: Any) -> bool:
    """Whether a model of ``config`` has its blocks where ``architecture`` says."""
    try:
        find_blocks(architecture, meta_model(config, architecture))
    except UserError:
        return False
    return True


def auto_class(architecture: Architecture) -> Any:
    import transformers

    return getattr(transformers, architecture.auto_class)


def meta_model(config: Any, architecture: Architecture, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights, on the meta device: shapes and names only."""
    try:
        with torch.device("meta"):
            found = auto_class(architecture)
            # An auto class, or a model's own.
            model: nn.Module = (
                found.from_config(config, trust_remote_code=trust_remote_code)
                if hasattr(found, "from_config")
                else found._from_config(config)
            )
    except Exception as error:
        raise UserError(f"cannot build a {config.model_type!r} model from its config: {one_line(error)}") from None
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(source: ModelSource, spec: str | None = None) -> Any:
    """The tokenizer at ``spec``, or the model's own; raises UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        if spec is None:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **source.extra)
        else:
            tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        where = spec or source.spec
        raise UserError(f"no tokenizer found at {where!r} ({one_line(error)}); name one with --tokenizer") from None
    # Without its files transformers builds some tokenizers empty instead of failing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"the tokenizer at {spec or source.spec!r} has no vocabulary; name one with --tokenizer")
    return tokenizer


def load_model(source: ModelSource, architecture: Architecture, dtype: torch.dtype | str) -> nn.Module:
    """The dense model on the CPU in eval mode; ``dtype`` may be ``auto``. Raises UserError when it cannot load."""
    import transformers

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        # Its bars for the conversion of GGUF have no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            model: Any
            model, notes = auto_class(architecture).from_pretrained(
                source.location,
                dtype=dtype,
                use_safetensors=source.gguf_file is None or None,
                output_loading_info=True,
                **source.extra,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load model {source.spec!r}: {one_line(error)}") from None
    finally:
        logger.setLevel(level)
    # transformers would fill them with random numbers.
    absent = sorted(set(notes["missing_keys"]) & {name for name, _ in model.named_parameters()})
    named = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    other = ""
    if named != type(model).__name__ and hasattr(transformers, named):
        other = f"; it is a {named}, which architecture {architecture.name!r} does not load: try --architecture auto"
    if absent:
        raise UserError(f"model {source.spec!r} lacks {len(absent)} of its weights, such as {absent[0]}{other}")
    dropped = sorted(notes["unexpected_keys"])
    if not getattr(model.config, "architectures", None) and architecture.auto_class == "AutoModel":
        other = "; its config names no class to load it by: add 'architectures' to config.json"
    if dropped and other:
        raise UserError(
            f"model {source.spec!r} has {len(dropped)} weights that would be dropped, such as {dropped[0]}{other}"
        )
    if source.gguf_file is not None:
        # The weights are plain numbers now; transformers would otherwise refuse to save them.
        model.hf_quantizer = None
        model.is_quantized = False
        model._weight_conversions = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.eval().requires_grad_(False)
    architecture.adapt(model)
    return model


def check_finite(model: nn.Module) -> None:
    """Raise UserError that names the first map, or other module, whose weight holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            module, _, kind = name.rpartition(".")
            raise UserError(f"the {kind} of {module} holds NaN or infinite values")


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


def blocks_of(
    architecture: Architecture, model: nn.Module, selected: tuple[str, ...], choice: MapChoice | None = None
) -> tuple[dict[str, list[Block]], int]:
    """The blocks to compress, and the parameters that a reduction is a fraction of.

    That is the whole model, or the selected stacks when some are selected.
    """
    blocks = find_blocks(architecture, model, selected, choice)
    if not selected:
        return blocks, count_parameters(model)
    modules = [model.get_submodule(architecture.stacks[name]) for name in blocks]
    return blocks, sum(count_parameters(m) for m in modules)


def check_dtype(name: str | None, model_dtype: torch.dtype, from_gguf: bool) -> torch.dtype:
    """The dtype of the output: as asked, else the input's; float16 for GGUF, whose own types are not kept."""
    if name is not None:
        return DTYPES[name]
    if from_gguf:
        return torch.float16
    if model_dtype not in DTYPES.values():
        raise UserError(f"the model's dtype {model_dtype} is not one that lillama writes; choose with --dtype")
    return model_dtype
