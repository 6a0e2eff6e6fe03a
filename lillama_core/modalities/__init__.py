"""Inputs beyond the rows of a language model: text for encoders and encoder-decoders, images."""

from lillama_core.modalities.base import Described, EvaluationRows
from lillama_core.modalities.images import Images
from lillama_core.modalities.text import EncoderDecoderText, EncoderText

__all__ = ["Described", "EncoderDecoderText", "EncoderText", "EvaluationRows", "Images"]
