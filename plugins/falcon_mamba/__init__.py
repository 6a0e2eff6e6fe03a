"""Selective state-space language models: Falcon-Mamba."""
