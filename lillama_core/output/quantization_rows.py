"""What a card says of weights that are held in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lillama_core.output.record import RunRecord


def before_rounding(record: RunRecord, then: str) -> str:
    """What has to stand, with ``then`` after it, beside a number of the compression; empty where no bits were taken."""
    return f"before rounding{then}" if record.quantization is not None else ""


def quantization_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a card says of the bits; empty where all is in the dtype."""
    if found is None:
        return []
    held = ", ".join(f"{count} in {bits} bits" for bits, count in found["matrices"].items())
    data = found.get("calibration")
    with_feedback = f"{found['with_feedback']} matrices, on {data['tokens']:,} tokens or frames" if data else "none"
    return [
        ("matrices", held),
        ("rounded for what they read", with_feedback),
        ("scales", f"bfloat16; one a row at 8 bits, one for {found['group']} columns at 4"),
        ("parameters before", f"{found['bytes_before']:,} bytes"),
        ("files of weights", f"{found['bytes_after']:,} bytes"),
    ]
