"""Images from folders, drawn at random and made into what a model is fed by its own image processor."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lillama_core.errors import UserError, nearest, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(folder: str) -> list[Path]:
    """The image files below ``folder``, told by their endings, in order of their paths.

    Raises UserError when there is no such folder, or no image in it.
    """
    # os.path: pathlib raises for what no folder can be called.
    path = Path(os.path.expanduser(folder))
    if not os.path.exists(path):
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if os.path.isdir(path.parent) else []
        raise UserError(f"no folder of images {folder!r}{nearest(path.name, beside)}")
    if not path.is_dir():
        raise UserError(f"{folder!r} is a file; give the folder that holds the images")
    try:
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"folder {folder!r} cannot be read: {error.strerror or error}") from None
    if not found:
        raise UserError(f"folder {folder!r} holds no image ({', '.join(SUFFIXES)})")
    return found


def choose_images(folders: tuple[str, ...], count: int, seed: int, use_all: bool) -> list[Path]:
    """``count`` images of ``folders``, drawn at random without repetition in an order that ``seed`` fixes.

    Raises UserError when there are fewer, unless ``use_all``.
    """
    found = [path for folder in folders for path in find_images(folder)]
    # Twice the same image could be trained on and held out.
    if twice := next((path for path, n in Counter(path.resolve() for path in found).items() if n > 1), None):
        raise UserError(f"{' and '.join(folders)} both hold {twice.name}, the same file: name each folder once")
    if len(found) < count and not use_all:
        raise UserError(
            f"{' and '.join(folders)} hold {len(found)} images, {count} asked for: ask for fewer with --samples, or"
            " pass --use-all-tokens to take what there is"
        )
    return random.Random(seed).sample(found, min(count, len(found)))


def read_pixels(paths: list[Path], processor: Any) -> torch.Tensor:
    """The images at ``paths`` as ``processor`` makes them, float32 [images, channels, height, width].

    Every image becomes upright and RGB first. Raises UserError that names a file which is empty, damaged or no image.
    """
    return torch.cat([processor(images=[_open(path)], return_tensors="pt")["pixel_values"].float() for path in paths])


def files_sha256(paths: list[Path]) -> str:
    """A hash over the contents of ``paths``, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def need_pillow() -> Any:
    """The module PIL.Image; UserError that says how to install it."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need the library pillow: pip install 'lillama[images]'") from None
    return Image


def _open(path: Path) -> Any:
    reader = need_pillow()
    try:
        if path.stat().st_size == 0:
            raise UserError(f"image {str(path)!r} is empty")
        from PIL import ImageOps

        with reader.open(path) as image:
            # Upright, as transformers' own loader has it, however the camera was held.
            return ImageOps.exif_transpose(image).convert("RGB")
    except UserError:
        raise
    # Pillow's plugins raise whatever a damaged file leads them to.
    except Exception as error:
        raise UserError(f"{str(path)!r} is damaged or no image: {one_line(error)}") from None
