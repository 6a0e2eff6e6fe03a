"""Text that ships with the package; ``benchmarks/offline_tasks/make.py`` makes it.

The start of the WikiText-2 test split (Merity et al. 2016), text from Wikipedia under CC BY-SA 3.0.
"""
