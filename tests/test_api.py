"""The Python API: compress, evaluate and load, as a notebook calls them, on tiny real models."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import TEXT, environment, tree
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama_core
from lillama_core import LillamaError, Recipe, UserError, compress, evaluate, load, load_recipe
from lillama_core.data.hashing import rows_sha256
from lillama_core.data.text.modality import Text
from lillama_registry import registry
from lillama_testing import make_tiny_model

QUICK: dict[str, Any] = {
    **{"tokens": 1024, "sequence_length": 32, "batch_size": 4, "sensitivity_tokens": 128, "steps": 3},
    **{"self_share": 0.0, "quiet": True},
}
TEXTS = [line for line in TEXT.read_text(encoding="utf-8")[60_000:80_000].splitlines() if line.strip()]


def same(a: Any, b: Any) -> bool:
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        return torch.equal(a(input_ids=tokens).logits, b(input_ids=tokens).logits)


@pytest.fixture(scope="module")
def result(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> lillama_core.CompressionResult:
    folder = tmp_path_factory.mktemp("api")
    return compress(
        make_model(folder / "tiny"),
        folder / "small",
        calibration=calibration_text,
        recipe="fast",
        reduction=0.3,
        **QUICK,
    )


def test_result_has_path_record_model_and_losses(result: lillama_core.CompressionResult) -> None:
    assert result.path.name == "small"
    assert (result.path / "lillama.json").is_file()
    assert result.record.recipe["name"] == "fast"
    assert result.record.parameters["reduction"] == pytest.approx(0.3, abs=0.01)
    assert list(result.losses) == [b["name"] for b in result.record.blocks]
    assert result.model is result.model
    assert same(result.model, AutoModelForCausalLM.from_pretrained(result.path).eval())


def test_result_shows_its_table_and_losses(result: lillama_core.CompressionResult) -> None:
    page, plain = result._repr_html_(), repr(result)
    before, after = (f"{result.record.parameters[f'parameters_{when}']:,}" for when in ("before", "after"))
    assert before in page
    assert after in page
    assert before in plain
    assert after in plain
    for name, (_, loss) in result.losses.items():
        assert f"<td>{name}</td>" in page
        assert f"{loss:.4g}" in page


def test_result_of_a_path_with_markup_is_escaped(result: lillama_core.CompressionResult) -> None:
    other = lillama_core.CompressionResult(Path("<b>x"), result.record, lambda: None)
    assert "<b>" not in other._repr_html_()


def test_a_loaded_model_is_compressed_as_its_directory_is_and_left_alone(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.train()
    weights = copy.deepcopy(model.state_dict())
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    before = tree(tiny_model)
    found = compress(model, tmp_path / "from_module", calibration=[calibration_text], **QUICK)
    named = compress(tiny_model, str(tmp_path / "from_path"), calibration=str(calibration_text), **QUICK)
    assert same(found.model, named.model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert tree(tiny_model) == before
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", "from_module", "from_path"}
    assert AutoTokenizer.from_pretrained(found.path)("the")["input_ids"]
    assert found.record.model.endswith("/tiny")


def test_a_model_made_in_memory_takes_its_tokenizer_as_an_object(
    tiny_model: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="give its tokenizer with tokenizer="):
        compress(model, tmp_path / "small", data=TEXTS, **QUICK)
    found = compress(model, tmp_path / "small", data=TEXTS, tokenizer=tiny_tokenizer, **QUICK)
    assert (found.path / "tokenizer.json").is_file()


def test_texts_are_read_as_the_same_texts_in_a_file_are(tiny_model: Path, tmp_path: Path) -> None:
    found = compress(tiny_model, tmp_path / "list", data=TEXTS, **QUICK)
    streamed = compress(tiny_model, tmp_path / "stream", data=(text for text in TEXTS), **QUICK)
    column = compress(
        tiny_model, tmp_path / "dataset", data=Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))}), **QUICK
    )
    assert found.record.data["sha256"] == streamed.record.data["sha256"] == column.record.data["sha256"]
    (source,) = found.record.data["sources"].values()
    assert source["kind"] == "texts"
    assert source["tokens"] == QUICK["tokens"]
    assert found.record.data["sha256"] != ""
    assert "texts handed over in Python" in (found.path / "README.md").read_text(encoding="utf-8")


def test_conversations_go_through_the_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    as_column = Dataset.from_dict({"messages": rows})
    found = compress(tiny_model, tmp_path / "rows", data=rows, **QUICK)
    assert (
        found.record.data["sha256"]
        == compress(tiny_model, tmp_path / "b", data=as_column, **QUICK).record.data["sha256"]
    )


def test_texts_are_mixed_with_named_sources_and_the_models_own(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "self_share": 0.5}
    found = compress(tiny_model, tmp_path / "small", data=TEXTS, calibration=f"{calibration_text}@3", **options)
    tokens = {name: s["tokens"] for name, s in found.record.data["sources"].items()}
    assert tokens == {"self": 512, str(calibration_text): 384, "data=": 128}


def batches(rows: torch.Tensor, how: str) -> Any:
    parts = rows.split(8)
    if how == "generator":
        return ({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in parts)
    if how == "one":
        return rows
    if how == "tensors":
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=8)
    if how == "dataset":
        return Dataset.from_dict({"input_ids": rows.tolist(), "text": ["x"] * len(rows)})
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("how", ["generator", "one", "tensors", "dataset", "lists"])
def test_batches_are_used_as_they_stand(how: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = torch.randint(2, 300, (32, 24), generator=torch.Generator().manual_seed(0))
    found = compress(tiny_model, tmp_path / "small", data=batches(rows, how), **{**QUICK, "tokens": 24 * 24})
    # As many rows as fill the tokens asked for.
    assert found.record.data["rows"] == 24
    assert found.record.data["sha256"] == rows_sha256(rows[:24])


def test_models_of_images_take_batches_of_pixels(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config)
    pixels = [{"pixel_values": part} for part in torch.rand(16, 3, 32, 32).split(4)]
    options = {**QUICK, "architecture": "auto", "tokenizer": ViTImageProcessor(size={"height": 32, "width": 32})}
    found = compress(model, tmp_path / "vit", data=pixels, **options)
    assert found.record.data["rows"] == 16
    with pytest.raises(UserError, match="takes batches of its inputs as data=, not texts"):
        compress(model, tmp_path / "other", data=TEXTS, **options)
    with pytest.raises(UserError, match="batch 0 has no 'pixel_values'"):
        compress(model, tmp_path / "other", data=[{"input_ids": torch.zeros(4, 3)}], **options)


def test_speech_takes_batches_as_for_training(tmp_path: Path) -> None:
    (architecture,) = registry().architectures_for("whisper")
    make_tiny_model(architecture, "whisper", tmp_path / "tiny")
    config = load(tmp_path / "tiny").config
    sound = torch.randn(8, config.num_mel_bins, 2 * config.max_source_positions)
    labels = torch.randint(5, 20, (8, 6))
    labels[:, 4:] = -100
    options = {**QUICK, "batch_size": 2}
    found = compress(tmp_path / "tiny", tmp_path / "a", data=[{"input_features": sound, "labels": labels}], **options)
    assert found.record.data["rows"] == 8
    assert found.record.fidelity is not None
    # The positions that predict something, of the rows held out.
    assert found.record.fidelity["tokens"] == 2 * 4
    with pytest.raises(UserError, match="neither 'labels' nor 'decoder_input_ids'"):
        compress(tmp_path / "tiny", tmp_path / "b", data=[{"input_features": sound}], **options)


def test_recipes_by_name_file_mapping_and_object_are_the_same(tiny_model: Path, tmp_path: Path) -> None:
    from lillama_core.api import compress
    from lillama_core.api.arguments import recipe_of

    path = tmp_path / "mine.yaml"
    path.write_text("recipe: fast\nsteps: 2\n", encoding="utf-8")
    wanted = load_recipe("fast").with_options({"steps": 2})
    for given in (path, str(path), {"recipe": "fast", "steps": 2}, wanted):
        found = recipe_of(given, None, {}, compress)
        assert {**found.to_dict(), "name": ""} == {**wanted.to_dict(), "name": ""}
    options = {"reduction": torch.tensor(0.25), "exclude": ["mlp.*"]}
    changed = recipe_of("default", Path("a.txt"), options, compress)
    assert changed == Recipe().with_options({"reduction": 0.25, "exclude": ["mlp.*"], "calibration": ["a.txt"]})


NO_MODEL = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be a Hub id, a loaded transformers model or a path, not a int"),
        ({"model": None}, "not None"),
        ({"model": NO_MODEL}, "model is a Linear, not a transformers model"),
        ({"model": ""}, "model must not be empty"),
        ({"model": b"tiny"}, "not a bytes"),
        ({"output": 3}, "output must be a path, not a int"),
        ({"output": None}, "output must be a path, not None"),
        ({"recipe": 3}, "recipe must be a name, a mapping, a Recipe or a path, not a int"),
        ({"recipe": "fats"}, "did you mean 'fast'"),
        ({"recipe": {"stebs": 3}}, "did you mean 'steps'"),
        ({"recipe": {"recipe": 3}}, "the base in recipe= must be"),
        ({"reducton": 0.2}, "did you mean 'reduction'"),
        ({"overwite": True}, r"compress\(\) has no option 'overwite'; did you mean 'overwrite'"),
        ({"reduction": "much"}, "reduction"),
        ({"reduction": [0.2]}, "reduction"),
        ({"steps": 1.5}, "steps"),
        ({"tokenizer": 3}, "tokenizer must be a Hub id, a directory, or a transformers tokenizer"),
        ({"architecture": 3}, "architecture must be a name or an Architecture"),
        ({"architecture": lillama_core.Architecture}, "instead of the class"),
        ({"device": 3}, "device= must be auto"),
        ({"calibration": ["It was a dark night. The"]}, "data= takes the texts"),
        ({"calibration": [{"text": "x"}]}, "data= takes the texts"),
        ({"calibration": torch.zeros(2)}, "data= takes the texts"),
        ({"calibration": "nothing-here.txt"}, "no such file"),
        ({"data": "a text"}, "give a list of texts"),
        ({"data": 3}, "data= takes a list of texts"),
        ({"data": []}, "data= is empty"),
        ({"data": [3.5, None]}, "data= item 0 is a float"),
        ({"data": [None]}, "data= item 0 is None"),
        ({"data": ["short", 3]}, "but those before are texts"),
        ({"data": [{"author": "Grimm"}]}, r"no text found in the columns \(author\)"),
        ({"data": {"train": Dataset.from_dict({"text": ["x"]})}}, r"data\['train'\]"),
        ({"data": ["short"]}, "less than one sequence"),
        ({"data": TEXTS[:3]}, "use_all_tokens=True"),
        ({"data": [{"input_ids": torch.zeros(4, 8), "attention_mask": torch.zeros(4, 8)}]}, "padded rows"),
        ({"data": [[1, 2, 3], [1, 2]]}, r"input_ids has the shape \[1, 2\]; \[rows, 3\] is expected"),
        ({"data": [torch.zeros(4, 8, 2)]}, "shape"),
        ({"data": [torch.full((8, 8), 100_000)]}, "the model knows only"),
        ({"data": [torch.zeros(2, 8)]}, "data= has 2 rows"),
        ({"data": [torch.zeros(8, 8)], "calibration": "self"}, "leave out calibration="),
    ],
)
def test_mistakes_are_user_errors_that_leave_nothing(
    arguments: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        compress(**{"model": tiny_model, "output": tmp_path / "small", **QUICK, **arguments})
    assert "--" not in str(caught.value)
    assert tree(tmp_path) == before


def test_an_output_that_is_there_is_refused_before_a_model_is_saved(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match="pass overwrite=True to replace it"):
        compress(model, tmp_path / "small", data=TEXTS, **QUICK)


def test_a_compressed_model_is_not_compressed_again(result: lillama_core.CompressionResult, tmp_path: Path) -> None:
    for model in (result.path, load(result)):
        with pytest.raises(UserError, match="already"):
            compress(model, tmp_path / "again", data=TEXTS, **QUICK)


def test_an_exception_of_the_callers_own_data_reaches_the_caller(tiny_model: Path, tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield from TEXTS[:3]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compress(tiny_model, tmp_path / "small", data=failing(), **QUICK)


def test_load_gives_the_model_in_eval_mode(result: lillama_core.CompressionResult, tmp_path: Path) -> None:
    model = load(str(result.path), dtype="bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert all(p.requires_grad for p in model.parameters())
    for arguments, message in (
        ({"model": tmp_path / "nothing"}, "no model at"),
        ({"model": 3}, "model must be"),
        ({"model": result.path, "dtype": "int4"}, "dtype must be auto, float32"),
        ({"model": result.path, "dtpe": "int4"}, "did you mean 'dtype'"),
        ({"model": result.path, "device": "gpu"}, "device= must be"),
    ):
        with pytest.raises(UserError, match=message):
            load(**arguments)


FEW: dict[str, Any] = {"windows": 4, "sequence_length": 32, "limit": 4, "quiet": True}


def test_evaluate_compares_with_a_baseline(result: lillama_core.CompressionResult, tiny_model: Path) -> None:
    found = evaluate(result, baseline=tiny_model, data=TEXTS, **FEW)
    assert found.baseline is not None
    before = {m.name: m.value for m in found.baseline}
    assert found["perplexity"] != before["perplexity"]
    assert list(found.to_dict()) == ["tiny", "small"]
    assert "perplexity" in repr(found)
    page = found._repr_html_()
    assert "<th>tiny</th><th>small</th><th>change</th>" in page
    with pytest.raises(KeyError, match="did you mean 'perplexity'"):
        found["perplexty"]


def test_evaluate_measures_loaded_models_as_their_directories(
    result: lillama_core.CompressionResult, tiny_model: Path, calibration_text: Path
) -> None:
    loaded = evaluate(
        load(result), baseline=AutoModelForCausalLM.from_pretrained(tiny_model), data=calibration_text, **FEW
    )
    named = evaluate(str(result.path), baseline=str(tiny_model), data=str(calibration_text), **FEW)
    assert loaded["perplexity"] == named["perplexity"]
    assert loaded.baseline is not None
    assert named.baseline is not None
    assert loaded.baseline[0].value == named.baseline[0].value


def test_evaluate_names_two_models_apart(tiny_model: Path, tmp_path: Path) -> None:
    found = evaluate(tiny_model, baseline=tiny_model, **FEW)
    assert list(found.to_dict()) == ["tiny (baseline)", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be"),
        ({"baseline": 3}, "model must be"),
        ({"window": 3}, r"evaluate\(\) has no option 'window'; did you mean 'windows'"),
        ({"windows": "ten"}, "windows must be a whole number, not 'ten'"),
        ({"windows": -1}, "windows= must be at least 0"),
        ({"tasks": 3}, "tasks must be a string or a list of strings"),
        ({"details": 3}, "details must be a path"),
        ({"data": 3}, "data= takes a list of texts"),
        ({"data": [torch.zeros(2, 8)]}, "data= takes texts to evaluate on"),
        ({"tokenizer": []}, "tokenizer must be"),
        ({"architecture": {}}, "architecture must be"),
    ],
)
def test_mistakes_of_an_evaluation_are_user_errors(arguments: dict[str, Any], message: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(**{"model": tiny_model, **FEW, **arguments})


def test_what_fails_late_can_be_resumed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with monkeypatch.context() as patch:
        # The disk is full when the result is to be written.
        patch.setattr(Text, "save_processor", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(LillamaError, match="resume=True goes on from there"):
            compress(tiny_model, tmp_path / "small", data=TEXTS, **QUICK)
    found = compress(tiny_model, tmp_path / "small", data=TEXTS, resume=True, **QUICK)
    assert found.record.resumed
    assert model.training is False


NOTEBOOK = """
import sys, types
# The three things that a kernel has and a plain process has not.
class Handle:
    def update(self, shown, raw):
        print("BAR", shown["text/plain"])
def display(shown, raw, display_id):
    return Handle()
ipython = types.ModuleType("IPython")
ipython.version_info = (9, 0)
ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
sys.modules["IPython"] = ipython
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].display = display
"""
RUN = """
import sys
from lillama_core import compress
compress(sys.argv[1], sys.argv[2], calibration=sys.argv[3], tokens=1024, sequence_length=32, batch_size=4,
         sensitivity_tokens=128, steps=3, self_share=0.0)
"""


UNBOUNDED = "import os, lillama_core\nassert 'ONEDNN_PRIMITIVE_CACHE_CAPACITY' not in os.environ\n"
BOUNDED = "assert os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'] == '128'\n"


def check_progress(shown: str, other: str) -> None:
    assert "Loading" in shown
    assert "Plan: " in shown
    assert "loss" in shown
    assert other == ""


def test_progress_shows_as_lines_and_a_compression_bounds_the_caches_of_kernels(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """In a process that loads its libraries itself: an import bounds nothing."""
    done = subprocess.run(
        [sys.executable, "-c", UNBOUNDED + RUN + BOUNDED, tiny_model, tmp_path / "s", calibration_text],
        capture_output=True,
        text=True,
        env={k: v for k, v in environment(PYTHONWARNINGS="ignore").items() if "CACHE_CAPACITY" not in k},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_progress(done.stderr, done.stdout)
    assert "BAR" not in done.stderr


def test_progress_shows_below_the_cell_of_a_notebook(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    done = warm.run(
        [sys.executable, "-c", NOTEBOOK + RUN, tiny_model, tmp_path / "s", calibration_text],
        capture_output=True,
        text=True,
        env=environment(PYTHONWARNINGS="ignore"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check_progress(done.stdout, done.stderr)
    assert "BAR" in done.stdout
    assert any("remaining" in line for line in done.stdout.splitlines() if line.startswith("BAR"))
    assert done.stdout.rstrip().endswith("BAR")
