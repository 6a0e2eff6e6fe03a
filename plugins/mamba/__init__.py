"""Selective state-space language models: Mamba."""
