"""The recipe: one object, three views, and every mistake in it named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ended
from hypothesis import given
from hypothesis import strategies as st

from lillama_core import Recipe, UserError, load_recipe
from lillama_core.cli.compress import compress
from lillama_core.cli.options import recipe_of
from lillama_core.pipeline import CompressionPipeline
from lillama_core.recipe.loading import recipe_names
from lillama_core.recipe.model import SLOTS, dashed
from lillama_core.recipe.reading import check_options_are_read
from lillama_core.strategies import StrategyChoice, make

OTHER: dict[str, Any] = {
    "reduction": 0.35,
    "stacks": ("decoder",),
    "include": ("mixer.x_proj",),
    "exclude": ("mlp.*",),
    "share_experts": True,
    "compress_embeddings": True,
    "remove_channels": True,
    "target_speedup": 1.3,
    "target_parameters": 100_000_000,
    "speedup_work": "decoding",
    "calibration": ("wikitext2", "self@2"),
    "self_share": 0.25,
    "tokens": 4096,
    "sequence_length": 128,
    "samples": 32,
    "use_all_tokens": True,
    "held_out": 0.25,
    "init": "svd",
    "sensitivity_tokens": 512,
    "rescaling_tokens": 512,
    "correction_tokens": 256,
    "allocation": "uniform",
    "format": "factored",
    "loss": "mse",
    "mode": "teacher+student",
    "train": "block",
    "steps": 0,
    "batch_size": 2,
    "learning_rate": 1e-5,
    "schedule": "constant",
    "warmup": 0.5,
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "healing_epochs": 2.0,
    "dtype": "bfloat16",
    "compute": "float32",
    "seed": 7,
    "stages": {"allocate": {"parts": 4}},
}
"""A value for every field that differs from its default."""

FIELDS = [name for name in Recipe.model_fields if name != "name"]


def from_command_line(*arguments: str) -> Recipe:
    return recipe_of(compress.make_context("compress", ["m", "-o", "o", *arguments]).params)


def test_the_table_above_is_complete() -> None:
    assert sorted(OTHER) == sorted(FIELDS)
    assert not [name for name in FIELDS if getattr(Recipe(), name) == OTHER[name]]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_three_views(name: str, tmp_path: Path) -> None:
    value = OTHER[name]
    in_python = Recipe(**{name: value})
    file = tmp_path / "default.yaml"
    file.write_text(yaml.safe_dump({name: list(value) if isinstance(value, tuple) else value}))
    if isinstance(value, bool):
        arguments = [dashed(name)]
    elif isinstance(value, tuple):
        arguments = [dashed(name), ",".join(value)]
    elif isinstance(value, dict):
        arguments = ["--stages.allocate.parts", "4"]
    else:
        arguments = [dashed(name), str(value)]
    on_the_command_line = from_command_line(*arguments)
    assert getattr(in_python, name) == value
    assert load_recipe(str(file)) == on_the_command_line == in_python != Recipe()
    # Dashes, as on the command line, are welcome in a file.
    file.write_text(yaml.safe_dump({name.replace("_", "-"): in_python.to_dict()[name]}))
    assert load_recipe(str(file)) == in_python


def test_yaml_and_back(tmp_path: Path) -> None:
    recipe = Recipe(name="mine", **OTHER)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe


def test_values_reach_their_type_in_every_view(tmp_path: Path) -> None:
    """A list for a tuple, one name for a list of one, a whole number for a fraction, YAML 1.1's idea of 3e-4."""
    (tmp_path / "r.yaml").write_text("calibration: a.txt\ngradient_clip: 1\nlearning_rate: 3e-5\nstacks: [decoder]\n")
    found = load_recipe(str(tmp_path / "r.yaml"))
    written: Any = {"calibration": "a.txt", "gradient_clip": 1, "learning_rate": 3e-5, "stacks": ["decoder"]}
    assert found == Recipe(name="r", **written)
    assert found.calibration == ("a.txt",)
    assert type(found.gradient_clip) is float


def test_command_line_over_file_over_base(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("recipe: lillama\nsteps: 11\nseed: 5\ntokens: 5000\n")
    (tmp_path / "mine.yaml").write_text("recipe: below.yaml\nseed: 6\ntokens: 6000\n")
    found = from_command_line("--recipe", str(tmp_path / "mine.yaml"), "--tokens", "7000")
    lillama = load_recipe("lillama")
    assert (found.train, found.steps, found.seed, found.tokens) == (lillama.train, 11, 6, 7000)
    assert lillama.train != Recipe().train
    assert found.name == "mine"


def test_named_recipes() -> None:
    assert {"best", "default", "fast", "lillama"} <= set(recipe_names())
    assert load_recipe("default") == Recipe()
    for name in recipe_names():
        assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# nothing but a remark\n", "is empty"),
        ("[1, 2]", "must be a mapping"),
        ("steps", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("\tsteps: 3", "is not YAML"),
        ("steps: 2024-99-99", "is not YAML"),
        ("[" * 20000, "is not YAML"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
        ("step: 3", "unknown key 'step'; did you mean 'steps'?"),
        ("learning-rte: 3", "did you mean 'learning_rate'?"),
        ("1: 2", "unknown key 1"),
        ("steps: many", "steps must be a whole number, not 'many'"),
        ("steps: 3.5", "steps must be a whole number, not 3.5"),
        ("steps: true", "steps must be a whole number, not True"),
        ("steps: null", "steps must be a whole number, not None"),
        ("reduction: [1]", "reduction must be a number, not [1]"),
        ("use_all_tokens: 1", "use_all_tokens must be true or false, not 1"),
        ("calibration: [1]", "calibration must be a string or a list of strings"),
        ("calibration: {a: 1}", "calibration must be a string or a list of strings"),
        ("dtype: 16", "dtype must be one of float32, bfloat16, float16, not 16"),
        ("recipe: 3", "recipe must be the name of its base, not 3"),
        (
            "recipe: lilama",
            "no recipe named 'lilama' (there are: best, default, fast, lillama, lillama-repaired);"
            " did you mean 'lillama'?",
        ),
        ("recipe: gone.yaml", "no recipe file 'gone.yaml'"),
        ("recipe: r.yaml", "is based on itself"),
        ("steps: -1", "recipe 'r.yaml': steps must be at least 0, not -1"),
        ("batch_size: 0", "batch_size must be at least 1, not 0"),
        ("held_out: 0.9", "held_out must be between 0 and 0.5, not 0.9"),
        ("warmup: .nan", "warmup must be between 0 and 1, not nan"),
        ("learning_rate: .inf", "learning_rate must be a finite number"),
        ("seed: 5000000000", "seed must be less than 2^32"),
        ("init: 3", "init must be the name of a strategy, or a mapping with its name and options, not 3"),
        ("init: {name: [fisher]}", "init must be the name of a strategy"),
        ("init.: 3", "unknown key 'init.'"),
        ("mode: pupil", "mode must be one of teacher, student, teacher+student, not 'pupil'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_many_laughs(tmp_path: Path) -> None:
    """Ten levels of ten references each: its full text would not fit into memory."""
    levels = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    (tmp_path / "r.yaml").write_text("\n".join(["stacks:", "- &a0 [ha]", *(f"- {level}" for level in levels)]))
    with pytest.raises(UserError, match="stacks must be a string or a list of strings") as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name, expected in (("binary.yaml", "is not YAML"), ("folder.yaml", "no recipe file"), ("r" * 300, "cannot be")):
        with pytest.raises(UserError, match=expected):
            load_recipe(str(tmp_path / name))


def test_circles_are_found_across_folders(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.yaml").write_text("recipe: below/b.yaml\n")
    (tmp_path / "below" / "b.yaml").write_text("recipe: ../a.yaml\n")
    with pytest.raises(UserError, match="is based on itself"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_mistakes_in_python() -> None:
    wrong: list[dict[str, Any]] = [{"tokens": "many"}, {"calibration": 3}, {"reduction": None}, {"steps": 1.5}]
    for options in wrong:
        with pytest.raises(UserError, match=dashed(next(iter(options)))):
            Recipe(**options)


def test_every_field_is_explained(run_cli: Callable[..., Ended]) -> None:
    said = " ".join(run_cli("compress", "--help").stdout.split())
    for name in (f for f in FIELDS if f != "stages"):
        assert dashed(name) in said
        assert " ".join(str(Recipe.model_fields[name].description).split()[:3]) in said
    assert "--no-use-all-tokens" in said


def test_a_file_name_with_a_comma(tmp_path: Path) -> None:
    file = tmp_path / "a,b.txt"
    file.touch()
    assert from_command_line("--calibration", f"{file}@2").calibration == (f"{file}@2",)
    assert from_command_line("--calibration", "a,b", "--calibration", "c").calibration == ("a", "b", "c")


# Strategies and their options


@pytest.mark.parametrize(
    "text",
    [
        "init: {name: whitened, input_damping: 1e-3}",
        "init: {name: activation, input-damping: 0.001}",
        "init: whitened\ninit.input_damping: 0.001",
        "init.input-damping: 1e-3\ninit: whitened",
    ],
)
def test_a_strategy_brings_its_options(tmp_path: Path, text: str) -> None:
    (tmp_path / "default.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "default.yaml"))
    words = ("--init", "whitened", "--init.input-damping", "1e-3")
    assert recipe == from_command_line(*words) == Recipe(init={"name": "whitened", "input_damping": 1e-3})
    assert recipe.to_dict()["init"] == {"name": "whitened", "input_damping": 0.001}
    assert make("initializers", recipe.init).options.input_damping == 1e-3


def test_a_choice_is_comfortable() -> None:
    bare = Recipe().init
    assert bare == "fisher"
    assert "fisher" in {bare}
    assert (str(bare), repr(bare)) == ("fisher", "'fisher'")
    chosen = Recipe(init={"name": "fisher", "input_damping": 0.1}).init
    assert chosen != "fisher"
    assert str(chosen) == "fisher (input_damping: 0.1)"
    assert Recipe(init="sensitivity") == Recipe()
    assert Recipe(init=chosen).init == chosen
    assert Recipe().to_dict()["init"] == "fisher"
    assert make("initializers", "activation").name == "whitened"


def test_old_flat_names_stand_for_options_of_the_allocator(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("minimum_rank: 8\nallocation: top-first\nrank-step: 2\n")
    found = load_recipe(str(tmp_path / "default.yaml"))
    assert found.allocation == StrategyChoice(name="top-first", options={"minimum_rank": 8, "rank_step": 2})
    assert found == from_command_line("--minimum-rank", "8", "--allocation", "top-first", "--rank-step", "2")
    assert found == Recipe(minimum_rank=8, rank_step=2, allocation="top-first")
    # As earlier versions wrote it when nothing was chosen.
    assert Recipe(minimum_rank=None, rank_step=None) == Recipe()


def test_options_go_with_the_strategy_that_they_were_for(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "init: {name: whitened, input_damping: 0.5}\nallocation: top-first\nrank_step: 2\n"
    )
    mine = ("--recipe", str(tmp_path / "mine.yaml"))
    assert from_command_line(*mine, "--init", "svd").init == "svd"
    assert from_command_line(*mine, "--init", "whitened").init.options == {"input_damping": 0.5}
    assert from_command_line(*mine, "--init.input-damping", "0.1").init.options == {"input_damping": 0.1}
    assert from_command_line(*mine, "--minimum-rank", "3").allocation.options == {"rank_step": 2, "minimum_rank": 3}
    check_options_are_read(from_command_line(*mine, "--init", "svd", "--allocation", "spectrum"))


def test_unread_options_are_the_mistake_of_the_layer_that_sets_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-4\nsensitivity_tokens: 99\n")
    (tmp_path / "quick.yaml").write_text("recipe: base.yaml\nsteps: 0\ninit: svd\n")
    (tmp_path / "wrong.yaml").write_text("recipe: quick.yaml\nlearning_rate: 1e-4\n")
    check_options_are_read(load_recipe(str(tmp_path / "quick.yaml")))
    for recipe in (
        load_recipe(str(tmp_path / "wrong.yaml")),
        from_command_line("--recipe", str(tmp_path / "wrong.yaml"), "--steps", "0"),
    ):
        with pytest.raises(UserError, match=r"wrong\.yaml': learning_rate does nothing: with --steps 0"):
            check_options_are_read(recipe)
    with pytest.raises(UserError, match="--sensitivity-tokens does nothing"):
        check_options_are_read(Recipe(init="svd", loss="mse", sensitivity_tokens=99))


def test_a_choice_below_that_is_not_installed_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("init: {name: not-here, depth: 3}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match="--init must be one of"):
        check_options_are_read(recipe)
    check_options_are_read(recipe.with_options({"init": "fisher"}))


def test_what_a_run_writes_can_be_run_again(tmp_path: Path) -> None:
    """It says every option, and the ones that were not read are nobody's choice."""
    run = load_recipe("fast").with_options({"init": "svd"}, "command line")
    check_options_are_read(run)
    (tmp_path / "fast.yaml").write_text(run.to_yaml())
    again = load_recipe(str(tmp_path / "fast.yaml"))
    assert again == run
    check_options_are_read(again)
    with pytest.raises(UserError, match="--correction-tokens does nothing"):
        check_options_are_read(again.with_options({"correction_tokens": 5}, "command line"))


words = st.text("abcdefghij-_ :,'\"é#%{}[]", min_size=1, max_size=12)
numbers = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6) | st.booleans()
choices = st.builds(
    lambda name, options: StrategyChoice(name=name, options=options),
    words,
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,9}", fullmatch=True).filter(lambda x: x not in ("name", "options")), numbers
    ),
)
lists = st.lists(words, max_size=3).map(tuple)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(SLOTS, choices),
            **dict.fromkeys(("stacks", "include", "exclude", "calibration"), lists),
            **dict.fromkeys(
                ("share_experts", "compress_embeddings", "remove_channels", "use_all_tokens"), st.booleans()
            ),
            **dict.fromkeys(("tokens", "samples", "sequence_length", "batch_size"), st.integers(2, 10**9)),
            **dict.fromkeys(("steps", "correction_tokens", "rescaling_tokens", "seed"), st.integers(0, 2**32 - 1)),
            **dict.fromkeys(("self_share", "warmup", "weight_decay", "reduction"), st.floats(0, 1)),
            **dict.fromkeys(("learning_rate", "gradient_clip"), st.floats(0, allow_infinity=False)),
            "name": words,
            "held_out": st.floats(0, 0.5),
            "sensitivity_tokens": st.integers(1, 10**9),
            "mode": st.sampled_from(["teacher", "student", "teacher+student"]),
            "train": st.sampled_from(["factors", "block"]),
            "schedule": st.sampled_from(["cosine", "constant"]),
            "dtype": st.sampled_from([None, "float32", "bfloat16", "float16"]),
            "compute": st.sampled_from(["auto", "float32", "bfloat16"]),
        },
    )
)
def test_any_recipe_survives_being_written(options: dict[str, Any]) -> None:
    recipe = Recipe(**options)
    assert Recipe(**yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(Recipe(**recipe.to_dict())) == hash(recipe)


def test_stages_own_options(tmp_path: Path) -> None:
    """By mapping and by dots, over one another; what no chosen strategy makes a stage read is an error."""
    file = tmp_path / "mine.yaml"
    file.write_text("correction_tokens: 512\nstages:\n  blocks: {correction-ridge: 0.05}\n  allocate: {parts: 4}\n")
    recipe = load_recipe(str(file)).with_options({"stages.allocate.parts": "6"}, "command line")
    assert recipe.to_dict()["stages"] == {"blocks": {"correction_ridge": 0.05}, "allocate": {"parts": 6}}
    check_options_are_read(recipe)
    stages = {type(s).__name__: s for s in CompressionPipeline.registered(recipe).stages}
    assert (stages["BlocksStage"].options.correction_ridge, stages["AllocateStage"].options.parts) == (0.05, 6)  # type: ignore[attr-defined]
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(str(again)).stages == recipe.stages

    def said(options: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            check_options_are_read(load_recipe("default").with_options(options, "command line"))
        return str(caught.value)

    assert said({"stages.blocks.correction-ridge": 1}) == (
        "--stages.blocks.correction-ridge does nothing: no correction is made without --correction-tokens"
    )
    assert "no losses are measured" in said({"stages.allocate.parts": 3, "rescaling_tokens": 0})
    assert "'correction_ridge'" in said({"stages.blocks.corection_ridge": 1})
    assert "must be one of" in said({"stages.blcks.correction_ridge": 1})
    assert "must be" in said({"stages": {"blocks": 3}})
