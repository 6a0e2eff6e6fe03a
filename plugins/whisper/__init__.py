"""Speech recognition: Whisper (Radford et al. 2022), in transformers' format and in CTranslate2's."""

from lillama_registry import hookimpl

from .architecture import lillama_architectures
from .evaluation import lillama_metrics

__all__ = [
    "lillama_architectures",
    "lillama_checkpoints",
    "lillama_exporters",
    "lillama_metrics",
    "lillama_modalities",
]


@hookimpl
def lillama_modalities() -> dict[str, str]:
    return {"speech": "lillama_plugins.whisper.speech:Speech"}


@hookimpl
def lillama_checkpoints() -> dict[str, str]:
    return {"ctranslate2": "lillama_plugins.whisper.ctranslate2:CTranslate2Checkpoint"}


@hookimpl
def lillama_exporters() -> dict[str, str]:
    return {"ctranslate2": "lillama_plugins.whisper.exporting:CTranslate2Exporter"}
