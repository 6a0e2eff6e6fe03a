"""Multiple-choice sets in lm-eval's own format; ``benchmarks/offline_tasks/make.py`` makes the items.

From lm-eval's command line: ``--include_path`` this folder, ``--tasks lillama_offline``. The items of
``continuation`` are from WikiText-2 (Merity et al. 2016), text from Wikipedia under CC BY-SA 3.0; those of
``cloze`` are from the tales of the brothers Grimm in English, in the public domain.
"""
