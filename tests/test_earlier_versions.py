"""What version 0.1.0 wrote is read by this one: directories, and the recipes in them.

``tests/data/compressed-by-0.1.0`` was made by that version from a tiny random Llama: options of the tests' quick run,
``--compress-embeddings``, both formats. ``expected.safetensors`` holds the logits that it computed itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama_core
from lillama_core.recipe.reading import check_options_are_read

FOLDER = Path(__file__).parent / "data" / "compressed-by-0.1.0"


@pytest.mark.parametrize("format_", ["pivoted", "factored"])
def test_a_directory_loads_generates_and_is_evaluated(format_: str, run_cli: Callable[..., Ended]) -> None:
    folder = FOLDER / format_
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=expected["input_ids"]).logits, expected["logits"])
    tokens = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=5, min_new_tokens=5).shape[1] == tokens["input_ids"].shape[1] + 5
    done = run_cli("evaluate", folder, "--windows", "2", "--sequence-length", "32", "--limit", "2")
    assert done.status == 0, done
    assert "perplexity" in done.stdout


@pytest.mark.parametrize("format_", ["pivoted", "factored"])
def test_its_recipe_means_the_same(format_: str) -> None:
    recipe = lillama_core.load_recipe(str(FOLDER / format_ / "lillama_recipe.yaml"))
    assert (recipe.init, recipe.allocation, recipe.format) == ("fisher", "spectrum", format_)
    check_options_are_read(recipe)
