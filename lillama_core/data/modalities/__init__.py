"""Inputs beyond the rows of a language model: text for encoders and encoder-decoders, images."""

from lillama_core.data.comparable import ComparableModality, EvaluationRows
from lillama_core.data.images.modality import Images
from lillama_core.data.text.encoder import EncoderDecoderText, EncoderText

__all__ = ["ComparableModality", "EncoderDecoderText", "EncoderText", "EvaluationRows", "Images"]
