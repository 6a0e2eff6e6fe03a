"""Speech recognition: Whisper (Radford et al. 2022), in transformers' format and in CTranslate2's."""

from .architecture import lillama_architectures
from .ctranslate2 import lillama_checkpoints

__all__ = ["lillama_architectures", "lillama_checkpoints"]
