"""Weights in 8 or 4 bits: how they are rounded and laid out in bytes, and the modules that compute with them."""

from __future__ import annotations
