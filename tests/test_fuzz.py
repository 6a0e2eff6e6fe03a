"""Whatever stands in a file from outside, a reader accepts it or refuses it as documented.

``benchmarks/fuzz.py`` feeds the same readers with as many inputs as there is time for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import Ended
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lillama_core.errors import LONGEST, LillamaError, UserError
from lillama_core.models.integrity import check_safetensors
from lillama_core.models.source import check_index
from lillama_testing.containers import safetensors
from lillama_testing.mutation import faulty, faulty_bytes
from lillama_testing.readers import Reader, make_readers

NAMES = (
    *("recipe", "machine", "record", "record, as published", "run manifest", "model config", "plan in a config"),
    *(
        "safetensors header",
        "index of shards",
        "channels in a config",
        "GGUF",
        "CTranslate2 model.bin",
        "CTranslate2 settings",
    ),
    *("mamba-ssm config", "manifest of speech", "rows of text"),
)
EXAMPLES = 60
OF_A_REPORT = 3
"""Fewer where a report is drawn each time."""


@pytest.fixture(scope="module")
def readers(_tiny_model: Path, compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("fuzz") / "inputs", _tiny_model, compressed)


def test_every_reader_is_tried(readers: dict[str, Reader]) -> None:
    assert sorted(NAMES) == sorted(readers)


@pytest.mark.parametrize("name", NAMES)
def test_valid_input_is_accepted(readers: dict[str, Reader], name: str) -> None:
    """Else the faults would be put into what is refused anyway."""
    reader = readers[name]
    for data in (*map(reader.write, reader.values), *reader.texts):
        reader.read(data)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_documented_errors_comes_out(readers: dict[str, Reader], name: str) -> None:
    reader = readers[name]

    @settings(
        max_examples=OF_A_REPORT if name == "record, as published" else EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False).map(reader.input))
    def run(data: bytes) -> None:
        reader.ends_as_documented(data)

    run()


def test_an_input_is_known_by_its_number() -> None:
    value = {"a": [1, 2, {"b": "c"}], "d": None}
    before = json.dumps(value)
    for number in range(50):
        assert repr(faulty(value, Random(number))) == repr(faulty(value, Random(number)))
        assert faulty_bytes(b"some bytes", Random(number)) == faulty_bytes(b"some bytes", Random(number))
    assert json.dumps(value) == before


# What was found


def test_an_error_stays_short_whatever_it_names() -> None:
    error = UserError("unknown key " + "x" * 100_000 + "; did you mean y?")
    assert len(str(error)) < LONGEST
    assert str(error).startswith("unknown key x")
    assert str(error).endswith("did you mean y?")


@pytest.mark.parametrize(("start", "shape"), [(float("inf"), [1]), (0, [float("inf")])])
def test_a_tensor_of_infinite_size(tmp_path: Path, start: float, shape: list[float]) -> None:
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [start, 4]}}
    (tmp_path / "w.safetensors").write_bytes(safetensors([header, 4]))
    with pytest.raises(UserError, match="is corrupt or truncated"):
        check_safetensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", [300 * "a", "a\0b"])
def test_an_index_with_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"w": f"{name}.safetensors"}}))
    with pytest.raises(UserError, match="lacks"):
        check_index(tmp_path / "i.json")


def test_more_layers_than_a_list_can_have(tmp_path: Path, run_cli: Callable[..., Ended]) -> None:
    """Of a checkpoint of mamba-ssm, whose config was made into a list of that length: 20 GB for 60 bytes."""
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 10**9, "vocab_size": 50}))
    started = time.process_time()
    assert "has 1,000,000,000 as n_layer; it must be at most 100,000" in run_cli("plan", tmp_path).error
    assert time.process_time() - started < 5


@pytest.mark.parametrize("part", ["parameters", "shapes", "recipe"])
def test_a_damaged_record_is_refused_before_the_work(
    compressed: Path, calibration_text: Path, tmp_path: Path, run_cli: Callable[..., Ended], part: str
) -> None:
    """Not at the end, when the card of the result is written."""
    model = Path(shutil.copytree(compressed, tmp_path / "m"))
    record: dict[str, Any] = json.loads((model / "lillama.json").read_text())
    record[part] = {"x": 1}
    (model / "lillama.json").write_text(json.dumps(record))
    for words in (("quantize",), ("finetune", "--data", calibration_text, "--objective", "lm")):
        said = run_cli(words[0], model, "-o", tmp_path / "out", *words[1:]).error
        assert f"the lillama.json of {str(model)!r} is damaged: no report can be made of it" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_message_of_an_error_that_is_pickled_is_the_same() -> None:
    import pickle

    assert str(pickle.loads(pickle.dumps(LillamaError("a line")))) == "a line"
