"""The documentation is true: its plugins run, its links lead somewhere, its commands exist, and it builds strictly."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK_ANYHOW, Ended, environment, run_process
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))],
)
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="(\w+)\.py"')

OF_PAGES = {"sizes", "--init.damping"}
"""Commands and options that one of the pages adds itself."""


def plugin_of(page: str) -> tuple[str, str]:
    """Module name and source of the plugin that a how-to page shows."""
    text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    found = [(title[1], code) for _, rest, code in FENCE.findall(text) if (title := TITLE.search(rest))]
    assert len(found) == 1, f"{page}: {len(found)} plugins"
    return found[0]


class Installed:
    """The plugin of a how-to page, installed as a distribution into a folder, and the command line that sees it."""

    def __init__(self, page: str, folder: Path) -> None:
        module, source = plugin_of(page)
        self.folder = folder
        folder.mkdir()
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lillama]\n{module} = {module}\n")

    def run(self, *arguments: str | Path) -> Ended:
        done = run_process(*arguments, env=environment(PYTHONPATH=str(self.folder)))
        assert done.status == 0, done
        return done

    def compress(self, model: Path, calibration: Path, *arguments: str | Path) -> dict[str, Any]:
        """The record of a run whose result lies beside the plugin, in ``small``."""
        output = self.folder.parent / "small"
        self.run("compress", model, "-o", output, "--calibration", calibration, *QUICK_ANYHOW, *arguments)
        record: dict[str, Any] = json.loads((output / "lillama.json").read_text())
        return record


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str], Installed]:
    return lambda page: Installed(page, tmp_path / "site-packages")


def test_architecture(
    install: Callable[[str], Installed], tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    plugin = install("architecture")
    dense = make_model(tmp_path / "dense", family="olmo2")
    assert plugin.compress(dense, calibration_text)["architecture"] == "olmo2"
    checked = plugin.run("plugin", "check", "olmo2")
    assert "FAILED" not in checked.stdout


def test_target(
    install: Callable[[str], Installed], tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    plugin = install("target")
    dense = make_model(tmp_path / "dense", family="falcon")
    record = plugin.compress(dense, calibration_text)
    assert record["architecture"] == "falcon"
    assert any("query_key_value" in name for name in record["plan"]["ranks"])
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert "falcon-linear" in json.dumps(config)


def test_allocator(
    install: Callable[[str], Installed], tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    plugin = install("allocator")
    dense = make_model(tmp_path / "dense", num_hidden_layers=4)
    planned = json.loads(plugin.run("plan", dense, "--allocation", "ends-first", "--json").stdout)
    ranks = {m["name"]: m["rank"] for m in planned["maps"]}
    assert ranks["model.layers.0.mlp.down_proj"] > ranks["model.layers.1.mlp.down_proj"]
    record = plugin.compress(dense, calibration_text, "--allocation", "ends-first")
    assert record["plan"]["ranks"] == {name: rank for name, rank in ranks.items() if rank is not None}


def test_initializer(install: Callable[[str], Installed], tiny_model: Path, calibration_text: Path) -> None:
    record = install("initializer").compress(tiny_model, calibration_text, "--init", "diagonal")
    assert str(record["recipe"]["init"]).find("diagonal") >= 0


def test_format(install: Callable[[str], Installed], tmp_path: Path, tiny_model: Path, calibration_text: Path) -> None:
    record = install("format").compress(tiny_model, calibration_text, "--format", "joined", "--no-remove-channels")
    assert record["plan"]["format"] == "joined"
    rank = record["plan"]["ranks"][name := "model.layers.0.mlp.up_proj"]
    out_features, in_features = record["shapes"][name]
    stored = load_file(tmp_path / "small" / "model.safetensors")[f"{name}.weight"]
    assert stored.shape == (out_features + in_features, rank)


def test_loss(install: Callable[[str], Installed], tiny_model: Path, calibration_text: Path) -> None:
    record = install("loss").compress(tiny_model, calibration_text, "--loss", "huber")
    assert "huber" in str(record["recipe"]["loss"])
    assert all(block["loss_after"] <= block["loss_before"] for block in record["blocks"])


def test_metric(install: Callable[[str], Installed], tiny_model: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    install("metric").run(
        *("evaluate", tiny_model, "--architecture", "measured"),
        *("--sequence-length", "32", "--windows", "4", "--json", numbers),
    )
    (measured,) = json.loads(numbers.read_text()).values()
    assert [m["name"] for m in measured] == ["perplexity", "next_token_hits"]
    assert 0 <= measured[1]["value"] <= 100


def test_modality(install: Callable[[str], Installed], tiny_model: Path, tmp_path: Path) -> None:
    rows = torch.randint(300, (32, 32), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", rows.numpy())
    record = install("modality").compress(tiny_model, tmp_path / "rows.npy", "--architecture", "fed-tokens")
    assert record["data"]["rows"] == 32
    assert list(record["data"]["sources"]) == ["rows.npy"]


def test_checkpoint(install: Callable[[str], Installed], tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    np.savez(tiny_model / "model.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    (tiny_model / "model.safetensors").unlink()
    # Converted, so that the maps are found: without the reader the directory has no weights.
    found = json.loads(install("checkpoint").run("plan", tiny_model, "--json").stdout)
    assert found["architecture"] == "transformer"
    ended = run_process("compress", tiny_model, "--output", tiny_model.parent / "o")
    assert "no .safetensors weights" in ended.error


def test_exporter(
    install: Callable[[str], Installed], tmp_path: Path, tiny_model: Path, calibration_text: Path
) -> None:
    plugin = install("exporter")
    plugin.compress(tiny_model, calibration_text)
    plugin.run("export", tmp_path / "small", "--to", "npz", "--output", tmp_path / "archive")
    assert np.load(tmp_path / "archive" / "model.npz")["model.layers.0.mlp.up_proj.weight"].shape == (64, 32)


def test_recipe(install: Callable[[str], Installed], tiny_model: Path, calibration_text: Path) -> None:
    record = install("recipe").compress(tiny_model, calibration_text, "--recipe", "hasty")
    assert record["recipe"]["name"] == "hasty"
    assert record["recipe"]["rescaling_tokens"] == 512


def test_python_interface(tmp_path: Path, tiny_model: Path, calibration_text: Path) -> None:
    """What the quickstart shows."""
    import lillama_core

    interface: Any = lillama_core
    options = {"tokens": 1024, "sequence_length": 32, "sensitivity_tokens": 128, "steps": 2, "self_share": 0.0}
    made = interface.compress(str(tiny_model), tmp_path / "small", calibration=[str(calibration_text)], **options)
    assert Path(made.path) == tmp_path / "small"
    assert made.record.parameters["parameters_after"] < made.record.parameters["parameters_before"]
    assert "<table" in made._repr_html_()
    loaded = interface.load(tmp_path / "small")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, made.model(input_ids=ids).logits)


def test_the_plot_and_the_tables_are_of_the_results() -> None:
    from lillama_benchmarks.plot_quality import HERE, draw, read_results

    text = (HERE / "results" / "figures.json").read_text(encoding="utf-8")
    results = read_results(text)
    assert (DOCS / "assets" / "quality.svg").read_text(encoding="utf-8") == draw(results)
    measured = {key: value["perplexity"] for key, value in json.loads(text).items() if "perplexity" in value}
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    for key, perplexity in measured.items():
        name, _, removed = key.partition(" ")
        home, tales = (
            f"{number:.1f}" if number < 1000 else f"{number:,.0f}"
            for number in (perplexity["wikitext2-test"], perplexity["tales-grimm"])
        )
        row = rf"\| `?{name}`?[^|]*\| *{removed.replace('%', ' %')} *\| \**{home}\** \| \**{tales}\** \|"
        assert re.search(row, page), f"docs/results.md has no row of {key}: {home}, {tales}"
        if removed in ("20%", ""):
            assert re.search(row, readme), f"README.md has no row of {key}: {home}, {tales}"


def test_answers_are_of_the_results() -> None:
    from lillama_benchmarks.questions import QUESTIONS, RESULTS, table

    results, page = json.loads(RESULTS.read_text(encoding="utf-8")), (DOCS / "questions.md").read_text(encoding="utf-8")
    asked = {key.partition("/")[0] for key in results if "/" in key}
    for question in (q for q in QUESTIONS if q.name in asked):
        assert table(question, results) in page, (
            f"docs/questions.md: python benchmarks/questions.py --table {question.name}"
        )


def test_a_question_shows_the_mean_of_its_seeds() -> None:
    from lillama_benchmarks.questions import Question, table

    def run(home: float) -> dict[str, dict[str, float]]:
        return {"perplexity": {"wikitext2-test": home, "tales-grimm": 20.0, "code": 1234.5}}

    question = Question("what", "", {"this": {}, "that": {}, "unmeasured": {}})
    results = {"dense": run(10.0), "what/this/0": run(11.0), "what/this/1": run(12.0), "what/that/0": run(13.0)}
    assert table(question, results).splitlines() == [
        "| what | WikiText-2 | tales | code |",
        "|---|---:|---:|---:|",
        "| dense | 10.0 | 20.0 | 1,234 |",
        "| this | 11.5 ± 0.5 | 20.0 ± 0.0 | 1,234 ± 0 |",
        "| that | 13.0 | 20.0 | 1,234 |",
    ]


def test_options(install: Callable[[str], Installed], tiny_model: Path, calibration_text: Path) -> None:
    plugin = install("options")
    record = plugin.compress(tiny_model, calibration_text, "--init", "damped", "--init.damping", "1e-2")
    assert record["recipe"]["init"] == {"name": "damped", "damping": 0.01}
    assert "damping" in plugin.run("strategies").stdout


def test_stage(install: Callable[[str], Installed], tiny_model: Path, calibration_text: Path) -> None:
    record = install("stage").compress(tiny_model, calibration_text)
    assert any(line.endswith("maps stay dense") for line in record["remarks"])


def test_command(install: Callable[[str], Installed], tiny_model: Path) -> None:
    assert "model.safetensors" in install("command").run("sizes", tiny_model).stdout


def test_every_how_to_page_is_run() -> None:
    pages = {page.stem for page in (DOCS / "how-to").glob("*.md")} - {"index", "several-processes"}
    assert pages == {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in pages}
    for page in pages:
        plugin_of(page)


def outside_fences(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", outside_fences(page)):
            link = next(filter(None, target))
            if not re.match(r"[a-z]+:", link) and not (page.parent / (link.partition("#")[0] or page.name)).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_paths_in_the_text_exist() -> None:
    named = set()
    for page in PAGES:
        for code in re.findall(r"`([\w./*-]+)`", outside_fences(page)):
            top = code.split("/")[0]
            if "/" in code and top in ("lillama_core", "registry", "plugins", "tests", "benchmarks", "docs", ".ci"):
                named.add(code)
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named.update(re.findall(r"(?:lillama_core|benchmarks|plugins)/[\w./-]*\w", notice))
    assert named
    assert not {path for path in named if not list(ROOT.glob(path.rstrip("/")))}


def shown_commands() -> Iterator[tuple[Path, list[str]]]:
    """Every lillama command in the pages' shell examples: page and words."""
    for page in PAGES:
        for language, _, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in ("sh", "console"):
                for line in body.replace("\\\n", " ").splitlines():
                    words = line.partition("#")[0].split()
                    if words[:1] == ["lillama"]:
                        yield page, words[1:]


def test_commands_in_the_text_exist(run_cli: Callable[..., Ended]) -> None:
    @functools.cache
    def help_of(*command: str) -> str:
        return run_cli(*command, "--help").stdout

    wrong, commands, options = [], set(), set()
    for page, words in shown_commands():
        if words[0].startswith("-"):
            continue
        command = words[:2] if words[0] == "plugin" else words[:1]
        if words[0] not in help_of():
            commands.add(words[0])
            continue
        for option in (word.partition("=")[0] for word in words if word.startswith("-")):
            if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(*command)):
                options.add(option)
                wrong.append(f"{page.relative_to(ROOT)}: {command} has no {option}")
    dotted = {option for option in options if re.fullmatch(r"--(init|allocation|loss|format|stages)\.[\w.-]+", option)}
    assert commands <= OF_PAGES
    assert dotted == options, wrong
    listed = run_cli("strategies").stdout
    assert not [option for option in dotted - OF_PAGES if option not in listed]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install '.[dev]' brings it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Nothing is fetched when a page is read.
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]*\s(?:src|href)=\"?(https?://[^\" >]+)", page.read_text())
        assert not fetched, f"{page.name}: {fetched}"
    shutil.rmtree(tmp_path / "site")
