"""Helpers that every part of the core uses: devices, names, quiet libraries, messages of one line."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.errors import one_line
from lillama_core.system.devices import exact_device
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
