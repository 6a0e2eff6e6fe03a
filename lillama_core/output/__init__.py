"""What a run leaves: a directory that transformers loads, with its record, card and report."""
