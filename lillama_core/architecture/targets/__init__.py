"""Kinds of target: the modules of a block whose linear maps are replaced, and how each is observed and swapped."""
