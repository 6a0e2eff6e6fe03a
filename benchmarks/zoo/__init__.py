"""The models that the suite compresses, by name."""
