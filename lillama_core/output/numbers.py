"""Numbers and names as people read them, in the card, the report and the pages of benchmarks."""

from __future__ import annotations

from typing import Any

from lillama_core.errors import one_line


def code(text: Any) -> str:
    """``text`` as a Markdown code span, where no HTML, link or table cell can begin."""
    inside = one_line(text, None).replace("`", "'").replace("|", "\\|")
    return f"`{inside}`" if inside else ""


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def signed_percent(part: float) -> str:
    return f"{100 * part:+.1f} %".replace("-", "−")


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def count(value: float) -> str:
    """A count with a decimal unit: 134.5 M."""
    return _scaled(value, ("", " K", " M", " B", " T"))


def size(value: float) -> str:
    """Bytes with a decimal unit: 269.1 MB."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # What would be rounded to 1000.0 belongs to the next unit.
        if abs(value) < 999.95:
            return f"{value:.0f}{unit}" if unit == units[0] else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}{units[-1]}"


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 12 s, 45 s or 0.4 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
