"""Text for language models: read from files, datasets and objects, written by the model, and put into rows of tokens.

`calibration` mixes the sources by weight into rows of equal length, `windows` cuts text into them.
"""
