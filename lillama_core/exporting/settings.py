"""The small files of a compressed directory that an export takes along: tokenizer, processor, templates."""

from __future__ import annotations

import shutil
from pathlib import Path

from lillama_core.errors import UserError
from lillama_core.system.regular import leads_out

SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""What tokenizers, processors and templates are stored as; there is no code and no pickle in them."""
TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates beyond the first."""
OWN = ("config.json", "generation_config.json", "lillama.json", "model.safetensors.index.json")
"""Files that an export writes itself, or that are true of the compressed directory alone."""


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what belongs to neither weights nor config from one directory to the other; files already there stay.

    Raises UserError for a link that leads out of ``source``.
    """
    for file in sorted([*source.glob("*"), *source.glob(f"{TEMPLATES}/*")]):
        place = target / file.relative_to(source)
        ours = file.parent == source and file.name in OWN
        if file.is_file() and file.suffix in SUFFIXES and not ours and not place.exists():
            if leads_out(file):
                raise UserError(f"{str(file)!r} is a link to a file outside of the model; put the file itself there")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
