"""Text and speech that ship with the package, for evaluations without a network.

``wikitext2-test-head.txt``: the start of the WikiText-2 test split (Merity et al. 2016), text from Wikipedia under
CC BY-SA 3.0; ``benchmarks/offline_tasks/make.py`` makes it. ``speech/read``: five sentences of a LibriVox reading of
*Sense and Sensibility*, public domain, from Debian's ``pocketsphinx-testdata``. ``speech/synthetic``: twenty sentences
spoken by flite and espeak-ng; ``benchmarks/speech/make.py`` makes them.
"""

from pathlib import Path

OFFLINE_TEXT = Path(__file__).parent / "wikitext2-test-head.txt"
"""The first articles of the WikiText-2 test split in tokenised form: 50 windows of 512 SmolLM2 tokens."""
SPEECH_SETS = {name: Path(__file__).parent / "speech" / name for name in ("read", "synthetic")}
"""Five sentences read by a person, twenty spoken by machines."""
