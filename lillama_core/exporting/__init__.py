"""Exports: a compressed directory written as something that runs without lillama, and checked where lillama is not.

A format is an `Exporter`; plugins add theirs by the hook ``lillama_exporters``.
"""

from __future__ import annotations

from lillama_core.exporting.base import Agreement, Exporter, ExportJob
from lillama_core.exporting.fresh import PLAIN_CHECK, allowed, relative, run_without_lillama, write_probe
from lillama_core.exporting.model import CompressedModel

__all__ = [
    "PLAIN_CHECK",
    "Agreement",
    "CompressedModel",
    "ExportJob",
    "Exporter",
    "allowed",
    "relative",
    "run_without_lillama",
    "write_probe",
]
