"""Read sound files as mono float32 samples at 16 kHz, and refuse what is damaged, too long or silent."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lillama_core.errors import UserError, one_line
from lillama_core.system.regular import check_regular

RATE = 16_000
"""Samples a second of everything that `read_audio` returns."""
LONGEST = 30.0
"""Seconds; the window of the speech models that there are."""
SHORTEST = 0.1
"""Seconds; less is no speech but an accident."""
SUFFIXES = (".wav", ".flac", ".ogg", ".opus")

Sound = NDArray[np.float32]


def require_extra(module: str) -> ModuleType:
    """An optional library for speech; UserError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"speech needs the library {module}: pip install 'lillama[speech]'") from error


def read_audio(path: Path) -> Sound:
    """The sound in ``path`` (WAV, FLAC, OGG; any rate, any number of channels), float32 [samples], mono, 16 kHz.

    Channels are averaged. Raises UserError when the file is missing, empty, damaged, no sound, silent (all zeros) or
    longer than ``LONGEST``.
    """
    check_regular(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; give a WAV, FLAC or OGG file")
        with path.open("rb") as stream:
            return decode_audio(stream, str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error


def decode_audio(stream: Any, name: str) -> Sound:
    """The sound in a binary stream of a sound file; ``name`` is for messages. As `read_audio`."""
    soundfile, soxr = require_extra("soundfile"), require_extra("soxr")
    try:
        with soundfile.SoundFile(stream) as opened:
            rate, frames = opened.samplerate, opened.frames
            # The header is believed only as far as this: nothing is read of a file that claims too much.
            if frames > LONGEST * rate:
                raise UserError(
                    f"{name} is {frames / rate:.1f} s long; at most {LONGEST:g} s are supported: cut it into utterances"
                )
            samples = opened.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        # libsndfile's own words come after a colon; before it stands how it was called.
        why = one_line(error).rpartition(": ")[2].rstrip(".")
        raise UserError(f"{name} is damaged or not a sound file ({why}); give WAV, FLAC or OGG") from error
    if len(samples) < frames:
        raise UserError(f"{name} is truncated: {len(samples)} of {frames} samples are there; copy or download it again")
    if len(samples) < SHORTEST * rate:
        raise UserError(f"{name} holds only {len(samples) / rate:.2f} s of sound; give at least {SHORTEST:g} s")
    sound: Sound = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(sound).all():
        raise UserError(f"{name} holds samples that are not finite numbers; convert it again")
    if not np.ptp(sound):
        raise UserError(f"{name} is silent, every sample is the same; leave it out or record it again")
    if rate != RATE:
        sound = soxr.resample(sound, rate, RATE)
    return np.ascontiguousarray(sound, dtype=np.float32)
