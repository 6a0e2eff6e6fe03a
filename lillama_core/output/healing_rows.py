"""What the card says of each training of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = tuple[str, str, str, str, str, str]


def healing_rows(healing: Sequence[Mapping[str, Any]], fidelity: Mapping[str, Any] | None) -> list[Row]:
    """Teacher, objective, what was trained, tokens seen, losses and perplexities, of each training in its order.

    ``fidelity`` is that of the model after the last of them.
    """
    rows: list[Row] = []
    after = [*(told["fidelity_before"] for told in healing), fidelity][1:]
    for told, found in zip(healing, after, strict=True):
        curve, before = told["curve"], told["fidelity_before"] or {}
        kept = next(point for point in curve if point["step"] == told["kept_step"])
        perplexities = (before.get("perplexity_after"), (found or {}).get("perplexity_after"))
        rows.append(
            (
                str(told.get("teacher") or "none"),
                str(told["objective"]),
                str(told["train"]),
                f"{kept['tokens']:,}",
                f"{curve[0]['loss']:.4f} → {kept['loss']:.4f}",
                " → ".join(f"{value:.2f}" for value in perplexities if value is not None),
            )
        )
    return rows
