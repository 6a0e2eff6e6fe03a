"""The stages of a compression, one file each."""
