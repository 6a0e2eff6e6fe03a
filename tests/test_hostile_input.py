"""Input that is made to hang, to fill the memory or to reach elsewhere ends in one line within seconds."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Ended, command, environment, run_process, tree
from safetensors import safe_open

from lillama_core.data.documents import UnrenderableChatError
from lillama_core.data.rendering import chat_renderer
from lillama_core.data.text import files
from lillama_core.errors import UserError
from lillama_core.models.loading import count_parameters, load_config, meta_model
from lillama_core.models.source import locate
from lillama_registry import registry

pytestmark = pytest.mark.timeout(300, func_only=True)

Cli = Callable[..., Ended]
EVALUATE = ("--windows", "1", "--limit", "1", "--sequence-length", "32")


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def refused(run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> Callable[..., str]:
    """``refused(*changes)``: a quick compression with ``changes``, its one line; nothing may be left behind."""

    def run(*changes: str | Path, model: str | Path = tiny_model) -> str:
        before = set(tree_names(tmp_path))
        data = () if "--calibration" in changes else ("--calibration", calibration_text)
        ended = run_cli("compress", model, "--output", tmp_path / "out", *data, *QUICK, *changes)
        assert ended.stdout == ""
        assert set(tree_names(tmp_path)) == before
        return ended.error

    return run


def tree_names(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*")]


# What is no regular file


OPENED = (
    *("config.json", "model.safetensors", "other.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "pytorch_model.bin", "lillama.json"),
)


@pytest.mark.parametrize("name", OPENED)
def test_pipes_in_a_model(run_cli: Cli, tiny_model: Path, name: str) -> None:
    (tiny_model / name).unlink(missing_ok=True)
    os.mkfifo(tiny_model / name)
    for words in (("plan",), ("evaluate",), ("verify",), ("bench",), ("quantize", "-o", tiny_model / "q")):
        said = run_cli(words[0], tiny_model, *words[1:]).error
        assert f"{name}' is a named pipe, not a regular file" in said


def test_sockets_and_devices_in_a_model(run_cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model)
    with socket.socket(socket.AF_UNIX) as listening:
        # By a short name: those of sockets are limited.
        listening.bind("vocab.json")
        assert "vocab.json' is a socket" in run_cli("plan", tiny_model).error
    (tiny_model / "vocab.json").unlink()
    (tiny_model / "vocab.json").symlink_to("/dev/zero")
    assert "vocab.json' is a device" in run_cli("plan", tiny_model).error


@pytest.mark.parametrize("option", ["--calibration", "--recipe", "--tokenizer"])
def test_pipes_that_options_name(refused: Callable[..., str], tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "pipe.yaml' is a named pipe" in refused(option, tmp_path / "pipe.yaml")
    assert "is a device" in refused(option, "/dev/zero")


def test_pipes_in_place_of_a_model_and_of_other_files(
    run_cli: Cli, tiny_model: Path, compressed: Path, tmp_path: Path
) -> None:
    for name in ("pipe", "pipe.gguf", "pipe.yaml"):
        os.mkfifo(tmp_path / name)
    assert "is a named pipe" in run_cli("plan", tmp_path / "pipe").error
    assert "is a named pipe" in run_cli("plan", tmp_path / "pipe.gguf").error
    assert "is a named pipe" in run_cli("plan", tiny_model, "--machine", tmp_path / "pipe.yaml").error
    assert "is a named pipe" in run_cli("evaluate", tiny_model, "--data", tmp_path / "pipe").error
    assert "no regular file" in run_cli("evaluate", tiny_model, "--json", tmp_path / "pipe").error
    assert "no regular file" in run_cli("bench", tiny_model, "--json", tmp_path / "pipe").error
    (tmp_path / "kept").mkdir()
    os.mkfifo(tmp_path / "kept" / "transcripts.jsonl")
    said = run_cli("evaluate", tiny_model, *EVALUATE, "--baseline-details", tmp_path / "kept").error
    assert "transcripts.jsonl' is a named pipe" in said
    (tmp_path / "tok").mkdir()
    os.mkfifo(tmp_path / "tok" / "tokenizer.json")
    assert "tokenizer.json' is a named pipe" in run_cli("evaluate", tiny_model, "--tokenizer", tmp_path / "tok").error


def test_pipes_among_recordings(tmp_path: Path) -> None:
    from lillama_core.data.speech.utterances import read_speech

    (tmp_path / "a.wav").touch()
    os.mkfifo(tmp_path / "transcripts.txt")
    with pytest.raises(UserError, match=r"transcripts.txt' is a named pipe"):
        read_speech(tmp_path)
    os.mkfifo(tmp_path / "manifest")
    with pytest.raises(UserError, match=r"manifest' is a named pipe"):
        read_speech(tmp_path / "manifest")


# Sizes in a config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**6}, "has 1,000,000 as num_hidden_layers; it must be at most 100,000"),
        ({"num_hidden_layers": 10**9}, "has 1,000,000,000 as num_hidden_layers"),
        ({"num_hidden_layers": 90_000}, "it describes more than"),
        ({"num_hidden_layers": -1}, "has -1 as num_hidden_layers; it must be at least 0"),
        ({"hidden_size": 10**6}, "it describes more than"),
        ({"hidden_size": 10**9}, "it describes more than"),
        ({"hidden_size": 10**30}, "has a number of 100 bits as hidden_size; it must be less than 2^63"),
        ({"hidden_size": -32}, "negative dimension"),
        ({"intermediate_size": 10**9}, "it describes more than"),
        ({"vocab_size": 10**12}, "it describes more than"),
        ({"head_dim": 10**9}, "it describes more than"),
        ({"num_labels": 10**9}, "has 1,000,000,000 as num_labels"),
        ({"text_config": {"n_layer": 10**9}}, "has 1,000,000,000 as n_layer"),
        ({"encoders": [{"depth": 10**9}]}, "has 1,000,000,000 as depth"),
    ],
)
def test_sizes_that_the_weights_cannot_have(run_cli: Cli, tiny_model: Path, changes: dict[str, Any], said: str) -> None:
    change_config(tiny_model, **changes)
    for words in (("plan", tiny_model), ("evaluate", tiny_model, *EVALUATE), ("plan", tiny_model, *AUTO)):
        started = time.process_time()
        assert said in run_cli(*words).error
        assert time.process_time() - started < 5


AUTO = ("--architecture", "auto")


def test_a_large_model_passes(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Of 126 layers, 16,384 wide, in 405 billion parameters: a header, and a file that is a hole."""
    folder, layers, width, inner, keys = tmp_path / "large", 126, 16384, 53248, 1024
    make_model(folder)
    change_config(
        folder, num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=128,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (width,)}
    shapes |= {f"{name}.weight": (128256, width) for name in ("model.embed_tokens", "lm_head")}
    of_a_block = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in of_a_block.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        try:
            stream.truncate(8 + len(raw) + end)
        except OSError:
            pytest.skip("this file system has no files of this size")
    source = locate(str(folder))
    (architecture,) = registry().architectures_for("llama")
    assert count_parameters(meta_model(load_config(source), architecture)) == end // 2


# Numbers


LARGE = "1" + 30 * "0"


@pytest.mark.parametrize("option", ["--windows", "--limit", "--sequence-length", "--seed"])
def test_numbers_beyond_range_in_an_evaluation(run_cli: Cli, tiny_model: Path, option: str) -> None:
    said = run_cli("evaluate", tiny_model, *EVALUATE, option, LARGE).error
    assert f"{option} must be at most 10^15, not 1000" in said
    assert f"{option} must be at least" in run_cli("evaluate", tiny_model, *EVALUATE, option, "-" + LARGE).error


@pytest.mark.parametrize(
    "option",
    [
        *("--tokens", "--sequence-length", "--samples", "--steps", "--batch-size", "--sensitivity-tokens"),
        *("--correction-tokens", "--rescaling-tokens", "--allocation.rank-multiple", "--stages.allocate.max-refits"),
    ],
)
def test_numbers_beyond_range_in_a_recipe(
    refused: Callable[..., str], run_cli: Cli, tiny_model: Path, tmp_path: Path, option: str
) -> None:
    if "max-refits" not in option:
        assert "must be at most 10^15, not 1000" in refused(option, LARGE)
    assert refused("--seed", LARGE).startswith("--seed must be less than 2^32")
    (tmp_path / "r.yaml").write_text(f"tokens: {LARGE}")
    assert "must be at most 10^15" in run_cli("plan", tiny_model, "--recipe", tmp_path / "r.yaml").error


@pytest.mark.parametrize("option", ["--tokens", "--sequence-length", "--samples", "--batch-size"])
def test_large_numbers_within_range(refused: Callable[..., str], option: str) -> None:
    """More than there can be, but no more than can be asked for."""
    if option != "--samples":
        assert refused(option, "1000000000000000")


def test_numbers_beyond_range_elsewhere(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    assert "--repeats must be from 1 to" in run_cli("bench", tiny_model, "--repeats", LARGE).error
    assert "--lengths must be from 1 to" in run_cli("bench", tiny_model, "--lengths", LARGE).error
    assert "--max-memory must be a size" in run_cli("plan", tiny_model, "--max-memory", LARGE).error
    words = ("benchmark", "--suite", "smoke", "--models", tiny_model, "-o", tmp_path / "b", "--jobs", LARGE)
    assert "--jobs must be from 1 to 1,000" in run_cli(*words).error


# Data


def write_gzip(path: Path, *parts: bytes, times: int) -> None:
    with gzip.open(path, "wb", 1) as stream:
        stream.write(parts[0])
        for _ in range(times):
            stream.write(parts[1])


def test_rows_that_are_too_long(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"text": "' + "a b " * 25_000_000 + '"}\n')
    assert "l.jsonl, line 1 is longer than 16 MiB; write one document a line" in refused(
        "--calibration", tmp_path / "l.jsonl"
    )
    write_gzip(tmp_path / "b.jsonl.gz", b'{"text": "a"}\n', b" " * (1 << 20), times=300)
    assert "b.jsonl.gz, line 2 is longer than 16 MiB" in refused("--calibration", tmp_path / "b.jsonl.gz")


def test_lists_that_are_too_long(refused: Callable[..., str], tmp_path: Path) -> None:
    write_gzip(tmp_path / "b.json.gz", b"[", b'{"text": "a"},\n' * (1 << 16), times=300)
    assert "is a JSON list of more than 256 MiB" in refused("--calibration", tmp_path / "b.json.gz")


def test_only_the_first_of_many_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_ROWS", 10)
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    rows = [{"text": f"row {n}"} for n in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (tmp_path / "a.json", tmp_path / "a.jsonl"):
        assert [row for _, row in files.json_rows(path, None, None)] == rows[:10]
        assert sorted(row["text"] for _, row in files.json_rows(path, 3, None)) == sorted(r["text"] for r in rows[:10])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": 200 * "a"}) + "\n" for _ in range(8)))
    with pytest.raises(UserError, match="has more than 0 MiB of text; ask for a part of it"):
        list(files.json_rows(tmp_path / "b.jsonl", None, None))
    with pytest.raises(UserError, match="ask for a part of it"):
        files.read_text(tmp_path / "b.jsonl", None)
    assert len(list(files.json_rows(tmp_path / "b.jsonl", None, 900))) == 4


@pytest.mark.parametrize(
    "text", ['[{"text": "a"} {"text": "b"}]', '[{"text": "a"},]', '[{"text": "a"}', '[{"text": "a"}] more', "[,]", "["]
)
def test_lists_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="starts like a JSON list but is not one"):
        list(files.json_rows(tmp_path / "a.json", None, None))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "starts like a JSON list but is not one"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not valid JSON"),
        (json.dumps({"text": "a"}) + "\n" + '{"a":' * 100_000 + "1" + "}" * 100_000, "line 2 is not valid JSON"),
        (
            '{"messages": [{"role": "user", "content": ' + "[" * 500 + '"a"' + "]" * 500 + "}]}",
            "message 1: its parts lie in one another deeper than 8",
        ),
    ],
)
def test_rows_within_rows(refused: Callable[..., str], tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "n.jsonl").write_text(content + "\n")
    assert said in refused("--calibration", tmp_path / "n.jsonl")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "lillama.json",
             "model.safetensors.index.json"]
)  # fmt: skip
@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_json_of_a_model_that_is_nested_without_end(
    run_cli: Cli, compressed: Path, tmp_path: Path, name: str, text: str
) -> None:
    model = shutil.copytree(compressed, tmp_path / "m")
    (model / name).write_text(text)
    words = ("verify", model) if name == "lillama.json" else ("evaluate", model, *EVALUATE)
    assert "recursion" in run_cli(*words).error


def test_parquet_with_text_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    buffers = [None, pa.py_buffer(struct.pack("<3i", 0, 2, 4)), pa.py_buffer(b"\xff\xfeab")]
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers)}), tmp_path / "u.parquet")
    said = refused("--calibration", tmp_path / "u.parquet")
    assert "u.parquet, row 1 of group 1 is not UTF-8 text" in said


def test_parquet_with_groups_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["the same"] * 50}), tmp_path / "a.parquet")
    assert len(list(files.parquet_rows(tmp_path / "a.parquet", None))) == 50
    monkeypatch.setattr(files, "MOST_ROWS", 20)
    with pytest.raises(UserError, match="group 1 of rows has more than"):
        list(files.parquet_rows(tmp_path / "a.parquet", None))


# Chat templates


LOOP = "{% for i in range(99999) %}"
ENDLESS = (
    LOOP * 4 + "{% endfor %}" * 4,
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{% set n = namespace(s='ab') %}" + LOOP + "{% set n.s = n.s + n.s %}{% endfor %}",
)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.parametrize("template", ENDLESS)
def test_chat_templates_without_end(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path, template: str
) -> None:
    (tiny_model / "chat_template.jinja").write_text(template)
    row = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text(400 * (json.dumps(row) + "\n"))
    said = refused("--calibration", tmp_path / "chat.jsonl")
    assert said.startswith("the chat template takes more than 2 seconds or 2 GiB for one conversation; correct")


def test_a_template_is_rendered_as_before(tiny_tokenizer: Any) -> None:
    """In one process for all conversations, of which one is refused and does not end it."""
    one = [{"role": "user", "content": "hello"}]
    with chat_renderer(tiny_tokenizer) as render:
        assert render(one) == render(one) == "<s>user: hello</s>"
        with pytest.raises(UnrenderableChatError):
            render([{"role": "user"}])
        assert render(one) == "<s>user: hello</s>"


# Outputs


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of Linux")
def test_outputs_that_cannot_be_written(run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for option in ("--details", "--json", "--baseline-details"):
        assert f"{option} names nothing" in run_cli("evaluate", tiny_model, *EVALUATE, option, "").error
    for place in ("/proc/x", "/sys/x", "/dev/null/x", tiny_model / "config.json" / "x"):
        assert "cannot be made" in run_cli("evaluate", tiny_model, *EVALUATE, "--details", place).error
        assert "cannot be written" in run_cli("evaluate", tiny_model, *EVALUATE, "--json", place).error
        assert "cannot be written" in run_cli("bench", tiny_model, "--json", place).error
        words = ("compress", tiny_model, "-o", place, "--calibration", calibration_text, *QUICK)
        assert "cannot be written" in run_cli(*words).error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a\ud800", "b\udcff"])
def test_names_that_are_no_text(run_cli: Cli, tiny_model: Path, name: str) -> None:
    for words in (("plan", name), ("compress", tiny_model, "-o", name), ("evaluate", tiny_model, "--details", name)):
        assert "is not UTF-8 text; rename what it names" in run_cli(*words).error


def test_an_output_in_python_that_is_no_text(tiny_model: Path) -> None:
    from lillama_core import compress

    with pytest.raises(UserError, match=r"output 'a\\ud800' is not UTF-8 text"):
        compress(tiny_model, "a\ud800")


def test_a_suite_on_a_device_that_there_is_not(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    words = ("benchmark", "--suite", "smoke", "--models", tiny_model, "-o", tmp_path / "b", "--device", "nope")
    assert run_cli(*words).error == "--device must be auto, cpu, cuda, cuda:N or mps, not 'nope'"
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_loaded_is_one_line(run_cli: Cli, tiny_model: Path) -> None:
    change_config(tiny_model, num_hidden_layers=3)
    assert "lacks 9 of its weights" in run_cli("evaluate", tiny_model, *EVALUATE).error


# Weights


@pytest.mark.parametrize("command_", [("plan",), ("evaluate", *EVALUATE)])
@pytest.mark.parametrize("name", ["model.bin", "weights", "a.safetensors.pt"])
def test_an_index_that_names_something_else(
    run_cli: Cli, tiny_model: Path, name: str, command_: tuple[str, ...]
) -> None:
    """Though what it names is safetensors: by its name, transformers would read it as a pickle."""
    with safe_open(tiny_model / "model.safetensors", "pt") as opened:
        keys = list(opened.keys())
    shutil.copy(tiny_model / "model.safetensors", tiny_model / name)
    (tiny_model / "model.safetensors").rename(tiny_model / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (tiny_model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = run_cli(command_[0], tiny_model, *command_[1:]).error
    assert f"names '{name}': weights are read from .safetensors files alone" in said


def test_a_config_that_names_its_weights(run_cli: Cli, tiny_model: Path) -> None:
    change_config(tiny_model, transformers_weights="adapter_model.bin")
    (tiny_model / "adapter_model.bin").write_bytes(b"\x80\x04.")
    for words in (("plan", tiny_model), ("evaluate", tiny_model, *EVALUATE)):
        assert "names weights of its own ('transformers_weights')" in run_cli(*words).error


# Signals


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_run_as_ctrl_c_does(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, number: str, request: pytest.FixtureRequest
) -> None:
    sent = signal.Signals[number]
    if signal.getsignal(sent) == signal.SIG_IGN:
        # As under nohup: whoever is started from here would ignore it, too.
        request.addfinalizer(lambda: signal.signal(sent, signal.SIG_IGN))
        signal.signal(sent, signal.SIG_DFL)
    words = ("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *QUICK)
    words = (*words, "--steps", "100000", "--verbose")
    with subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "Compressing decoder" in line:
                process.send_signal(sent)
                break
        said += process.stderr.read().splitlines(keepends=True)
    assert process.returncode == 1
    assert said[-1] == "lillama: error: interrupted; what was finished is kept, --resume goes on from there\n"
    assert "Traceback" not in "".join(said)
    assert (tmp_path / "o.partial" / "run.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_nohup_ignores_stays_ignored(tiny_model: Path) -> None:
    script = (
        "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from lillama_core.system.interrupt import noting_interrupts\n"
        "with noting_interrupts():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "went on\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["lillama_core.errors", "click.core", "lillama_registry.hooks"])
def test_ctrl_c_while_modules_are_imported(tiny_model: Path, module: str) -> None:
    """Python itself says what it has imported; the signal comes when ``module`` is."""
    words = [sys.executable, "-X", "importtime", "-m", "lillama_core", "plan", str(tiny_model)]
    # A job in the background ignores Ctrl-C, and what it starts as well.
    attentive = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=attentive) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.rstrip().endswith(f" {module}"):
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read().splitlines(keepends=True)
    told = [line for line in said if not line.startswith("import time:")]
    assert (process.returncode, told) == (1, ["lillama: error: interrupted\n"])


# Plugins


def test_mistakes_in_a_check_are_the_users(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    def said(*words: str | Path) -> str:
        ended = run_cli("plugin", "check", *words)
        assert ended.stdout == ""
        return ended.error

    assert "no plugin with architectures is named 'nope'" in said("nope")
    assert "no model at '/nowhere'" in said("transformer", "--model", "/nowhere")
    assert "--model names nothing" in said("transformer", "--model", "")
    assert "--calibration does nothing without --model" in said("transformer", "--calibration", "a.txt")
    assert "no such file" in said("transformer", "--model", tiny_model, "--calibration", tmp_path / "nowhere.txt")
    change_config(tiny_model, num_hidden_layers=3)
    assert "lacks 9 of its weights" in said("transformer", "--model", tiny_model)
    change_config(tiny_model, num_hidden_layers=2)
    (tiny_model / "tokenizer.json").unlink()
    assert "no tokenizer found" in said("transformer", "--model", tiny_model)


def test_a_pipe_in_a_fresh_process(tiny_model: Path) -> None:
    (tiny_model / "config.json").unlink()
    os.mkfifo(tiny_model / "config.json")
    assert "is a named pipe" in run_process("plan", tiny_model).error
