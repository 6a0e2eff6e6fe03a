"""Mamba (Gu & Dao, arXiv 2312.00752), in transformers' format and in mamba-ssm's own."""

from lillama_registry import hookimpl

from .architecture import lillama_architectures

__all__ = ["lillama_architectures", "lillama_checkpoints"]


@hookimpl
def lillama_checkpoints() -> dict[str, str]:
    return {"mamba-ssm": "lillama_plugins.mamba.native:MambaSsmCheckpoint"}
