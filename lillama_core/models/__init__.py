"""Finding, checking and opening checkpoints; nothing here knows an architecture."""
