"""Calibration rows: three parts that share no row, and batches of as many rows as were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lillama_core import Samples, UserError
from lillama_core.data.split import CalibrationSplit
from lillama_core.runtime.activations import ActivationStore


def samples(rows: int) -> Samples:
    """Rows that hold nothing but their number."""
    return Samples({"input_ids": torch.arange(rows)[:, None].expand(rows, 3)}, tokens=3 * rows)


def numbers(split: CalibrationSplit, part: tuple[int, ...]) -> list[int]:
    return [n for i in part for n in split.batches[i].inputs["input_ids"][:, 0].tolist()]


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0.0, 0.5), st.booleans())
def test_parts_are_disjoint_and_hold_every_row_of_whole_batches(
    rows: int, batch_size: int, held_out: float, chooses: bool
) -> None:
    try:
        split = CalibrationSplit.of(samples(rows), batch_size, held_out, chooses)
    except UserError:
        # Nothing could be fitted to, or a part would be empty.
        whole = rows // batch_size
        assert whole < 2 or (chooses and whole < 3 and batch_size < 2)
        return
    fit, choose, report = (numbers(split, part) for part in (split.fit, split.choose, split.report))
    assert fit + choose + report == list(range(rows // batch_size * batch_size))
    assert fit
    assert report
    assert bool(choose) is chooses
    assert split.fitted_rows == len(fit)
    described = split.describe()
    assert {name: d["rows"] for name, d in described.items()} == {
        "fit": len(fit),
        "choose": len(choose),
        "report": len(report),
    }
    assert len({d["sha256"] for d in described.values()}) == 3


def test_hashes_follow_the_rows() -> None:
    one, other = (CalibrationSplit.of(samples(n), 4, 0.1, True).describe() for n in (32, 36))
    assert one["fit"] != other["fit"]
    assert one == CalibrationSplit.of(samples(32), 4, 0.1, True).describe()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_as_many_first_rows_as_were_asked_for(batch_size: int) -> None:
    recorder: Any = None
    batches = [samples(24).part(i, i + batch_size) for i in range(0, 24, batch_size)]
    store = ActivationStore(recorder, batches)
    store.keep_output("encoder", [batch.inputs["input_ids"].float()[..., None] for batch in batches])
    found, taken = store.first_rows(7, 2, torch.device("cpu"))
    assert torch.cat([part.inputs["input_ids"] for part in found.batches])[:, 0].tolist() == list(range(7))
    assert max(len(part) for part in found.batches) <= 2
    # Each part says where it comes from.
    rows = [batches[i].inputs["input_ids"][part] for i, part in taken]
    assert torch.equal(torch.cat(rows), torch.cat([part.inputs["input_ids"] for part in found.batches]))
    # What a stack gave for them goes along.
    assert torch.cat(found._outputs["encoder"])[:, 0, 0].tolist() == list(range(7))


@pytest.mark.parametrize(("tokens", "given", "rows"), [(96, 720, 32), (7, 720, 2), (1, 720, 1), (99_999, 720, 240)])
def test_rows_for_tokens(tokens: int, given: int, rows: int) -> None:
    split = CalibrationSplit.of(samples(240), 4, 0.1, False)
    assert split.rows_for(tokens, given) == rows


@pytest.mark.parametrize(("fraction", "batches"), [(0.0, 0), (0.5, 4), (0.51, 5), (3.0, 8)])
def test_batches_for_a_fraction(fraction: float, batches: int) -> None:
    split = CalibrationSplit.of(samples(10), 1, 0.2, False)
    assert len(split.fit) == 8
    assert split.batches_for(fraction) == batches
