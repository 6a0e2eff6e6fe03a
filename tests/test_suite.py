"""The suite: its cells run apart from each other, what is done stays done, and its pages show what was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, command, environment, run_process

from lillama_benchmarks.cells import SuiteRunner, command_line, compress_options, planned_options, run_dense
from lillama_benchmarks.methods import METHODS, Method, find_methods
from lillama_benchmarks.pages import markdown, page, quality_metric, write_pages
from lillama_benchmarks.results import DENSE, FILE, Result, append, by_model, read, with_retention
from lillama_benchmarks.suites import DATA, SUITES, Suite, SuiteModel, choose_models
from lillama_core.cli.compress import compress
from lillama_core.cli.options import recipe_of
from lillama_core.errors import UserError
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.reading import check_options_are_read
from lillama_registry import registry


def metric(value: float, name: str = "perplexity", better: str = "lower", **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "", "better": better, "meaning": "What it is.", **more}


def result(method: str = "svd", reduction: float = 0.2, value: float = 30.0, **more: Any) -> Result:
    made = Result("m", "transformer", method, reduction, {"compress": {}, "evaluate": [{}]}, 800, 1600, [metric(value)])
    return replace(made, **more)


DENSE_RESULT = result(DENSE, 0.0, 20.0, parameters=1000, bytes=2000)


# Results


def test_results_survive_what_happens_to_files(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    append(tmp_path, DENSE_RESULT)
    append(tmp_path, result(error="no memory", metrics=[]))
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"model": "m", "archi')  # as a kill leaves it
    append(tmp_path, result(value=31.0))
    append(tmp_path, result("fast", value=float("inf")))
    found = read(tmp_path)
    assert list(found) == [("m", DENSE, 0.0), ("m", "svd", 0.2), ("m", "fast", 0.2)]
    assert found["m", "svd", 0.2] == result(value=31.0)
    assert found["m", "fast", 0.2].metrics[0]["value"] == float("inf")
    (tmp_path / FILE).write_text('{"colour": "red"}\n')
    with pytest.raises(UserError, match=r"line 1, is not a result of this suite: .*colour"):
        read(tmp_path)


def test_order_in_the_tables() -> None:
    rows = [result("b", 0.3), result("a", 0.1), result("b", 0.1), DENSE_RESULT, result("a", 0.3)]
    (found,) = by_model(rows).values()
    assert [(r.method, r.reduction) for r in found] == [(DENSE, 0), ("b", 0.1), ("a", 0.1), ("b", 0.3), ("a", 0.3)]


# Methods, models and what the commands are told


def test_methods_by_name() -> None:
    assert find_methods(()) == list(METHODS)
    assert [m.name for m in find_methods(("lillama", "svd"))] == ["lillama", "svd"]
    with pytest.raises(UserError, match=r"no method named 'svt' .*did you mean 'svd'"):
        find_methods(("svt",))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_compress_understands_what_it_is_told(method: Method) -> None:
    model = SuiteModel(
        "m", Path, (Path("a.txt"), "b.txt@2"), ({},), {"stacks": ("decoder",), "tokens": 512, "steps": 7}
    )
    options = compress_options(model, method, 0.3)
    words = ["compress", "x", "-o", "y", *command_line(options)]
    recipe = recipe_of(compress.make_context("compress", words[1:]).params)
    assert (recipe.reduction, recipe.calibration, recipe.stacks) == (0.3, ("a.txt", "b.txt@2"), ("decoder",))
    # What the model needs comes over the method, but a method that does not train stays one.
    wanted = {**method.options, "tokens": 512, "steps": 0 if method.name == "svd" else 7}
    for name, value in wanted.items():
        assert getattr(recipe, name) == value


def test_a_strategy_with_options_as_words() -> None:
    assert command_line({"init": {"name": "fisher", "input_damping": 1e-3}}) == [
        *("--init", "fisher", "--init.input-damping", "0.001")
    ]


def test_options_as_words() -> None:
    options = {"use_all_tokens": True, "share_experts": False, "limit": None, "windows": 3, "stacks": ["a", "b"]}
    assert command_line(options) == [
        *("--use-all-tokens", "--no-share-experts", "--windows", "3", "--stacks", "a", "--stacks", "b")
    ]


def test_the_suites_data_is_there(tmp_path: Path) -> None:
    models = choose_models(SUITES["cross-architecture"], (), tmp_path)
    assert len(models) >= 5
    assert "whisper-tiny.en-encoder" not in [m.name for m in models]
    for model in models:
        json.dumps(planned_options(model, METHODS[0], 0.2))
    held_out = (tmp_path / "wikitext2-held-out.txt").read_text(encoding="utf-8")
    assert (DATA / "wikitext2-test.txt").read_text(encoding="utf-8").endswith(held_out)


def test_a_model_whose_data_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model 'm' needs '.*gone\.txt', which is not there"):
        SuiteModel("m", Path, (tmp_path / "gone.txt",)).check()


def test_smoke_has_a_model_of_every_architecture(tmp_path: Path) -> None:
    found = choose_models(SUITES["smoke"], (), tmp_path)
    assert len(found) == len({a.name for a in registry().architectures if a.model_types})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--suite", "smok"],
            "no suite named 'smok' (there are: cross-architecture, smoke, arena, arena-local); did you mean 'smoke'?",
        ),
        (["--suite", "smoke", "--models", "tiny-lama"], "did you mean 'tiny-llama'?"),
        (["--suite", "smoke", "--models", "tiny-llama,,x"], "--models 'tiny-llama,,x' has an empty name"),
        (["--suite", "smoke", "--methods", "fsat"], "no method named 'fsat'"),
        (["--suite", "smoke", "--reductions", "0.1,2"], "numbers between 0 and 1, such as 0.1,0.2; not '2'"),
        (["--suite", "smoke", "--reductions", "half"], "not 'half'"),
    ],
)
def test_bad_requests(arguments: list[str], complaint: str, run_cli: Callable[..., Ended], tmp_path: Path) -> None:
    assert complaint in run_cli("benchmark", *arguments, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_two_directories_of_one_name(tmp_path: Path, run_cli: Callable[..., Ended]) -> None:
    for parent in "ab":
        (tmp_path / parent / "checkpoint").mkdir(parents=True)
    models = ",".join(str(tmp_path / parent / "checkpoint") for parent in "ab")
    ended = run_cli("benchmark", "--suite", "smoke", "--models", models, "-o", tmp_path / "out")
    assert "two models are called 'checkpoint'" in ended.error


def test_a_directory_that_is_there_is_left_alone(run_cli: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    assert "exists already; go on there with --resume" in run_cli("benchmark", "--suite", "smoke", "-o", tmp_path).error
    assert "is a file" in run_cli("benchmark", "--suite", "smoke", "-o", tmp_path / "notes").error
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


# Pages


class Text(HTMLParser):
    """What a page says, and which elements and attributes could fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.fetching: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetching += [f"{tag} {name}" for name, value in attributes
                          if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")]  # fmt: skip

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_pages_show_what_was_measured(tmp_path: Path) -> None:
    machine = {"system": "Linux", "cores": 2}
    results = [
        DENSE_RESULT,
        result(value=31.25, seconds=75.0, peak_memory_bytes=2_500_000_000, machine=machine, versions={"torch": "2"}),
        result("fast", 0.4, 55.5, metrics=[metric(55.5, standard_error=1.5), metric(0.5, "accuracy", "higher")]),
        result("fast", 0.3, metrics=[metric(31.0, standard_error=1.5, interval=[28.5, 34.0])]),
        result("default", 0.2, error="compress: <b>disk</b> full | again", metrics=[], parameters=None, bytes=None),
        result("svd", model="other <i>", metrics=[metric(float("nan"))]),
    ]
    write_pages(tmp_path, "mine", results)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "| method | removed | parameters | weights | perplexity ↓ | accuracy ↑ | time | peak memory |" in lines
    assert "| dense |  | 1.0 K | 2.0 kB | 20 | — |  |  |" in lines
    assert "| svd | 20 % | 800 | 1.6 kB | 31.2 | — | 1 min 15 s | 2.5 GB |" in lines
    assert "| fast | 40 % | 800 | 1.6 kB | 55.5 ± 1.5 | 0.5 |  |  |" in lines
    assert "| fast | 30 % | 800 | 1.6 kB | 31 [28.50, 34.00] | — |  |  |" in lines
    assert "- default 20 % failed: compress: &lt;b>disk&lt;/b> full \\| again" in lines
    assert "Measured on system Linux, cores 2; torch 2." in lines

    html = (tmp_path / "results.html").read_text(encoding="utf-8")
    shown = Text(html)
    assert shown.fetching == []
    assert "script" not in shown.tags
    assert {"b", "i"}.isdisjoint(shown.tags)
    assert "31.2" in shown.said
    assert " compress: <b>disk</b> full | again" in shown.said
    # A plot for the first model; there is no number to plot for the other.
    assert shown.tags.count("svg") == 1
    assert {"svd", "fast", "dense"} <= {s.strip() for s in shown.said}
    assert not re.findall(r"url\((?!#)|@import", html)


def test_the_plotted_metric_is_the_evaluations_first() -> None:
    assert quality_metric([DENSE_RESULT]) is None
    assert quality_metric([DENSE_RESULT, result(metrics=[metric(1, "wer"), metric(2)])]) == "wer"


def test_pages_without_any_result_that_worked() -> None:
    failed = [result(DENSE, 0.0, error="x", metrics=[]), result(error="y", metrics=[])]
    assert "dense failed: x" in markdown("s", failed)
    assert "2 failed" in page("s", failed)


# Whole runs


def test_a_failure_does_not_stop_the_rest_and_resume_fills_what_is_missing(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken"
    tiny_model.rename(broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    out = tmp_path / "out"
    words = ("benchmark", "--suite", "smoke", "--models", f"{broken},tiny-llama", "--output", out)
    done = run_process(*words)
    assert done.status == 1, done
    assert "2 of 4 cells succeeded" in done.stdout
    found = read(out)
    assert list(found) == [
        *(("broken", DENSE, 0.0), ("broken", "fast", 0.2), ("tiny-llama", DENSE, 0.0), ("tiny-llama", "fast", 0.2))
    ]
    assert "model.safetensors" in (found["broken", "fast", 0.2].error or "")
    dense, fast = found["tiny-llama", DENSE, 0.0], found["tiny-llama", "fast", 0.2]
    assert (dense.error, fast.error, fast.architecture) == (None, None, "transformer")
    assert fast.parameters is not None
    assert dense.parameters is not None
    assert fast.parameters < dense.parameters
    assert fast.parameters == fast.metric("footprint/parameters")["value"]  # type: ignore[index]
    assert dense.parameters == dense.metric("footprint/parameters")["value"]  # type: ignore[index]
    assert (fast.seconds or 0) > 0
    assert (fast.peak_memory_bytes or 0) > 1e8
    assert (out / "cells" / "tiny-llama" / "fast-0.2" / "lillama.json").is_file()
    assert not list(out.glob("cells/*/*/model*"))

    before = (out / FILE).read_text()
    again = run_process(*words, "--resume")
    assert again.status == 1
    added = (out / FILE).read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["model"] for line in added] == ["broken", "broken"]


def test_an_interrupted_suite_keeps_no_half_cell(tmp_path: Path) -> None:
    """Ctrl-C, which a terminal sends to the suite and to the command that it runs."""
    out = tmp_path / "out"
    models = "tiny-llama,tiny-mamba"
    words = command("benchmark", "--suite", "smoke", "--models", models, "--jobs", "1", "--output", out)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
                               start_new_session=True)  # fmt: skip
    log = out / "cells" / "tiny-llama" / "fast-0.2" / "compress.log"
    while not log.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said == "lillama: error: interrupted; what was finished is kept, --resume goes on from there\n"
    assert list(read(out)) == [("tiny-llama", DENSE, 0.0)]
    assert not (out / "cells" / "tiny-mamba").exists()


def test_results_of_another_model_are_not_reused(tmp_path: Path, make_model: Any) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    make_model(model, max_position_embeddings=512)
    words = ("benchmark", "--suite", "smoke", "--models", model, "--methods", "svd", "--output", out)
    assert run_process(*words).status == 0
    before = (out / FILE).read_text()
    assert run_process(*words, "--resume").status == 0
    assert (out / FILE).read_text() == before
    shutil.rmtree(model)
    make_model(model, max_position_embeddings=512, num_hidden_layers=3)
    assert run_process(*words, "--resume").status == 0
    assert len((out / FILE).read_text().splitlines()) == 2 * len(before.splitlines())
    # The methods that were not asked for do not count.
    assert "2 of 2 cells succeeded" in run_process(*words, "--resume", "--reductions", "0.2").stdout


def test_a_cell_that_fails_on_the_way_leaves_no_half_model(tmp_path: Path, make_model: Any) -> None:
    """The largest file that may be written stands for the space that is left."""
    model, out, size = tmp_path / "model", tmp_path / "out", 200_000
    make_model(model, max_position_embeddings=512, hidden_size=128, intermediate_size=256)
    words = ("benchmark", "--suite", "smoke", "--models", model, "--output", out)
    done = run_process(*words, file_bytes=size)
    assert done.status == 1, done
    assert "1 of 2 cells succeeded" in done.stdout
    error = read(out)["model", "fast", 0.2].error or ""
    assert "compress: " in error
    assert "too large" in error.lower()
    assert sorted(p.name for p in (out / "cells" / "model" / "fast-0.2").iterdir()) == ["compress.log"]


def test_a_model_that_cannot_be_made_ends_its_cells_alone(tmp_path: Path) -> None:
    def broken() -> Path:
        raise RuntimeError("no such wheel")

    found = run_dense(SuiteRunner(tmp_path), SuiteModel("broken", broken))
    assert found.error == "no such wheel"


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    done = run_process("benchmark", "--suite", "smoke", "--output", tmp_path / "out")
    assert done.status == 0, done
    for model, rows in by_model(read(tmp_path / "out").values()).items():
        assert [r.method for r in rows] == [DENSE, "fast"], model
        assert all(r.metrics for r in rows[1:]), model
    # Whatever is compared case by case is compared with the dense model, which was measured once.
    for model, name in (("tiny-whisper", "wer_change/read"), ("tiny-mixtral", "routing/agreement")):
        assert read(tmp_path / "out")[model, "fast", 0.2].metric(name), model


# Arenas


def test_what_is_kept_of_the_dense_model() -> None:
    names = ("perplexity/a", "perplexity/b", "accuracy/x")
    measured = (("perplexity/a", 20.0, "lower"), ("perplexity/b", 10.0, "lower"), ("accuracy/x", 80.0, "higher"))
    dense = result(DENSE, 0.0, metrics=[metric(value, name, better) for name, value, better in measured])

    def compressed(a: float, b: float, x: float) -> Result:
        found = zip((a, b, x), measured, strict=True)
        return result("fast", metrics=[metric(value, name, better) for value, (name, _, better) in found])

    some = compressed(25.0, 40.0, 60.0)
    rows = with_retention(
        [dense, some, compressed(float("inf"), 10.0, 80.0), replace(some, metrics=some.metrics[:2])], names
    )
    assert rows[0] == dense
    values = [{m["name"]: m["value"] for m in row.metrics if m["name"].startswith("retention")} for row in rows]
    # (20 / 25 + 10 / 40) / 2 and 60 / 80.
    assert values[1] == pytest.approx(
        {"retention/perplexity": 52.5, "retention/accuracy": 75.0, "retention/mean": 100 * (0.8 + 0.25 + 0.75) / 3}
    )
    # What overflows keeps nothing.
    assert values[2] == pytest.approx(
        {"retention/perplexity": 50.0, "retention/accuracy": 100.0, "retention/mean": 200 / 3}
    )
    # Of a row that lacks a metric no mean is shown, and of none where the dense model does.
    assert values[3] == {}
    assert with_retention(rows[1:], names) == rows[1:]
    assert with_retention([replace(dense, metrics=[]), some], names)[1] == some


def test_the_arenas_ask_for_what_their_pages_show(tmp_path: Path) -> None:
    tasks = {"arena": "arc_challenge", "arena-local": "lillama_cloze"}
    for name, task in tasks.items():
        suite = SUITES[name]
        labels = [e["label"] for e in suite.evaluations if e["metrics"] == "perplexity"]
        assert all(e["sequence_length"] == 2048 for e in suite.evaluations if e["metrics"] == "perplexity")
        assert [n for n in suite.retained if n.startswith("perplexity")] == [f"perplexity/{label}" for label in labels]
        assert f"accuracy/{task}" in suite.retained
    assert "accuracy/mmlu_abstract_algebra/5-shot" in SUITES["arena"].retained
    with pytest.raises(UserError, match=r"suite 'arena' has no models of its own: .*--models"):
        choose_models(SUITES["arena"], (), tmp_path)
    assert [m.name for m in choose_models(SUITES["arena-local"], (), tmp_path)] == ["smollm2-135m"]


def test_an_arena_of_a_tiny_model(tmp_path: Path, make_model: Any) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_model(model, max_position_embeddings=2048, tie_word_embeddings=False)
    words = ("benchmark", "--suite", "arena-local", "--models", model, "--output", out)
    done = run_process(*words, "--methods", "svd", "--reductions", "0.2")
    assert done.status == 0, done
    found = read(out)
    dense, svd = found["model", DENSE, 0.0], found["model", "svd", 0.2]
    names = [m["name"] for m in svd.metrics]
    assert names == [m["name"] for m in dense.metrics]
    assert names == [
        *("perplexity/wikitext2", "perplexity/tales", "perplexity/code"),
        *("accuracy/lillama_continuation", "accuracy/lillama_cloze", "accuracy/mean"),
    ]
    # Both saw the same, and no two runs did.
    data = [m["data"] for m in dense.metrics[:5]]
    assert data == [m["data"] for m in svd.metrics[:5]]
    assert len(set(data)) == 5
    assert {"lm-eval", "datasets", "torch"} <= svd.versions.keys()

    html = Text((out / "results.html").read_text(encoding="utf-8"))
    kept = [svd.metric(n)["value"] / dense.metric(n)["value"] for n in names[3:5]]  # type: ignore[index]
    kept += [dense.metric(n)["value"] / svd.metric(n)["value"] for n in names[:3]]  # type: ignore[index]
    (shown,) = with_retention([dense, svd], SUITES["arena-local"].retained)[1:]
    assert shown.metric("retention/mean")["value"] == pytest.approx(20 * sum(kept))  # type: ignore[index]
    assert "retention/mean (%) ↑" in html.said
    assert SUITES["arena-local"].protocol in html.said
    text = (out / "results.md").read_text(encoding="utf-8")
    assert SUITES["arena-local"].protocol in text
    assert f"SHA-256 of the data: {data[0]}." in text
    assert "lm-eval 0." in text


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_cells_set_only_options_that_their_method_reads(suite: Suite, tmp_path: Path) -> None:
    for model in suite.models(tmp_path):
        for method in METHODS:
            options = compress_options(model, method, 0.2)
            recipe = load_recipe(options.pop("recipe")).with_options(options, "command line")
            check_options_are_read(recipe)
