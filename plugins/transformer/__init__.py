"""Decoder-only transformers: Llama and its many relatives, OPT, GPT-2, GPT-NeoX."""

from lillama_registry import hookimpl

from .architecture import lillama_architectures

__all__ = ["lillama_architectures", "lillama_exporters"]


@hookimpl
def lillama_exporters() -> dict[str, str]:
    return {"gguf": "lillama_plugins.transformer.gguf:GgufExporter"}
