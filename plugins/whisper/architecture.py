"""Where Whisper keeps its blocks: an encoder and a decoder, whose student hears what the compressed encoder says."""

from lillama_core.architecture import Architecture
from lillama_registry import hookimpl

from .evaluation import evaluation


class Whisper(Architecture):
    """Two stacks under a tied head; self-attention, cross-attention and MLP of each block are compressed."""

    name = "whisper"
    auto_class = "AutoModelForSpeechSeq2Seq"
    modality = "speech"
    evaluation = evaluation


@hookimpl
def lillama_architectures() -> list[Architecture]:
    stacks = {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"}
    return [Whisper(model_types=("whisper",), stacks=stacks)]
