"""``ctranslate2``: a Whisper for CTranslate2 and faster-whisper, which read dense matrices.

CTranslate2's own converter makes it of the dense model; what it made is compared with the compressed model in a process
that has CTranslate2 and no lillama: what the encoder says, and the decoder's scores step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from lillama_core.errors import LillamaError, one_line
from lillama_core.exporting import (
    Agreement,
    CompressedModel,
    Exporter,
    ExportJob,
    allowed,
    relative,
    run_without_lillama,
    write_probe,
)

CHECK = Path(__file__).with_name("ctranslate2_check.py")
BESIDE = ("tokenizer.json", "preprocessor_config.json")
"""Files that faster-whisper wants beside the model."""
FORBIDDEN = -1e30
"""Scores below are CTranslate2's for a token that may not come."""
TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class CTranslate2Exporter(Exporter):
    """A dense Whisper for CTranslate2 and faster-whisper."""

    name = "ctranslate2"
    needs: ClassVar[Mapping[str, str]] = {"ctranslate2": "pip install 'lillama[ctranslate2]'"}

    def cannot_hold(self, model: CompressedModel) -> str | None:
        if model.config.model_type != "whisper":
            return f"its model type is {model.config.model_type!r}, and 'whisper' is the only one that is written"
        if lacking := [name for name in BESIDE if not (model.folder / name).is_file()]:
            return f"its directory has no {lacking[0]}"
        return None

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        from ctranslate2.converters import TransformersConverter

        dense, parts = job.scratch / "dense", job.scratch / "parts"
        dense.mkdir()
        parts.mkdir()
        model.write_dense(dense, parts, job.dtype, job.progress)
        model.copy_small_files(dense)
        job.progress.line("Converting to CTranslate2")
        try:
            converter = TransformersConverter(str(dense), copy_files=list(BESIDE), load_as_float16=False)
            # It makes the directory itself.
            converter.convert(str(job.folder), quantization=TYPES[job.dtype or model.dtype], force=True)
        except Exception as error:  # whatever the library meets
            raise LillamaError(f"CTranslate2's converter failed: {one_line(error)}") from error

    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        inputs = model.inputs()
        prompts = inputs["decoder_input_ids"].clone()
        # A prompt begins with the token that starts a transcript, which comes once.
        start = model.config.decoder_start_token_id
        prompts[prompts == start] = model.config.eos_token_id
        prompts[:, 0] = start
        # Without time stamps: their rules forbid most tokens.
        silent = getattr(model.outline.generation_config, "no_timestamps_token_id", None)
        if silent is not None:
            prompts[:, -1] = silent
        probe = write_probe(job.scratch / "probe.safetensors", {**inputs, "decoder_input_ids": prompts}, {})
        answer = job.scratch / "answer.safetensors"
        run_without_lillama(CHECK, job.scratch, job.folder, probe, answer)
        found = load_file(answer)
        agree = allowed(model, job.dtype or model.dtype)
        features = inputs["input_features"]
        said = [Agreement("encoder states", relative(found["states"], encoder_states(model, features)), agree)]
        logits = model.output({"input_features": features, "decoder_input_ids": found["tokens"]})
        # CTranslate2 forbids some tokens, such as time stamps: what it says of them is no logit.
        free = found["logits"] > FORBIDDEN
        return [*said, Agreement("logits", relative(found["logits"][free], logits[free]), agree)]

    def usage(self, model: CompressedModel) -> str:
        return (
            "For CTranslate2 and faster-whisper. Dense: the low-rank factors are multiplied out, since CTranslate2"
            " reads dense matrices; the file has the size of the original model's.\n\n"
            "```python\nfrom faster_whisper import WhisperModel\n\n"
            'segments, _ = WhisperModel(".", compute_type="int8").transcribe("speech.wav")\n```\n'
        )


def encoder_states(model: CompressedModel, features: torch.Tensor) -> torch.Tensor:
    """What the compressed encoder makes of spectrograms, in fp32."""
    with model.running() as whole:
        encoder: Any = whole.get_encoder()
        found: torch.Tensor = encoder(features)[0].float()
    return found
