"""The table of model types that no plugin names: what it claims works, what it refuses does not, the page shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from conftest import QUICK, Ended

from lillama_benchmarks.coverage import (
    BEGIN,
    CAUSES,
    END,
    PAGE,
    Refused,
    known_types,
    layers_of_each_kind,
    loaded_by,
    named_by_plugins,
    section,
    try_type,
)
from lillama_core.architecture.blocks import find_blocks
from lillama_core.errors import UserError
from lillama_core.models.loading import meta_model
from lillama_plugins.transformer.coverage import LOADED_BY, NAMED, REFUSED, TRANSFORMERS, WORKS
from lillama_registry import registry

OF_ANOTHER_VERSION = transformers.__version__ != TRANSFORMERS


def test_the_page_shows_the_table() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == section(TRANSFORMERS, WORKS, LOADED_BY, REFUSED, NAMED)


def test_the_readme_counts_what_the_table_has() -> None:
    readme = " ".join((PAGE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(WORKS)} of the {len(WORKS) + len(REFUSED) + NAMED} model types" in readme


def test_nothing_stands_in_the_table_twice() -> None:
    assert not set(WORKS) & set(REFUSED)
    named = {t for a in registry().architectures if not a.fallback for t in a.model_types}
    assert not named & (set(WORKS) | set(REFUSED)), "a plugin names these: run benchmarks/coverage.py on them again"
    assert {cause for cause, _ in REFUSED.values()} <= set(CAUSES)


def test_every_model_that_writes_text_is_in_the_table() -> None:
    """Of the version that it was made with; another has other model types, which are nobody's until it is made anew."""
    unknown = known_types() - set(WORKS) - set(REFUSED) - named_by_plugins()
    if OF_ANOTHER_VERSION and unknown:
        pytest.skip(
            f"the table is of transformers {TRANSFORMERS}; run benchmarks/coverage.py to learn of"
            f" {', '.join(sorted(unknown))} of {transformers.__version__}"
        )
    assert not unknown, "run benchmarks/coverage.py on these"
    if not OF_ANOTHER_VERSION:
        assert len(named_by_plugins()) == NAMED


def known(model_type: str) -> str:
    if OF_ANOTHER_VERSION:
        pytest.skip(f"the table is of transformers {TRANSFORMERS}, this is {transformers.__version__}")
    return model_type


@pytest.mark.parametrize("model_type", sorted(WORKS))
def test_each_type_of_the_table_is_claimed_once(model_type: str) -> None:
    (architecture,) = registry().architectures_for(model_type)
    assert architecture.fallback
    assert dict(architecture.stacks) == {"decoder": WORKS[model_type]}
    assert architecture.auto_class == LOADED_BY.get(model_type, "AutoModelForCausalLM")


# One with experts and a latent attention, one with two kinds of blocks, one with experts whose rows come sorted,
# one whose linear layers are a class of its own, one of which some blocks look at images alone,
# one that has rules of its own for layers of a name.
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next", "jetmoe", "falcon", "mllama", "xlstm"])
def test_what_works_works(model_type: str) -> None:
    assert try_type(known(model_type)) == WORKS[model_type]


@pytest.mark.parametrize("model_type", ["bert", "bart", "blip", "gemma3n", "reformer", "hrm_text", "rwkv", "zamba"])
def test_what_is_refused_is_refused_for_the_reason_given(model_type: str) -> None:
    with pytest.raises(Refused) as refused:
        try_type(known(model_type))
    assert refused.value.args == REFUSED[model_type]


def test_what_reads_more_than_text_is_loaded_with_all_that_it_has() -> None:
    assert loaded_by(known("qwen3_5")) == "AutoModelForImageTextToText"
    assert loaded_by("qwen3_5_text") == "AutoModelForCausalLM"
    assert {t: loaded_by(t) for t in LOADED_BY} == LOADED_BY


def test_blocks_that_take_the_keys_of_others_are_refused() -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.CONFIG_MAPPING[known("gemma4_text")](
        num_hidden_layers=4, layer_types=layers, num_kv_shared_layers=2
    )
    (architecture,) = registry().architectures_for("gemma4_text")
    with pytest.raises(UserError, match="num_kv_shared_layers of the config is 2"):
        find_blocks(architecture, meta_model(config, architecture))


def test_tiny_models_have_two_layers_of_each_kind() -> None:
    default = transformers.CONFIG_MAPPING[known("qwen3_next")]()
    assert layers_of_each_kind(default) == {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }


def test_a_model_type_of_the_table_needs_no_option(
    make_model: Callable[..., Path], tmp_path: Path, calibration_text: Path, run_cli: Callable[..., Ended]
) -> None:
    make_model(tmp_path / "dense", family="olmo")
    done = run_cli("compress", tmp_path / "dense", "-o", tmp_path / "out", "--calibration", calibration_text, *QUICK)
    assert done.status == 0, done
    record = json.loads((tmp_path / "out" / "lillama.json").read_text())
    assert record["architecture"] == "transformer"
    assert any(name.startswith(WORKS["olmo"]) for name in record["plan"]["ranks"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(**loaded.dummy_inputs).logits.isfinite().all()
