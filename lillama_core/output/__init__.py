"""What a run leaves: a directory that transformers loads, with its record, card and report."""

from __future__ import annotations

from lillama_core.output.directory import write_result

__all__ = ["write_result"]
