"""What lillama uses of transformers beyond its documented interface is there, and is used through the adapter alone."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from lillama_core.errors import LillamaError
from lillama_core.models import transformers_adapter
from lillama_core.models.transformers_adapter import ATTRIBUTES, NAMES, lookup

ADAPTER = Path(transformers_adapter.__file__)
UNDOCUMENTED = re.compile(
    r"transformers\.(core_model_loading|conversion_mapping|quantizers\.auto|models\.auto|integrations)"
    r"|\._weight_conversions|\._from_config|_can_compile_fullgraph|_apply_gate|all_tied_weights_keys"
)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_has(name: str) -> None:
    assert lookup(name) is not None


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_transformers_reads(name: str) -> None:
    module, _ = ATTRIBUTES[name]
    assert re.search(rf"\b{name}\b", inspect.getsource(importlib.import_module(module)))


def test_a_name_that_has_moved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.core_model_loading.WeightRenaming")
    with pytest.raises(LillamaError, match=r"transformers \S+ has no .*:WeightRenaming, which names the matrices"):
        transformers_adapter.weight_renaming("a", "b")


def test_nothing_else_of_the_core_uses_them() -> None:
    core = ADAPTER.parents[1]
    # The hook waits for the module by its name, before anything may be imported.
    # The code beside a standalone export, modules of experts among it, cannot ask the adapter.
    # Its attributes are listed there.
    beside = {core / "exporting" / "low_rank_code.py", core / "architecture" / "targets" / "expert_modules.py"}
    allowed = {ADAPTER, core / "transformers_hook.py", *beside}
    found = [f for f in core.rglob("*.py") if f not in allowed and UNDOCUMENTED.search(f.read_text(encoding="utf-8"))]
    assert UNDOCUMENTED.search(ADAPTER.read_text(encoding="utf-8"))
    assert not found, [str(file.relative_to(core)) for file in found]
