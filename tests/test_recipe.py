"""The recipe: one object, three views, and every mistake in it named."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ended

from lillama_core import Recipe, UserError, load_recipe
from lillama_core.cli.main import _recipe, build_parser
from lillama_core.recipe.loading import recipe_names
from lillama_core.recipe.model import dashed

OTHER: dict[str, Any] = {
    "reduction": 0.35,
    "stacks": ("decoder",),
    "include": ("mixer.x_proj",),
    "exclude": ("mlp.*",),
    "share_experts": True,
    "compress_embeddings": True,
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
    "minimum_rank": 3,
    "rank_step": 2,
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
    "dtype": "bfloat16",
    "compute": "float32",
    "seed": 7,
}
"""A value for every field that differs from its default."""

FIELDS = [spec.name for spec in dataclasses.fields(Recipe) if spec.name != "name"]


def from_command_line(*arguments: str) -> Recipe:
    options: argparse.Namespace = build_parser().parse_args(["compress", "m", "-o", "o", *arguments])
    return _recipe(options)


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
    assert {"default", "fast", "lillama"} <= set(recipe_names())
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
        ("dtype: 16", "dtype must be a string, not 16"),
        ("recipe: 3", "recipe must be the name of its base, not 3"),
        ("recipe: lilama", "no recipe named 'lilama' (there are: default, fast, lillama); did you mean 'lillama'?"),
        ("recipe: gone.yaml", "no recipe file 'gone.yaml'"),
        ("recipe: r.yaml", "is based on itself"),
        ("steps: -1", "--steps must be at least 0, not -1"),
        ("batch_size: 0", "--batch-size must be at least 1, not 0"),
        ("held_out: 0.9", "--held-out must be between 0 and 0.5, not 0.9"),
        ("warmup: .nan", "--warmup must be between 0 and 1, not nan"),
        ("learning_rate: .inf", "--learning-rate must be a finite number"),
        ("seed: 5000000000", "--seed must be less than 2^32"),
        ("mode: pupil", "--mode must be one of teacher, student, teacher+student, not 'pupil'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
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
    hints = typing.get_type_hints(Recipe)
    for name in FIELDS:
        assert dashed(name) in said
        assert hints[name] is not None
    assert "--no-use-all-tokens" in said


def test_a_file_name_with_a_comma(tmp_path: Path) -> None:
    file = tmp_path / "a,b.txt"
    file.touch()
    assert from_command_line("--calibration", f"{file}@2").calibration == (f"{file}@2",)
    assert from_command_line("--calibration", "a,b", "--calibration", "c").calibration == ("a", "b", "c")
