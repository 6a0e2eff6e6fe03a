"""``lillama plugin new NAME``: a repository for a plugin that describes an architecture, with tests that pass."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from string import Template
from typing import Any

from lillama_core.architecture.auto import discover
from lillama_core.architecture.base import Architecture
from lillama_core.data.modality import modality_of
from lillama_core.errors import UserError, nearest, one_line
from lillama_core.evaluation.base import language_model_evaluation
from lillama_core.models.transformers_adapter import causal_classes
from lillama_registry import API_VERSION, registry
from lillama_testing.tiny import merged, tiny_sizes

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "lillama-$name"
version = "0.1.0"
description = "Compress $model_type models with lillama."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["lillama>=0.1"]

[project.optional-dependencies]
test = ["pytest"]

# lillama finds the plugin by this.
[project.entry-points.lillama]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
""",
    "$module.py": '''\
"""Tells lillama where $model_type models keep their blocks."""

from lillama_core import Architecture, hookimpl, language_model_evaluation

LILLAMA_API = $api  # the version of lillama's plugin interface that this is made for


class $class_name(Architecture):
    """Every linear map of every block; `exclude` takes some out, `maps` names those to take."""

    name = "$name"
    model_types = ("$model_type",)  # values of config.model_type
    stacks = $stacks  # name of a stack -> path of its list of blocks
    evaluation = language_model_evaluation  # perplexity, accuracy, speed, footprint


@hookimpl
def lillama_architectures():
    return [$class_name()]
''',
    "tests/test_conformance.py": """\
from $module import $class_name

from lillama_registry import API_VERSION, registry
from lillama_testing import parametrize_with_checks


@parametrize_with_checks([$class_name()])
def test_conformance(check):
    check()


def test_the_plugin_is_found():
    assert [a.name for a in registry().architectures_for("$model_type")] == ["$name"]
""",
    "README.md": """\
# lillama-$name

Compresses $model_type models with lillama.

```sh
pip install .
lillama plugin check $name
lillama compress path/to/$model_type --output smaller --reduction 0.2 --calibration my-texts.txt
```

`pip install '.[test]' && pytest` runs lillama's conformance kit on a tiny random model.
""",
    ".github/workflows/test.yml": """\
name: test
on: [push, pull_request]
jobs:
  test:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install '.[test]'
      - run: pytest
""",
    ".gitignore": "__pycache__/\n*.egg-info/\nbuild/\ndist/\n",
}
"""Path -> template of what is in it."""


def new_plugin(name: str, model_type: str | None, folder: Path) -> Architecture:
    """Write a plugin's repository into ``folder``, which must not exist, and return the architecture that it describes.

    ``model_type`` is transformers' name of a family of causal language models, by default ``name`` itself. Raises
    UserError where there is no such family, where a plugin describes it already, or where its blocks are not found.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{name!r} is no name for a plugin: small letters, digits and single hyphens, such as 'my-model'"
        )
    described = describe(name, model_type or name.replace("-", "_"), given=model_type is not None)
    (found,) = described.model_types
    words = {
        "name": name,
        "module": f"lillama_{name.replace('-', '_')}",
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "model_type": found,
        "api": API_VERSION,
        "stacks": repr(dict(described.stacks)).replace("'", '"'),
    }
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists already; name another folder with --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made = Path(scratch) / "made"
            for path, text in FILES.items():
                file = made / Template(path).substitute(words)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(Template(text).substitute(words), encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written: {error.strerror}") from None
    return described


def describe(name: str, model_type: str, given: bool = True) -> Architecture:
    """The architecture of the causal language models of ``model_type``, as `auto` finds it on a tiny one."""
    from transformers import CONFIG_MAPPING

    known = causal_classes()
    if model_type not in known:
        hint = "" if given else "; say which with --model-type"
        what = (
            "is no causal language model of transformers"
            if model_type in CONFIG_MAPPING
            else "is not known to transformers"
        )
        raise UserError(f"the model type {model_type!r} {what}{nearest(model_type, list(known))}{hint}")
    taken = [a.name for a in registry().architectures_for(model_type) if not a.fallback]
    if taken:
        raise UserError(f"the model type {model_type!r} is described already, by the architecture {taken[0]!r}")
    default = CONFIG_MAPPING[model_type]()
    config: Any = type(default)(**merged(tiny_sizes(default), {"architectures": [known[model_type]]}))
    try:
        found = discover(config)
    except UserError as error:
        raise UserError(f"the blocks of {model_type!r} are not clear: {one_line(error)}") from None
    if modality_of(found).name != "text":
        raise UserError(f"{model_type!r} is not fed text alone, for which alone a plugin can be written")
    # A single stack that is called neither is a decoder: the model writes text.
    stacks = {"decoder" if stack == "blocks" else stack: path for stack, path in found.stacks.items()}
    described = Architecture(name=name, model_types=(model_type,), stacks=stacks)
    described.evaluation = language_model_evaluation
    return described
