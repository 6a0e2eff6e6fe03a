"""What reads files from outside, each with valid input, so that faults can be put into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from lillama_testing import containers
from lillama_testing.mutation import faulty, faulty_bytes, made_up

LONGEST_MESSAGE = 5000
"""Characters of an error: one line that somebody reads."""


@dataclass(frozen=True)
class Reader:
    """A way into the program: what is valid there, how it becomes bytes, and what reads them."""

    name: str
    share: int
    """Of the inputs of a long run, in parts: the quick ones take more."""
    values: Sequence[Any]
    """Valid ones, for faults in what they say."""
    write: Callable[[Any], bytes]
    read: Callable[[bytes], object]
    texts: Sequence[bytes] = ()
    """The same as bytes in other spellings, for faults in these."""
    near: int | None = None
    """Bytes from the beginning that matter more than others."""

    def input(self, random: Random) -> bytes:
        """Bytes that are almost valid, or, one time in twenty, anything."""
        kind = random.random()
        if kind < 0.05:
            return made_up(random)
        value = random.choice(self.values)
        if kind < 0.75:
            return self.write(faulty(value, random))
        texts = self.texts or [self.write(value)]
        return faulty_bytes(random.choice(texts), random, self.near)

    def ends_as_documented(self, data: bytes) -> bool:
        """Read ``data``: whether it was accepted (True) or refused in the way that is promised (False).

        Raises what comes out otherwise, and AssertionError for a message that is too long to read.
        """
        from lillama_core.errors import LillamaError

        try:
            self.read(data)
        except LillamaError as error:
            if not 0 < len(str(error)) <= LONGEST_MESSAGE:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
            return False
        return True


def make_readers(folder: Path, dense: Path, compressed: Path) -> dict[str, Reader]:
    """All readers by name, which write below ``folder``.

    ``dense`` is the directory of a tiny Llama, ``compressed`` what a run has made of it; they are copied.
    """
    folder.mkdir(exist_ok=True)
    models = {name: Path(shutil.copytree(at, folder / name)) for name, at in (("dense", dense), ("low", compressed))}
    found = [
        *_readers_of_options(folder),
        *_readers_of_runs(folder, models["low"]),
        *_readers_of_models(folder, models["dense"], models["low"]),
        *_readers_of_ctranslate2(folder),
        *_readers_of_data(folder),
    ]
    return {reader.name: reader for reader in found}


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and halves of characters included."""
    return json.dumps(value).encode()


def reads(path: Path, read: Callable[[Path], object], given: Path | None = None) -> Callable[[bytes], object]:
    """Write to ``path``, and read ``given``, or ``path`` itself."""

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return read(given or path)

    return run


def _readers_of_options(folder: Path) -> list[Reader]:
    from lillama_core.estimates.machine import NAMED, named_machine
    from lillama_core.recipe.loading import load_recipe
    from lillama_core.recipe.model import Recipe
    from lillama_core.recipe.reading import check_options_are_read

    presets = sorted(Path(load_recipe.__code__.co_filename).parent.glob("presets/*.yaml"))
    texts = [path.read_bytes() for path in presets] + [Recipe().to_yaml().encode()]
    machine = next(iter(yaml.safe_load(NAMED.read_text(encoding="utf-8")).values()))

    def recipe(path: Path) -> None:
        check_options_are_read(load_recipe(str(path)))

    values = [Recipe().to_dict(), *(yaml.safe_load(text) for text in texts)]
    stages = {
        "correction_tokens": 64,
        "init": {"name": "fisher", "input_damping": 0.1},
        "stages": {"blocks": {"correction_ridge": 0.05}},
    }
    return [
        Reader("recipe", 30, [*values, stages], as_json, reads(folder / "r.yaml", recipe), texts),
        Reader(
            "machine", 20, [machine], as_json, reads(folder / "m.yaml", lambda path: named_machine(str(path))),
            [yaml.safe_dump(machine).encode()],
        ),
    ]  # fmt: skip


def _readers_of_runs(folder: Path, low: Path) -> list[Reader]:
    from lillama_core.architecture.find import find_architecture
    from lillama_core.models.loading import load_config
    from lillama_core.models.source import locate
    from lillama_core.output.directory import check_publishable
    from lillama_core.output.origin import Described
    from lillama_core.output.record import read_record
    from lillama_core.output.run_directory import RunDirectory

    record = json.loads((low / "lillama.json").read_text(encoding="utf-8"))
    run = {"model": 64 * "a", "data": 64 * "b", "recipe": record["recipe"], "versions": record["versions"]}
    config = load_config(locate(str(low)), allow_compressed=True)
    architecture = find_architecture(config)
    partial = folder / "out.partial"
    partial.mkdir()

    def resume(_: Path) -> None:
        directory = RunDirectory(folder / "out")
        directory.check(overwrite=False, resume=True)
        directory.check_fingerprint({**run, "overwrite": False})

    at = folder / "record"
    at.mkdir()

    def publishable(_: Path) -> None:
        found = read_record(at)
        check_publishable(found, Described.by_name(found.model, config, architecture), str(at))

    return [
        Reader("record", 80, [record], as_json, reads(at / "lillama.json", read_record, at)),
        Reader("record, as published", 1, [record], as_json, reads(at / "lillama.json", publishable)),
        Reader("run manifest", 200, [{**run, "overwrite": False}], as_json, reads(partial / "run.json", resume)),
    ]


def _readers_of_models(folder: Path, dense: Path, low: Path) -> list[Reader]:
    from lillama_core.architecture.find import find_architecture
    from lillama_core.models.gguf_header import parsed_once
    from lillama_core.models.integrity import check_safetensors
    from lillama_core.models.loading import load_config, load_model, meta_model
    from lillama_core.models.source import INDEX, WEIGHTS, check_index, locate
    from lillama_core.output.quantizer import LillamaConfig
    from lillama_core.output.shards import compressed_meta_model, compressed_reader, quantization_of
    from lillama_core.quantization.packing import GROUP

    config, low_config = (json.loads((at / "config.json").read_text(encoding="utf-8")) for at in (dense, low))
    raw = (low / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    index = {"metadata": {}, "weight_map": dict.fromkeys((k for k in header if k != "__metadata__"), WEIGHTS)}
    sharded = folder / "sharded"
    sharded.mkdir()
    shutil.copy(low / WEIGHTS, sharded)

    def dense_model(path: Path) -> None:
        source = locate(str(path))
        found = load_config(source)
        meta_model(found, find_architecture(found))

    def low_model(path: Path) -> None:
        source = locate(str(path))
        found = load_config(source, allow_compressed=True)
        if getattr(found, "quantization_config", None) is not None:
            compressed_reader(source, found, find_architecture(found))

    def gguf_model(path: Path) -> None:
        import torch

        # As commands do it.
        with parsed_once(str(path)):
            source = locate(str(path))
            load_model(source, find_architecture(load_config(source)), torch.float16)

    def low_shapes(path: Path) -> None:
        found = load_config(locate(str(path)), allow_compressed=True)
        if getattr(found, "quantization_config", None) is not None:
            said = LillamaConfig(**quantization_of(found))
            compressed_meta_model(find_architecture(found), found, said)

    def plan(value: Any) -> bytes:
        return as_json({**low_config, "quantization_config": value})

    plans = [low_config["quantization_config"]]
    bits = {"group": GROUP, "bits": {"8": ["elsewhere"], "4": []}}
    # A net with fewer channels, of which there are no weights: its shapes are read alone.
    width, size = low_config["hidden_size"], low_config["intermediate_size"] // 2
    shapes = {"gate_proj": [size, width], "up_proj": [size, width], "down_proj": [width, size]}
    narrow = {f"model.layers.0.mlp.{name}": {"kind": "linear", "shape": shape} for name, shape in shapes.items()}
    channels = {**plans[0], "version": 3, "sites": {**plans[0]["sites"], **narrow}}
    return [
        Reader("model config", 6, [config], as_json, reads(dense / "config.json", dense_model, dense)),
        Reader(
            "plan in a config", 6, [*plans, {**plans[0], "version": 2, "quantization": bits}], plan,
            reads(low / "config.json", low_model, low),
        ),
        Reader("channels in a config", 6, [channels], plan, reads(low / "config.json", low_shapes, low)),
        Reader(
            "safetensors header", 100, [[header, len(raw) - 8 - length]], containers.safetensors,
            reads(folder / "w.safetensors", check_safetensors), near=8,
        ),
        Reader("index of shards", 60, [index], as_json, reads(sharded / INDEX, check_index)),
        Reader(
            "GGUF", 12, [containers.gguf_llama(["<s>", "</s>", *"abcdefghijklmnop"])], containers.gguf,
            reads(folder / "m.gguf", gguf_model), near=900,
        ),
    ]  # fmt: skip


def _readers_of_ctranslate2(folder: Path) -> list[Reader]:
    import torch
    from tokenizers import pre_tokenizers

    from lillama_plugins.mamba.native import MambaSsmCheckpoint, expected_shapes, read_config
    from lillama_plugins.whisper.ctranslate2 import SPECIFICATION, convert, convert_weights
    from lillama_plugins.whisper.model_file import read_model_file

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: i for i, token in enumerate([*letters, "he", special[0]])}
    added = [{"id": len(letters) + 1 + i, "content": t, "special": True} for i, t in enumerate(special)]
    tokens = [*letters, "he", *special]
    settings: Mapping[str, Any] = {
        "config.json": {"suppress_ids": [3], "suppress_ids_begin": [4], "alignment_heads": [[0, 1]], "lang_ids": []},
        "tokenizer.json": {"model": {"vocab": known, "merges": ["h e"]}, "added_tokens": added},
        "vocabulary.json": tokens,
        "preprocessor_config.json": {"feature_size": containers.MELS, "sampling_rate": 16000, "n_fft": 400},
    }
    whisper = folder / "whisper"
    whisper.mkdir()
    variables = containers.whisper_variables(len(tokens))
    aliases = [["decoder/projection/weight", "decoder/embeddings/weight"]]
    (whisper / "model.bin").write_bytes(containers.model_bin([6, SPECIFICATION, variables, aliases]))

    def weights(path: Path) -> None:
        convert_weights(path, read_model_file(path, SPECIFICATION))

    def setting(data: bytes) -> None:
        name, _, given = data.partition(b"\n")
        changed = name.decode("utf-8", "replace")
        for other, value in settings.items():
            (whisper / other).write_bytes(given if other == changed else as_json(value))
        convert(whisper)

    def mamba_config(path: Path) -> None:
        reader = MambaSsmCheckpoint()
        if reader.accepts(path):
            reader.convert(path, path / "converted")

    at = folder / "mamba"
    at.mkdir()
    named = [[name, value] for name, value in settings.items()]
    mixer = {"d_state": 4, "d_conv": 4, "expand": 2, "dt_rank": "auto"}
    mamba = {"d_model": 8, "n_layer": 2, "vocab_size": 50, "ssm_cfg": mixer, "rms_norm": True}
    (at / "config.json").write_bytes(as_json(mamba))
    shapes = expected_shapes(read_config(at / "config.json"))
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, at / "pytorch_model.bin")
    return [
        Reader(
            "CTranslate2 model.bin", 20, [[6, SPECIFICATION, variables, aliases]], containers.model_bin,
            reads(folder / "model.bin", weights), near=400,
        ),
        Reader("CTranslate2 settings", 4, named, _named, setting),
        Reader("mamba-ssm config", 40, [mamba], as_json, reads(at / "config.json", mamba_config, at)),
    ]  # fmt: skip


def _named(value: Any) -> bytes:
    """A file's name and contents, of a pair into which faults were put."""
    name, inner = (*containers.items(value), None, None)[:2]
    return str(name).encode("utf-8", "replace") + b"\n" + as_json(inner)


def _readers_of_data(folder: Path) -> list[Reader]:
    from lillama_core.data.speech.utterances import read_speech
    from lillama_core.data.text.files import json_rows

    sounds = [f"{i}.wav" for i in range(2)]
    for name in sounds:
        (folder / name).touch()
    rows = [{"audio": name, "text": "a few words", "language": "en"} for name in sounds]
    chats = [{"text": "words"}, {"messages": [{"role": "user", "content": "hello"}]}]

    def lines(value: Any) -> bytes:
        return b"\n".join(as_json(row) for row in containers.items(value))

    return [
        Reader("manifest of speech", 250, [rows], lines, reads(folder / "manifest.jsonl", read_speech)),
        Reader(
            "rows of text", 250, [chats], lines,
            reads(folder / "rows.jsonl", lambda path: list(json_rows(path, None, None))), [as_json(chats)],
        ),
    ]  # fmt: skip
