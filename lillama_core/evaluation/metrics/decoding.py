"""How fast a model writes text, and how much memory it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.data.workload import Meter, decoding, generate, reading
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.metrics.timing import Speed, TimedRound, TimedWork
from lillama_core.evaluation.turns import repeated
from lillama_core.quantization.packing import Packing

MEGABYTE = 1e6
SHORT_PROMPT = 64
LONG_PROMPT = 512
NEW_TOKENS = 64
LEAST, MOST, SECONDS = 4, 10, 30.0
"""Rounds of a kind of work, the first of which does not count: at least, at most, and for how long they begin."""


def _prompt(subject: Subject, length: int, new_tokens: int) -> Tensor:
    """The first ``length`` tokens of the text shipped, [1, length].

    Fewer when the model has not room for them and ``new_tokens`` more.
    """
    room = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None:
        length = max(1, min(length, room - new_tokens))
    # Twelve characters a token is more than any tokenizer takes on English text.
    text = OFFLINE_TEXT.read_text(encoding="utf-8")[: 12 * length]
    ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    return torch.tensor([ids], device=subject.device)


def _new_tokens(subject: Subject) -> int:
    """``NEW_TOKENS``, or half of the positions of a model that has not room for twice as many."""
    room = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    return NEW_TOKENS if room is None else max(2, min(NEW_TOKENS, room // 2))


def _inputs(prompt: Tensor) -> dict[str, Tensor]:
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def write_text(subject: Subject) -> None:
    """Decodes ``NEW_TOKENS`` tokens after a prompt of ``SHORT_PROMPT``: what a text model does in use."""
    count = _new_tokens(subject)
    generate(subject.model, _inputs(_prompt(subject, SHORT_PROMPT, count)), count, lambda number: None)


class DecodeSpeed(Speed):
    """Tokens per second in greedy decoding of one sequence, and in reading a prompt."""

    name = "speed"

    def works(self, subjects: Sequence[Subject], options: EvaluationOptions, report: Report) -> list[TimedWork]:
        """Decoding, and reading; as much of each as the model with the least room takes."""
        count = min(map(_new_tokens, subjects))
        short = min(_prompt(subject, SHORT_PROMPT, count).shape[1] for subject in subjects)
        long = min(_prompt(subject, LONG_PROMPT, 1).shape[1] for subject in subjects)
        report(f"speed: {count} new tokens and a prompt of {long} tokens, again and again")

        def decode(subject: Subject, meter: Meter) -> None:
            decoding(subject.model, _inputs(_prompt(subject, short, count)), count, meter)

        def read(subject: Subject, meter: Meter) -> None:
            reading(subject.model, _inputs(_prompt(subject, long, 1)), meter)

        return [
            TimedWork(
                "decoding",
                "tokens/s",
                "higher",
                f"New tokens a second, greedy, one sequence, after a prompt of {short}",
                repeated(TimedRound(decode, count - 1), LEAST, MOST, SECONDS),
            ),
            TimedWork(
                "prompt",
                "tokens/s",
                "higher",
                f"Prompt tokens a second until the first new token, prompt of {long}",
                repeated(TimedRound(read, long), LEAST, MOST, SECONDS),
            ),
        ]


class _PeakMemory:
    """Highest memory in use between entry and exit: allocated on the GPU, else resident in the process.

    ``bytes`` holds the result after exit.
    """

    INTERVAL = 0.01
    """Seconds between two looks at the resident memory, which has no peak that could be reset portably."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._done.wait(self.INTERVAL):
                return

    def __enter__(self) -> _PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._watcher.join()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_count(model: Any) -> int:
    """Parameters of ``model``, those in few bits included; one in two places (a tied embedding) counts once."""
    packings = [p for module in model.modules() if isinstance(p := getattr(module, "packing", None), Packing)]
    return sum(p.numel() for p in model.parameters()) + sum(p.rows * p.columns for p in packings)


def memory_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers of ``model``, tied ones once."""
    return _bytes(model.parameters()) + _bytes(model.buffers())


class Footprint:
    """Parameters, memory of the weights, and the peak of memory while the model works.

    ``work`` is what the model does meanwhile; the default decodes text, a plugin for another kind of model
    gives its own.
    """

    name = "footprint"

    def __init__(self, work: Callable[[Subject], None] = write_text) -> None:
        self._work = work

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """Three measurements."""
        report("footprint: memory while the model works")
        with _PeakMemory(subject.device) as peak:
            self._work(subject)
        where = (
            "GPU memory allocated"
            if subject.device.type == "cuda"
            else "Resident memory of the whole process, libraries included,"
        )
        return [
            Measurement(
                name="footprint/parameters",
                value=float(parameter_count(subject.model)),
                unit="",
                better="lower",
                meaning="Parameters of the model, shared ones counted once.",
            ),
            Measurement(
                name="footprint/weights",
                value=memory_bytes(subject.model) / MEGABYTE,
                unit="MB",
                better="lower",
                meaning="Memory of the parameters and buffers as loaded (1 MB = 10^6 bytes).",
            ),
            Measurement(
                name="footprint/peak",
                value=peak.bytes / MEGABYTE,
                unit="MB",
                better="lower",
                meaning=f"{where} at its highest while the model works (1 MB = 10^6 bytes).",
            ),
        ]
