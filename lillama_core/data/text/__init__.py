"""Calibration data: the tokens on which a model is observed and distilled.

Texts come from files, from datasets of the Hugging Face Hub, or from the model itself, and are mixed by
weight into rows of equal length. `sources` says how they are named, `data` puts them together.
"""

from lillama_core.data.sources import DATASET_ALIASES, SELF, Source
from lillama_core.data.text.calibration import CalibrationData, check_rows, load_calibration, load_text_windows
from lillama_core.data.text.checks import check_sources
from lillama_core.data.text.options import CalibrationOptions

__all__ = [
    "DATASET_ALIASES",
    "SELF",
    "CalibrationData",
    "CalibrationOptions",
    "Source",
    "check_rows",
    "check_sources",
    "load_calibration",
    "load_text_windows",
]
