"""Helpers that every part of the core uses: devices, names, quiet libraries, messages of one line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.errors import one_line
from lillama_core.system.cache import default_cache_dir
from lillama_core.system.devices import exact_device
from lillama_core.system.files import apply_umask
from lillama_core.system.quiet import quiet


def test_fp64_is_computed_on_cuda_or_on_the_cpu() -> None:
    assert exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert exact_device(torch.device("mps")) == torch.device("cpu")
    assert exact_device(torch.zeros(1, device="meta")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("mlp.experts.down.13", "mlp.experts.down.*"),
        ("layers.0.q", "layers.*.q"),
        ("conv1.w2", "conv1.w2"),
        ("0.q", "0.q"),
    ],
)
def test_the_kind_of_a_map_has_no_numbers(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("a\n  b\x1b[31m\tc ")) == "a b [31m c"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 400) == "x" * 299 + "…"
    assert one_line("x" * 400, None) == "x" * 400
    assert one_line("") == ""


def test_libraries_are_quiet_inside_and_as_they_were_afterwards() -> None:
    loggers = [logging.getLogger(name) for name in ("transformers", "lillama-test-a")]
    before = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        with contextlib.suppress(ValueError), quiet("transformers", "lillama-test-a"):
            assert {logger.level for logger in loggers} == {logging.ERROR}
            assert not transformers_logging.is_progress_bar_enabled()
            raise ValueError
        assert [logger.level for logger in loggers] == before
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not bars:
            transformers_logging.disable_progress_bar()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path, mask: int, mode: int) -> None:
    (tmp_path / "tasks").mkdir()
    files = [tmp_path / "private.safetensors", tmp_path / "tasks" / "open.json"]
    for file, before in zip(files, (0o600, 0o666), strict=True):
        file.touch()
        file.chmod(before)
    former = os.umask(mask)
    try:
        apply_umask(tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(former)
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LILLAMA_CACHE", "~/own")
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LILLAMA_CACHE")
    assert default_cache_dir().name == "lillama"
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert default_cache_dir() == tmp_path / "xdg" / "lillama"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_cache_dir() == tmp_path / ".cache" / "lillama"
