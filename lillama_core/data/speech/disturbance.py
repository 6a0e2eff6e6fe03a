"""Recordings as another microphone in another place would have them: filtered, with noise, louder or softer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lillama_core.data.speech.audio import RATE, Sound

TILT = 8.0
"""Largest gain or loss of the filter of a disturbed recording, in dB."""
SNR = (5.0, 30.0)
"""Least and largest ratio of voice to noise in a disturbed recording, in dB."""


def disturbed(sound: Sound, generator: np.random.Generator) -> Sound:
    """``sound`` [samples] as another microphone in another place would have it: filtered, with noise, louder or softer.

    What is distilled on clean recordings of a few voices forgets the rest of what the model has heard. The filter is
    a random curve of ``TILT`` dB over the logarithm of the frequency, the noise as coloured, at a random ``SNR``.
    """
    frequencies = np.fft.rfftfreq(len(sound), 1 / RATE)
    knots = np.log(np.array([50.0, 200.0, 600.0, 1500.0, 3500.0, 8000.0]))

    def curve() -> NDArray[np.float64]:
        decibels = np.interp(np.log(np.maximum(frequencies, 1.0)), knots, generator.uniform(-TILT, TILT, len(knots)))
        return np.asarray(10 ** (decibels / 20))

    voice = np.fft.irfft(np.fft.rfft(sound) * curve(), len(sound))
    noise = np.fft.irfft(np.fft.rfft(generator.standard_normal(len(sound))) * curve(), len(sound))
    ratio = 10 ** (-generator.uniform(*SNR) / 20)
    mixed = voice / voice.std() + ratio * noise / noise.std()
    loudness = sound.std() * 10 ** (generator.uniform(-6, 6) / 20)
    return np.asarray(np.clip(mixed * loudness, -1, 1), dtype=np.float32)
