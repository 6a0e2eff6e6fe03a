"""How fast a model is beside another one: work done in turns, timed, counted and told in words."""

from __future__ import annotations
