"""How well and how fast a model turns speech into text."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lillama_core.data.shipped import SPEECH_SETS
from lillama_core.data.speech.audio import RATE, Sound, require_extra
from lillama_core.data.speech.utterances import DATASETS, Utterance, read_speech
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.system.quiet import quiet

BATCH = 16
"""Utterances transcribed together."""
AT_HAND = 128
"""Utterances whose sound is in memory together, to be sorted by length: an hour of them is 230 MB."""
TOKENS_PER_SECOND = 10
"""More than anybody says; a model that repeats itself without end is cut off there."""
RESAMPLES = 2000
"""Draws of the bootstrap."""
TIMED = 5
"""Utterances whose transcription is timed."""
NOTES = "speech"
"""Where `WordErrorRate` leaves its transcripts in ``Subject.notes``: lists of `Scored` by set."""

Normalizer = Callable[[str], str]
Generation = Callable[[Subject, str | None], dict[str, Any]]
"""What ``generate`` is told besides the sound, for a model and the language spoken, where the data says which."""


@dataclass(frozen=True)
class Scored:
    """One utterance as transcribed, both texts normalised."""

    name: str
    reference: str
    hypothesis: str
    word_errors: int
    """Substitutions, deletions and insertions (Levenshtein)."""
    words: int
    """In the reference."""
    character_errors: int
    characters: int


@torch.inference_mode()
def transcribe(subject: Subject, sounds: Sequence[Sound], **generation: Any) -> list[str]:
    """What is said in ``sounds`` (float32 [samples] at 16 kHz), decoded greedily, in their order.

    ``subject.tokenizer`` is a processor with a feature extractor and a tokenizer. ``generation`` goes to ``generate``.
    Long and short sounds go into different batches, so that a short one need not wait for a long one's last word.
    """
    processor = subject.tokenizer
    dtype = next(p.dtype for p in subject.model.parameters() if p.is_floating_point())
    order = sorted(range(len(sounds)), key=lambda index: -len(sounds[index]))
    texts = [""] * len(sounds)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        found = processor.feature_extractor(
            [sounds[index] for index in chosen], sampling_rate=RATE, return_tensors="pt"
        )
        most = [_most_tokens(subject.model, len(sounds[index])) for index in chosen]
        with quiet():
            tokens = subject.model.generate(
                encoder_outputs=_encoded(subject.model, found["input_features"].to(subject.device, dtype)),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(most),
                **generation,
            )
        # Each is cut at its own limit, not at that of the longest it happens to share a batch with.
        written = [row[:limit] for row, limit in zip(tokens.tolist(), most, strict=True)]
        for index, text in zip(chosen, processor.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
    return texts


def _encoded(model: Any, features: Tensor) -> Any:
    """What the encoder makes of ``features`` [utterances, bands, frames].

    On a CPU one utterance at a time: its caches hold the activations of one, which saved a sixth of the time of all.
    """
    from transformers.modeling_outputs import BaseModelOutput

    encoder = model.get_encoder()
    parts = features.split(1) if features.device.type == "cpu" else (features,)
    return BaseModelOutput(last_hidden_state=torch.cat([encoder(part).last_hidden_state for part in parts]))


def _most_tokens(model: Any, samples: int) -> int:
    """New tokens allowed for a sound of so many samples; never more than there are positions for."""
    room = getattr(model.config, "max_target_positions", None)
    most = 16 + math.ceil(TOKENS_PER_SECOND * samples / RATE)
    # A prompt of up to four tokens stands before them.
    return most if room is None else max(1, min(most, room - 4))


def score(name: str, reference: str, hypothesis: str) -> Scored:
    """The errors in ``hypothesis``; both texts are normalised already, ``reference`` is not empty."""
    jiwer = require_extra("jiwer")
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return Scored(
        name,
        reference,
        hypothesis,
        words.substitutions + words.deletions + words.insertions,
        words.substitutions + words.deletions + words.hits,
        characters.substitutions + characters.deletions + characters.insertions,
        characters.substitutions + characters.deletions + characters.hits,
    )


def word_error_rate(scored: Sequence[Scored]) -> float:
    """Errors per word of the references, of all utterances together, in %."""
    return 100 * sum(s.word_errors for s in scored) / sum(s.words for s in scored)


def character_error_rate(scored: Sequence[Scored]) -> float:
    """Errors per character of the references, of all utterances together, in %."""
    return 100 * sum(s.character_errors for s in scored) / sum(s.characters for s in scored)


def _draws(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` utterances is in each resample [RESAMPLES, count]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _standard_error(errors: Sequence[int], lengths: Sequence[int], seed: int) -> float | None:
    """Of the rate sum(errors) / sum(lengths), in %, by resampling utterances; None for a single one."""
    if len(errors) < 2:
        return None
    draws = _draws(len(errors), seed)
    return float(np.std(100 * (draws @ np.array(errors)) / (draws @ np.array(lengths)), ddof=1))


@dataclass(frozen=True)
class Difference:
    """One model's word error rate minus another's on the same utterances, in points of %."""

    value: float
    standard_error: float | None
    low: float
    high: float
    """The middle 95 % of the resamples."""


def paired_difference(baseline: Sequence[Scored], other: Sequence[Scored], seed: int = 0) -> Difference:
    """Word error rate of ``other`` minus that of ``baseline``, with a paired bootstrap over utterances.

    Both must hold the same utterances in the same order (ValueError); resampling draws them together, so what makes an
    utterance hard for both does not widen the interval (Bisani & Ney 2004).
    """
    if [(s.name, s.reference) for s in baseline] != [(s.name, s.reference) for s in other] or not baseline:
        raise ValueError("a paired comparison needs the same utterances on both sides")
    change = np.array([b.word_errors - a.word_errors for a, b in zip(baseline, other, strict=True)])
    words = np.array([s.words for s in baseline])
    draws = _draws(len(words), seed)
    resampled = 100 * (draws @ change) / (draws @ words)
    low, high = np.quantile(resampled, (0.025, 0.975))
    error = float(np.std(resampled, ddof=1)) if len(words) > 1 else None
    return Difference(float(100 * change.sum() / words.sum()), error, float(low), float(high))


def set_name(data: str) -> str:
    """A short name for what ``--data`` names: the folder, the manifest's name, the dataset."""
    path = Path(data)
    if path.name == "manifest.jsonl":
        return path.absolute().parent.name
    return path.stem if path.is_file() else path.absolute().name if path.is_dir() else data


def evaluation_sets(options: EvaluationOptions) -> dict[str, list[Utterance]]:
    """The utterances of every set that ``options`` ask for, the first ``options.limit`` of each.

    Raises UserError when one cannot be read or an utterance has no transcript.
    """
    named: Mapping[str, str | Path] = {set_name(options.data): options.data} if options.data else SPEECH_SETS
    sets = {name: read_speech(source, options.limit) for name, source in named.items()}
    for name, utterances in sets.items():
        silent = [u for u in utterances if u.text is None]
        if silent:
            raise UserError(
                f"{options.data or name}: {len(silent)} of {len(utterances)} utterances have no transcript, the first "
                f"is {silent[0].where}; word error rates need one for each: add 'text' to the manifest or NAME.txt"
            )
        if not utterances:
            raise UserError(f"{options.data or name} holds no utterances")
    return sets


def no_options(subject: Subject, language: str | None) -> dict[str, Any]:
    """Nothing beyond what the model's own generation settings say."""
    return {}


class WordErrorRate:
    """Word and character error rates, of each set apart, with jiwer.

    ``normalizer`` gives for a subject and a language (None: the data does not say) the function through which both
    texts go before they are compared; ``generation`` what its ``generate`` needs besides the sound. Utterances whose
    normalised reference is empty are left out.
    """

    name = "wer"

    def __init__(
        self,
        normalizer: Callable[[Subject, str | None], Normalizer],
        generation: Generation = no_options,
    ) -> None:
        self._normalizer = normalizer
        self._generation = generation

    def check(self, options: EvaluationOptions) -> None:
        """Raise UserError for sets on disk that cannot be measured, and for missing libraries."""
        for module in ("jiwer", "soundfile", "soxr"):
            require_extra(module)
        if options.data is None or options.data.split(":")[0] not in DATASETS:
            # A damaged file is better named now than after all the others were transcribed.
            for utterances in evaluation_sets(options).values():
                for utterance in utterances:
                    utterance.sound()

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """Two measurements for each set, and with a baseline that was measured on it the difference to that.

        ``subject.notes[NOTES]`` holds the transcripts afterwards, and ``options.details`` the tables, if asked for.
        """
        noted: dict[str, list[Scored]] = {}
        measurements = []
        for name, utterances in evaluation_sets(options).items():
            scored = self._scored(subject, name, utterances, report)
            if not scored:
                raise UserError(f"{options.data or name}: no transcript holds any words")
            noted[name] = scored
            if options.details is not None:
                write_transcripts(scored, options.details, name)
            measurements += self._measurements(name, scored, subject.baseline, options.seed, report)
        subject.notes[NOTES] = noted
        return measurements

    def _scored(self, subject: Subject, name: str, utterances: list[Utterance], report: Report) -> list[Scored]:
        """Every utterance of a set that can be scored."""
        fitting = [u for u in utterances if not u.too_long]
        if len(fitting) < len(utterances):
            report(f"wer/{name}: {len(utterances) - len(fitting)} of {len(utterances)} are too long; left out")
        # One language at a time, as one call of ``generate`` is told it.
        fitting.sort(key=lambda u: u.language or "")
        normalizers = {spoken: self._normalizer(subject, spoken) for spoken in {u.language for u in fitting}}
        said = [(u, text) for u in fitting if (text := normalizers[u.language](u.text or ""))]
        if len(said) < len(fitting):
            report(f"wer/{name}: {len(fitting) - len(said)} transcripts hold no words; left out")
        report(f"wer/{name}: {len(said)} utterances")
        scored: list[Scored] = []
        while len(scored) < len(said):
            spoken = said[len(scored)][0].language
            part = [one for one in said[len(scored) :][:AT_HAND] if one[0].language == spoken]
            texts = transcribe(subject, [u.sound() for u, _ in part], **self._generation(subject, spoken))
            for (utterance, reference), text in zip(part, texts, strict=True):
                scored.append(score(utterance.name, reference, normalizers[spoken](text)))
            if len(scored) < len(said):
                report(f"wer/{name}: {len(scored)} of {len(said)} transcribed")
        return scored

    def load_saved(self, folder: Path) -> dict[str, Any]:
        """The transcripts that `measure` wrote into ``folder``; none is no error."""
        found = {file.stem: read_transcripts(file) for file in sorted(folder.glob("*.jsonl"))}
        return {NOTES: found} if found else {}

    @staticmethod
    def _measurements(
        name: str, scored: list[Scored], baseline: Subject | None, seed: int, report: Report
    ) -> list[Measurement]:
        words = sum(s.words for s in scored)
        found = [
            Measurement(
                name=f"wer/{name}",
                value=word_error_rate(scored),
                unit="%",
                better="lower",
                meaning=f"Words wrong, missing or too many per word said; {len(scored)} utterances, {words} words.",
                standard_error=_standard_error([s.word_errors for s in scored], [s.words for s in scored], seed),
            ),
            Measurement(
                name=f"cer/{name}",
                value=character_error_rate(scored),
                unit="%",
                better="lower",
                meaning="The same for characters.",
                standard_error=_standard_error(
                    [s.character_errors for s in scored], [s.characters for s in scored], seed
                ),
            ),
        ]
        if baseline is None:
            return found
        before = baseline.notes.get(NOTES, {}).get(name, [])
        if [(s.name, s.reference) for s in before] != [(s.name, s.reference) for s in scored]:
            report(f"wer_change/{name}: the first model was not measured on these utterances; not compared")
        else:
            difference = paired_difference(before, scored, seed)
            found.append(
                Measurement(
                    name=f"wer_change/{name}",
                    value=difference.value,
                    unit="%",
                    better="lower",
                    meaning="Word error rate minus the first model's, in points; in brackets the middle 95 % of a"
                    " paired bootstrap over utterances.",
                    standard_error=difference.standard_error,
                    interval=(difference.low, difference.high),
                )
            )
        return found


def write_transcripts(scored: Sequence[Scored], folder: Path, name: str) -> None:
    """``NAME.jsonl``, one `Scored` a line, and ``NAME.txt``, every utterance with its alignment, worst first."""
    jiwer = require_extra("jiwer")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scored]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    parts = [f"{name}: {word_error_rate(scored):.2f} % word errors, {len(scored)} utterances\n"]
    for one in sorted(scored, key=lambda s: -s.word_errors / s.words):
        aligned = jiwer.visualize_alignment(
            jiwer.process_words(one.reference, one.hypothesis), show_measures=False, skip_correct=False
        )
        # Its heading counts the sentences of one comparison; here that is always the first.
        body = "\n".join(line.rstrip() for line in aligned.splitlines() if not line.startswith("===")).strip("\n")
        parts.append(f"\n{one.name}: {one.word_errors} of {one.words} words\n{body}\n")
    (folder / f"{name}.txt").write_text("".join(parts), encoding="utf-8")


def read_transcripts(path: Path) -> list[Scored]:
    """What `write_transcripts` wrote into a ``.jsonl``; raises ValueError when it holds anything else."""
    try:
        return [Scored(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} does not hold transcripts: {error}") from None


class RealTimeFactor:
    """Seconds that a second of speech takes to transcribe, one utterance at a time, features included."""

    name = "real_time_factor"

    def __init__(self, generation: Generation = no_options) -> None:
        self._generation = generation

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """One measurement: the median over the first ``TIMED`` utterances, after one run that does not count."""
        utterances = timed_utterances(options)
        sounds = [utterance.sound() for utterance in utterances]
        report(f"speed: {len(sounds)} utterances, one at a time")
        chosen = [self._generation(subject, utterance.language) for utterance in utterances]
        transcribe(subject, sounds[:1], **chosen[0])
        factors = []
        for sound, generation in zip(sounds, chosen, strict=True):
            started = time.perf_counter()
            transcribe(subject, [sound], **generation)
            factors.append((time.perf_counter() - started) * RATE / len(sound))
        return [
            Measurement(
                name="speed/real_time_factor",
                value=statistics.median(factors),
                unit="",
                better="lower",
                meaning="Seconds to transcribe one second of speech, one utterance at a time; "
                f"median of {len(sounds)} utterances.",
            )
        ]


def timed_utterances(options: EvaluationOptions) -> list[Utterance]:
    """The first utterances of the data, at most ``TIMED``."""
    source = options.data or SPEECH_SETS["read"]
    # A few more, of which some may be too long.
    return [u for u in read_speech(source, 2 * TIMED) if not u.too_long][:TIMED]


def transcribe_one(subject: Subject) -> None:
    """What a speech model does in use, for `Footprint`."""
    transcribe(subject, [timed_utterances(EvaluationOptions())[0].sound()])
