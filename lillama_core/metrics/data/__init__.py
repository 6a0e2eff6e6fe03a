"""Text and speech that ship with the package.

``wikitext2-test-head.txt``: the start of the WikiText-2 test split (Merity et al. 2016), text from Wikipedia under
CC BY-SA 3.0; ``benchmarks/offline_tasks/make.py`` makes it. ``speech/read``: five sentences of a LibriVox reading of
*Sense and Sensibility*, public domain, from Debian's ``pocketsphinx-testdata``. ``speech/synthetic``: twenty sentences
spoken by flite and espeak-ng; ``benchmarks/speech/make.py`` makes them.
"""
