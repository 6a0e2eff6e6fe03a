"""The card, the recipe file and the report of a result."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lillama_core import Architecture, Recipe, load_recipe
from lillama_core.allocation.plan import Budget
from lillama_core.api.results import CompressionResult
from lillama_core.cli.main import main
from lillama_core.healing.options import HealingOptions
from lillama_core.models.source import ModelSource
from lillama_core.output import card, numbers
from lillama_core.output.card import write_card
from lillama_core.output.front_matter import hub_id
from lillama_core.output.record import RunRecord
from lillama_core.output.report import write_report
from lillama_core.output.stacks import stacks
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.spec import CompressionSpec
from lillama_core.strategies import make

MAPS = {"attention.query": (8, 8), "mlp.up": (16, 8), "mlp.down": (8, 16)}
HOSTILE = "<script>alert(1)</script>$\\frac$|`&\"'"
VOID = {"meta", "br"}
URL = re.compile(r"https?://[^\s\"'<]*")


def make_record(
    blocks: int = 3, paths: tuple[str, ...] = ("model.layers",), maps: dict[str, tuple[int, int]] = MAPS, **fields: Any
) -> RunRecord:
    """A record with ``blocks`` blocks in each stack; the first map of each block is left dense."""
    names = list(maps)
    notes, shapes, ranks = [], {}, {}
    for path in paths:
        for i in range(blocks):
            shapes |= {f"{path}.{i}.{name}": list(shape) for name, shape in maps.items()}
            ranks |= {f"{path}.{i}.{name}": 3 + i % 4 for name in names[1:]}
            notes.append(
                {
                    "name": f"{path}.{i}",
                    "ranks": dict.fromkeys(names[1:], 3 + i % 4),
                    "correction": 0.25 * (i % 3),
                    "loss_before": 2e-5 * (i + 1),
                    "loss_after": 1e-5 * (i + 1),
                    "error_before": 0.02 * (i + 1),
                    "error_after": 0.01 * (i + 1),
                    "steps": 4,
                    "kept_step": 4,
                }
            )
    sources = {
        "/home/someone/cal.txt": {
            "kind": "text",
            "path": "/home/someone/cal.txt",
            "rows": 8,
            "tokens": 512,
            "sha256": "c4" * 32,
        },
        "wikitext2": {"kind": "dataset", "dataset": "Salesforce/wikitext", "config": None, "split": "train"},
        "self": {"kind": "self", "rows": 8, "tokens": 512, "sha256": "72" * 32},
    }
    values: dict[str, Any] = {
        "model": "/home/someone/models/tiny",
        "model_fingerprint": "ab" * 32,
        "architecture": "transformer",
        "recipe": Recipe(name="mine", calibration=("/home/someone/cal.txt@2", "wikitext2")).to_dict(),
        "data": {"sha256": "27" * 32, "tokens": 1024, "sequence_length": 64, "sources": sources},
        "plan": {"format": "pivoted", "ranks": ranks},
        "shapes": shapes,
        "blocks": notes,
        "parameters": {
            "parameters_before": 134_515_008,
            "parameters_after": 107_612_006,
            "reduction": 1 - 107_612_006 / 134_515_008,
            "multiply_adds_per_token_before": 106_168_320,
            "multiply_adds_per_token_after": 79_265_318,
            "bytes_before": 538_060_032,
            "bytes_after": 430_448_024,
        },
        "fidelity": {
            "tokens": 2048,
            "perplexity_before": 20.12,
            "perplexity_after": 22.34,
            "divergence": 0.0812,
            "agreement": 0.871,
            "relative_error": 0.0312,
        },
        "bytes": {"dense": 269_030_016, "compressed": 215_250_123},
        "seconds": {"load model": 1.0, "sensitivity": 61.0, "statistics": 44.0, "profile": 105.5, "blocks": 412.0},
        "peak_memory_bytes": 2_300_000_000,
    }
    return RunRecord(**(values | fields))


def make_preparation(source: ModelSource, **fields: Any) -> CompressionSpec:
    return CompressionSpec(
        source=source,
        config=SimpleNamespace(model_type="tiny"),
        architecture=Architecture(name="transformer", model_types=("tiny",), stacks={"decoder": "model.layers"}),
        meta=nn.Module(),
        blocks={},
        maps=[],
        total_parameters=1,
        budget=Budget(1, 1, 0),
        format=make("formats", "pivoted"),
        **fields,
    )


@pytest.fixture
def local(tmp_path: Path) -> CompressionSpec:
    """A model in a directory that has no README."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    return make_preparation(ModelSource(str(folder), str(folder)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> CompressionSpec:
    """A model of the Hub, out of reach."""

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    return make_preparation(ModelSource("maker/tiny", "maker/tiny"))


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    folder.mkdir()
    return folder


class Page(HTMLParser):
    """Elements, attributes and text of a page; ``open`` ends empty when all that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(result: Path, record: RunRecord) -> tuple[str, Page]:
    """The report of ``record``, after checks that hold for all."""
    write_report(result, record)
    text = (result / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(text.encode()) < 1_000_000
    assert {url for url in URL.findall(text) if not url.startswith("http://www.w3.org/")} == set()
    assert not {"script", "link", "img", "iframe", "object", "image", "a"} & set(page.elements)
    for name, value in page.attributes:
        assert name != "src"
        assert not name.startswith("on")
        assert not name.endswith("href") or (value or "").startswith("#")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "nan" not in re.findall(r"\b\w+\b", page.text)
    assert "None" not in page.text
    return text, page


# Card


def test_card_front_matter_of_a_hub_model(result: Path, hub: CompressionSpec) -> None:
    write_card(result, make_record(model="maker/tiny"), hub)
    data = ModelCard.load(result / "README.md").data
    assert data.base_model == "maker/tiny"
    assert data.library_name == "transformers"
    assert data.tags == ["lillama", "low-rank"]
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["Salesforce/wikitext"]
    assert data.license is None


def test_card_lists_results_as_the_hub_reads_them(result: Path, hub: CompressionSpec) -> None:
    values = {"perplexity": 30.5, "accuracy/quiz": 42.0, "accuracy/mean": 42.0, "speed/prompt": 9.0}
    units = {"accuracy/quiz": "%", "accuracy/mean": "%"}
    measured = [
        {"name": name, "value": value, "unit": units.get(name, ""), "better": "lower", "meaning": "A number."}
        for name, value in values.items()
    ]
    record = make_record(model="maker/tiny", evaluation={"dense": measured[:3], "compressed": measured})
    write_card(result, record, hub)
    loaded = ModelCard.load(result / "README.md")
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in loaded.data.eval_results}
    assert found == {
        ("calibration", "perplexity"): 22.34,
        ("calibration", "kl-divergence"): 0.0812,
        ("calibration", "agreement"): 0.871,
        ("lillama", "perplexity"): 30.5,
        ("quiz", "accuracy"): 42.0,
    }
    assert {r.task_type for r in loaded.data.eval_results} == {"text-generation"}
    assert loaded.data.model_name == "maker/tiny, 20.0 % smaller"
    assert "| `accuracy/quiz` | 42.00 | 42.00 | +0.0% | % | A number. |" in loaded.text
    assert "| `speed/prompt` | — | 9.00 |" in loaded.text
    # What was measured before weights were rounded is not what this model does.
    bits = {
        "matrices": {"4": 7}, "with_feedback": 0, "calibration": None, "group": 32, "bytes_before": 9, "bytes_after": 4
    }  # fmt: skip
    record.quantization = bits
    write_card(result, record, hub)
    loaded = ModelCard.load(result / "README.md")
    assert loaded.data.eval_results is None
    assert "Measured before the weights were rounded." in loaded.text


def test_card_leaves_out_what_is_no_finite_number(result: Path, hub: CompressionSpec) -> None:
    record = make_record(model="maker/tiny")
    assert record.fidelity is not None
    record.fidelity |= {"perplexity_after": float("inf"), "divergence": float("nan")}
    write_card(result, record, hub)
    found = ModelCard.load(result / "README.md").data.eval_results
    assert [r.metric_type for r in found] == ["agreement"]


def test_card_says_what_the_record_says_of_the_origin(result: Path, local: CompressionSpec) -> None:
    """A trained or quantised result is described by name; what the name alone would say may be somebody else's."""
    named = replace(local, source=ModelSource("tiny", "tiny"))
    write_card(result, make_record(model="tiny"), named)
    data = ModelCard.load(result / "README.md").data
    assert (data.base_model, data.license) == (None, None)
    said = {"base_model": "maker/tiny", "license": {"license": "other", "license_name": "own", "tags": ["x"]}}
    write_card(result, make_record(model="tiny", **said), named)
    data = ModelCard.load(result / "README.md").data
    assert (data.base_model, data.license, data.license_name) == ("maker/tiny", "other", "own")
    assert data.tags == ["lillama", "low-rank"]


def test_a_model_in_the_cache_of_the_hub_has_a_name_there(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--maker--tiny" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    assert hub_id(ModelSource(str(snapshot), str(snapshot))) == "maker/tiny"
    assert hub_id(ModelSource(str(tmp_path), str(tmp_path))) is None
    assert hub_id(ModelSource("maker/tiny", "maker/tiny")) == "maker/tiny"


def test_card_of_a_local_model_has_no_base_model(result: Path, local: CompressionSpec) -> None:
    write_card(result, make_record(model=local.source.spec), local)
    assert ModelCard.load(result / "README.md").data.base_model is None


def test_card_takes_the_license_of_the_base_model(result: Path, local: CompressionSpec) -> None:
    readme = "---\nlicense: other\nlicense_name: own\nlicense_link: [1]\n---\ntext\n"
    (Path(local.source.location) / "README.md").write_text(readme)
    write_card(result, make_record(), local)
    data = ModelCard.load(result / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", None)


@pytest.mark.parametrize("readme", [b"---\n[: {\n---\n", b"\xff\xfe", b"", b"---\nlicense: [mit]\n---\n"])
def test_card_omits_a_license_that_cannot_be_read(result: Path, local: CompressionSpec, readme: bytes) -> None:
    (Path(local.source.location) / "README.md").write_bytes(readme)
    write_card(result, make_record(), local)
    assert ModelCard.load(result / "README.md").data.license is None


def test_card_states_the_numbers_of_the_record(result: Path, local: CompressionSpec) -> None:
    record = make_record()
    write_card(result, record, local)
    text = (result / "README.md").read_text(encoding="utf-8")
    for value in record.parameters.values():
        if isinstance(value, int) and value not in (538_060_032, 430_448_024):
            assert f"{value:,}" in text
    # The bytes written, not those planned.
    assert f"{record.bytes['dense']:,}" in text
    assert f"{record.bytes['compressed']:,}" in text
    for expected in ("20.0 % of its parameters", "20.1 → 22.3", "0.0812 nats/token", "87.1 %", "0.0312", "8 min 38 s"):
        assert expected in text
    for expected in (record.data["sha256"], "1,024 tokens", "2.3 GB", record.versions["torch"], "6 of its 9"):
        assert expected in text
    for option in record.recipe:
        assert f"| `{option}` |" in text
    assert "import lillama_core" in text
    assert "Everything else is as in the dense model." in text
    assert "lillama compress tiny --recipe lillama_recipe.yaml --output OUTPUT\n" in text


def test_card_lists_the_parts_of_the_rows(result: Path, local: CompressionSpec) -> None:
    record = make_record()
    record.data["parts"] = {
        "fit": {"rows": 28, "sha256": "a" * 64},
        "choose": {"rows": 0, "sha256": "b" * 64},
        "report": {"rows": 4, "sha256": "c" * 64},
    }
    write_card(result, record, local)
    text = (result / "README.md").read_text(encoding="utf-8")
    assert "to which nothing was fitted and by which nothing was chosen" in " ".join(text.split())
    assert f"| fit | statistics, training and correction | 28 | `{'a' * 16}` |" in text
    assert "| choose | choosing checkpoints and the size of a correction | 0 |  |" in text
    assert f"nothing was chosen by them | 4 | `{'c' * 16}` |" in text


def test_card_leaks_no_folder(result: Path, local: CompressionSpec) -> None:
    write_card(result, make_record(model=local.source.spec), local)
    for file in result.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "/home" not in text
        assert "someone" not in text
        assert str(result.parent) not in text


def test_card_states_what_a_gpu_needed(result: Path, local: CompressionSpec) -> None:
    record = make_record(device="cuda:0")
    record.peak_device_memory_bytes = 3_200_000_000
    write_card(result, record, local)
    assert "| peak memory of the GPU | 3.2 GB |" in (result / "README.md").read_text()


def test_card_without_measurements(result: Path, local: CompressionSpec) -> None:
    empty = {"tokens": 0, "relative_error": 0.5}
    fidelity = dict.fromkeys(("perplexity_before", "perplexity_after", "divergence", "agreement")) | empty
    encoder = Architecture(name="e", model_types=("tiny",), stacks={"encoder": "layers"})
    encoder.auto_class = "AutoModel"
    bare = {"bytes": {}, "seconds": {}, "peak_memory_bytes": 0, "data": {}}
    for measured in (fidelity, None):
        write_card(result, make_record(fidelity=measured, **bare), replace(local, architecture=encoder))
        text = (result / "README.md").read_text(encoding="utf-8")
        assert "None" not in text
        assert "perplexity" not in text
        assert "AutoModel.from_pretrained" in text
        assert ModelCard(text).data.pipeline_tag is None
        assert ("0.5" in text) == ("relative error" in text) or measured is None


def test_card_escapes_names(result: Path, hub: CompressionSpec) -> None:
    recipe = make_record().recipe | {"name": HOSTILE + "\n# heading"}
    source = replace(hub.source, spec=HOSTILE, location=HOSTILE)
    write_card(result, make_record(model=HOSTILE, recipe=recipe), replace(hub, source=source))
    loaded = ModelCard.load(result / "README.md")
    assert loaded.data.base_model == HOSTILE
    # Outside of code, whose content Markdown leaves alone, nothing of them is left.
    rest = re.sub(r"```.*?```|`[^`\n]*`", "", loaded.text, flags=re.DOTALL)
    assert "<" not in rest
    assert "alert" not in rest
    assert "\n# heading" not in loaded.text


def test_command_repeats_the_choices_outside_the_recipe(local: CompressionSpec) -> None:
    source = replace(local.source, gguf_file="my model.gguf", trust_remote_code=True)
    other = replace(local, source=source, config=SimpleNamespace(model_type="other"))
    assert card.reproduce_command(make_record(tokenizer="/home/someone/words"), other) == (
        "lillama compress 'my model.gguf' --recipe lillama_recipe.yaml --output OUTPUT"
        " --tokenizer words --architecture transformer --trust-remote-code"
    )


TRAINED: dict[str, Any] = {
    **HealingOptions(learning_rate=1e-4).model_dump(), "epochs": 0.5, "teacher": "my tiny", "kept_step": 0,
    "curve": [{"step": 0, "tokens": 0, "loss": 1.0}], "fidelity_before": None,
    "data": {
        "sources": {"cal.txt": {"kind": "text"}},
        "recipe": {"calibration": ["cal.txt@2"], "self_share": 0.5, "tokens": 4096, "held_out": 0.25},
    },
}  # fmt: skip
"""What a record says of a training after the compression."""


def test_card_has_the_commands_after_the_compression(result: Path, local: CompressionSpec) -> None:
    rounded = ROUNDED | {"target_size": 60_000_000, "exclude": ["lm_head"]}
    record = make_record(healing=[TRAINED], quantization=rounded)
    other = replace(local, source=replace(local.source, trust_remote_code=True))
    write_card(result, record, other)
    text = (result / "README.md").read_text(encoding="utf-8")
    assert (
        "--output OUTPUT --trust-remote-code\n"
        "lillama finetune OUTPUT --output OUTPUT2 --teacher 'my tiny' --data cal.txt@2 --tokens 4096 --held-out 0.25"
        " --learning-rate 0.0001 --epochs 0.5 --trust-remote-code\n"
        "lillama quantize OUTPUT2 --output OUTPUT3 --target-size 60000000 --exclude lm_head --trust-remote-code\n"
        "```\n\n`lillama_recipe.yaml` lies"
    ) in text


def test_card_says_what_was_done_with_data_that_no_command_names(result: Path, local: CompressionSpec) -> None:
    handed = {**TRAINED, "data": {**TRAINED["data"], "sources": {"data": {"kind": "texts"}}}}
    write_card(result, make_record(healing=[handed], quantization=ROUNDED | {"exclude": []}), local)
    text = (result / "README.md").read_text(encoding="utf-8")
    assert "--output OUTPUT\n```" in text
    assert "After that it was trained by `lillama finetune` and its weights were rounded by `lillama quantize`" in text


def test_recipe_file_is_the_recipe(result: Path, local: CompressionSpec) -> None:
    record = make_record()
    write_card(result, record, local)
    loaded = load_recipe(str(result / "lillama_recipe.yaml"))
    assert loaded.calibration == ("cal.txt@2", "wikitext2")
    assert loaded.to_dict() | {"calibration": 0} == record.recipe | {"calibration": 0}
    assert yaml.safe_load((result / "lillama_recipe.yaml").read_text(encoding="utf-8"))["name"] == "mine"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.size(999_949), "999.9 kB"),
        (numbers.size(999_960), "1.0 MB"),
        (numbers.size(0), "0 B"),
        (numbers.count(134_515_008), "134.5 M"),
        (numbers.count(7_000_000_000_000), "7.0 T"),
        (numbers.duration(0.04), "0.0 s"),
        (numbers.duration(59.7), "1 min 00 s"),
        (numbers.duration(3599.9), "1 h 00 min"),
        (numbers.number(48_738.1), "48,738"),
        (numbers.number(1e300), "1e+300"),
        (numbers.number(20.12), "20.1"),
    ],
)
def test_numbers_for_people(written: str, expected: str) -> None:
    assert written == expected


# Report


@pytest.mark.parametrize(
    ("blocks", "paths"), [(3, ("model.layers",)), (1, ("h",)), (60, ("encoder.layers", "decoder.layers"))]
)
def test_report_holds_every_map_and_block(result: Path, blocks: int, paths: tuple[str, ...]) -> None:
    text, page = report_of(result, make_record(blocks, paths))
    for name in MAPS:
        # In the heat map and in the table of each stack.
        assert page.text.count(name) == 2 * len(paths)
    # A row for the names, then one for each block.
    for table in re.findall(r'<table class="ranks">.*?</table>', text, flags=re.DOTALL):
        assert table.count("<tr>") == 1 + blocks
    assert page.elements.count("svg") == 2 + 2 * len(paths)


def test_report_states_the_numbers_of_the_record(result: Path) -> None:
    record = make_record()
    _, page = report_of(result, record)
    assert (
        "20.0 % smaller: 134.5 M → 107.6 M parameters, 269.0 MB → 215.3 MB;"
        " perplexity on rows that chose nothing 20.1 → 22.3" in page.text
    )
    for expected in (record.data["sha256"], record.model_fingerprint, "2.3 GB", "107,612,006", "6 min 52 s"):
        assert expected in page.text
    for name, version in record.versions.items():
        assert name in page.text
        assert version in page.text
    corrected = (
        "The last map of 2 of these blocks makes up for what was lost before it, by 25 to 50 % of what a regression"
    )
    assert corrected in " ".join(page.text.split())
    assert "/home" not in page.text


ROUNDED = {
    "bits": 4, "table_bits": 8, "matrices": {"4": 6, "8": 1}, "group": 32, "bytes_before": 215_250_000,
    "bytes_after": 60_000_000, "seconds": 47.0, "with_feedback": 0, "calibration": None, "target_size": None,
}  # fmt: skip
"""What a record says of a rounding."""


def test_numbers_from_before_a_rounding_say_so(
    result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record(quantization=ROUNDED)
    record.seconds["total"] = 600.0
    _, page = report_of(result, record)
    assert "; perplexity before rounding, on rows that chose nothing 20.1 → 22.3" in page.text
    assert page.text.count("before rounding; ") == 3
    assert "rounded to few bits after all that is shown below was done and measured" in page.text
    assert "6 in 4 bits, 1 in 8 bits" in page.text
    table = CompressionResult(result, record, lambda: None)
    for shown in (repr(table), table._repr_html_()):
        assert "perplexity (before rounding, 2048 held-out tokens)" in shown
    monkeypatch.setattr("lillama_core.pipeline.to_size.compress_to_size", lambda *_: record)
    assert main(["compress", "model", "-o", str(result), "--target-size", "60MB"]) == 0
    assert "22.34  (before rounding, calibration rows that chose nothing, 2048 tokens)" in capsys.readouterr().out


def test_report_shares_are_those_of_the_format(result: Path) -> None:
    record = make_record(blocks=1)
    (stack,) = stacks(record)
    assert stack.cells["attention.query"][0].text == "dense"
    cell = stack.cells["mlp.up"][0]
    assert (cell.text, cell.kept_fraction) == ("3", 3 * (16 + 8 - 3) / (16 * 8))
    _, page = report_of(result, record)
    assert f"{100 * cell.kept_fraction:.0f}" in page.text


def test_report_escapes_names(result: Path) -> None:
    recipe = make_record().recipe | {"name": HOSTILE}
    maps = {"first": (8, 8), HOSTILE.replace(".", ""): (8, 8)}
    # A stack is named only when there are two.
    paths = (f"{HOSTILE}.a", f"{HOSTILE}.b")
    record = make_record(model=f"maker{HOSTILE}", recipe=recipe, maps=maps, paths=paths, architecture=HOSTILE)
    record.data["sources"] = {HOSTILE: {"kind": HOSTILE}}
    record.machine["processor"] = HOSTILE
    record.versions["torch"] = HOSTILE
    text, page = report_of(result, record)
    assert "<script" not in text
    # Model (title and heading), recipe, source (name and kind), architecture, machine, version; each stack's heading,
    # and its map in plot and table.
    assert page.text.count("alert(1)") >= 8 + 2 * 3


def test_report_shows_what_was_predicted_and_what_both_models_answer(result: Path) -> None:
    def measured(value: float, better: str) -> dict[str, Any]:
        return {"name": HOSTILE, "value": value, "unit": "tokens/s", "better": better, "meaning": HOSTILE}

    record = make_record()
    record.losses = {
        "unit": "nats a prediction",
        "predicted": 0.2,
        "sizes": [[0.1, 0.05], [0.3, 0.5]],
        "parts": [[HOSTILE, 0.1, 0.2], ["mlp.up", 0.0, 0.1]],
    }
    record.evaluation = {
        "windows": 3,
        "sequence_length": 8,
        "dense": [measured(2.0, "higher") | {"name": "speed/decoding"}, measured(1.0, "lower")],
        "compressed": [
            measured(3.0, "higher") | {"name": "speed/decoding"},
            measured(1.5, "lower"),
            measured(1.6, "higher") | {"name": "speed_up/decoding", "interval": [1.4, 1.7], "unit": ""},
        ],
        "left_out": [HOSTILE],
        "answers": [{"prompt": HOSTILE, "dense": "first\nsecond", "compressed": HOSTILE}],
    }
    text, page = report_of(result, record)
    assert "<script" not in text
    assert "1.60 times (1.40 to 1.70; 2 → 3 tokens/s)" in page.text
    assert "first\nsecond" in page.text
    assert "this result, measured" in page.text
    # Prompt and answer; the metric that is no speed, and what all three mean; what was left out.
    assert page.text.count("alert(1)") == 2 + 4 + 1
    plain = report_of(result, make_record())[1]
    assert page.elements.count("svg") == plain.elements.count("svg") + 2


def test_report_of_a_run_without_training(result: Path) -> None:
    record = make_record(recipe=Recipe(steps=0).to_dict())
    for block in record.blocks:
        block |= {"steps": 0, "loss_after": block["loss_before"], "error_after": block["error_before"]}
    _, page = report_of(result, record)
    assert "Training was switched off" in page.text
    assert "before training" not in page.text


def test_report_without_measurements(result: Path) -> None:
    record = make_record(fidelity=None, bytes={}, seconds={}, peak_memory_bytes=0, data={})
    record.blocks[0] |= {"loss_before": None, "loss_after": None, "error_before": 0.0, "error_after": 0.0}
    _, page = report_of(result, record)
    assert "perplexity" not in page.text
    assert "Where the time went" not in page.text
    for block in record.blocks:
        block |= dict.fromkeys(("loss_before", "loss_after", "error_before", "error_after"))
    report_of(result, record)


def test_report_says_how_many_rows_experts_saw(result: Path) -> None:
    _, page = report_of(result, make_record(rows_seen={"a": 1234.4, "b": 7.0, "c": 900.0}))
    assert "between 7 and 1,234 of its rows" in " ".join(page.text.split())
    assert "900 in the middle" in " ".join(page.text.split())


def test_report_of_a_stack_that_stayed_dense(result: Path) -> None:
    record = make_record(paths=("encoder.layers", "decoder.layers"))
    record.plan["ranks"] = {k: v for k, v in record.plan["ranks"].items() if k.startswith("decoder")}
    _, page = report_of(result, record)
    assert "left dense" in page.text


def test_report_puts_many_maps_that_differ_in_numbers_in_one_row(result: Path) -> None:
    maps = {f"mlp.experts.{i}.up": (16, 8) for i in range(128)}
    _, page = report_of(result, make_record(blocks=24, maps=maps))
    assert "mlp.experts.*.up" in page.text
    assert "mlp.experts.7.up" not in page.text
    # One of each block's experts is dense.
    assert "3, dense" in page.text


def test_report_is_the_same_for_the_same_record(result: Path) -> None:
    record = make_record()
    assert report_of(result, record)[0] == report_of(result, record)[0]


# A real run


def test_card_and_report_of_a_run(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The cat sat on the mat, and the dog lay by the door. " * 100)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train([str(corpus)], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"]))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    dense = tmp_path / "dense"
    LlamaForCausalLM(config).save_pretrained(dense)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>").save_pretrained(dense)
    # As a model has that reads images, too, which calibrating on text has no use for.
    (dense / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    # A model from elsewhere may name a file of this machine.
    (tmp_path / "secret.json").write_text('{"password": "sesame"}')
    (dense / "video_preprocessor_config.json").symlink_to(tmp_path / "secret.json")
    recipe = Recipe(
        reduction=0.1,
        calibration=(str(corpus),),
        self_share=0.0,
        tokens=512,
        sequence_length=32,
        batch_size=2,
        sensitivity_tokens=128,
        steps=2,
    )
    output = tmp_path / "output"
    record = compress(Request(str(dense), output, recipe), "quiet")

    name = "preprocessor_config.json"
    assert (output / name).read_text() == (dense / name).read_text()
    assert not (output / "video_preprocessor_config.json").exists()
    readme = (output / "README.md").read_text(encoding="utf-8")
    report = (output / "report.html").read_text(encoding="utf-8")
    for text in (readme, report, (output / "lillama_recipe.yaml").read_text(encoding="utf-8")):
        assert str(tmp_path) not in text
    assert ModelCard(readme).data.library_name == "transformers"
    saved = json.loads((output / "lillama.json").read_text(encoding="utf-8"))
    assert saved["parameters"] == record.parameters
    assert f"{record.parameters['parameters_after']:,}" in readme
    assert f"{record.parameters['parameters_after']:,}" in report
    assert Page(report).open == []
    maps = {name.split(".", 3)[3] for name in record.shapes if ".layers." in name}
    assert maps <= set(re.findall(r"[\w.]+", report))
