"""A compression from beginning to end, stage by stage."""

from lillama_core.pipeline.context import Context
from lillama_core.pipeline.pipeline import CompressionPipeline, compress
from lillama_core.pipeline.request import Request
from lillama_core.pipeline.stage import Stage

__all__ = ["CompressionPipeline", "Context", "Request", "Stage", "compress"]
