"""How well and how fast a model turns speech into text: word error rate and real-time factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lillama_core.data.shipped import SPEECH_SETS
from lillama_core.data.speech.audio import RATE, require_extra
from lillama_core.data.speech.utterances import DATASETS, Utterance, read_speech
from lillama_core.data.workload import Meter
from lillama_core.errors import UserError
from lillama_core.evaluation.base import Answer, EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.metrics.error_rates import (
    Scored,
    character_error_rate,
    paired_difference,
    read_transcripts,
    score,
    standard_error,
    word_error_rate,
    write_transcripts,
)
from lillama_core.evaluation.metrics.timing import Speed, TimedRound, TimedWork
from lillama_core.evaluation.metrics.transcription import transcribe

AT_HAND = 128
"""Utterances whose sound is in memory together, to be sorted by length: an hour of them is 230 MB."""
TIMED = 5
"""Utterances whose transcription is timed."""
NOTES = "speech"
"""Where `WordErrorRate` leaves its transcripts in ``Subject.notes``: lists of `Scored` by set."""

Normalizer = Callable[[str], str]
Generation = Callable[[Subject, str | None], dict[str, Any]]
"""What ``generate`` is told besides the sound, for a model and the language spoken, where the data says which."""


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
    shared = gives_answers = True

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
            subject.answers += [
                Answer(one.reference, one.hypothesis) for one in scored[: options.answers - len(subject.answers)]
            ]
            if options.details is not None and subject.world.is_main:
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
        own = said[subject.world.rank :: subject.world.size]
        texts: list[str] = []
        while len(texts) < len(own):
            spoken = own[len(texts)][0].language
            part = [one for one in own[len(texts) :][:AT_HAND] if one[0].language == spoken]
            texts += transcribe(subject, [u.sound() for u, _ in part], **self._generation(subject, spoken))
            if len(texts) < len(own):
                report(f"wer/{name}: {len(texts)} of {len(own)} transcribed")
        found = [""] * len(said)
        for rank, of_rank in enumerate(subject.world.gather(texts)):
            found[rank :: subject.world.size] = of_rank
        return [
            score(utterance.name, reference, normalizers[utterance.language](text))
            for (utterance, reference), text in zip(said, found, strict=True)
        ]

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
                standard_error=standard_error([s.word_errors for s in scored], [s.words for s in scored], seed),
            ),
            Measurement(
                name=f"cer/{name}",
                value=character_error_rate(scored),
                unit="%",
                better="lower",
                meaning="The same for characters.",
                standard_error=standard_error(
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


class RealTimeFactor(Speed):
    """Seconds that a second of speech takes to transcribe, one utterance at a time, features included."""

    name = "real_time_factor"

    def __init__(self, generation: Generation = no_options) -> None:
        self._generation = generation

    def works(self, subjects: Sequence[Subject], options: EvaluationOptions, report: Report) -> list[TimedWork]:
        """The first ``TIMED`` utterances, one a round; the first of them once more, which does not count."""
        utterances = timed_utterances(options)
        report(f"speed: {len(utterances)} utterances, one at a time")
        meaning = f"Seconds to transcribe one second of speech, one utterance at a time; median of {len(utterances)}"
        rounds = [self._round(utterance) for utterance in [utterances[0], *utterances]]
        return [TimedWork(self.name, "", "lower", meaning, rounds)]

    def _round(self, utterance: Utterance) -> TimedRound:
        sound = utterance.sound()

        def run(subject: Subject, meter: Meter) -> None:
            chosen = self._generation(subject, utterance.language)
            meter.begin()
            transcribe(subject, [sound], **chosen)
            meter.end()

        return TimedRound(run, len(sound) / RATE)


def timed_utterances(options: EvaluationOptions) -> list[Utterance]:
    """The first utterances of the data, at most ``TIMED``; UserError where there are none."""
    source = options.data or SPEECH_SETS["read"]
    # A few more, of which some may be too long.
    read = read_speech(source, 2 * TIMED)
    found = [u for u in read if not u.too_long][:TIMED]
    if not found:
        raise UserError(
            f"{str(source)!r}: the first {len(read)} recordings are all too long to be transcribed at once, so that"
            " the real-time factor cannot be measured; name data with shorter ones"
        )
    return found


def transcribe_one(subject: Subject) -> None:
    """What a speech model does in use, for `Footprint`."""
    transcribe(subject, [timed_utterances(EvaluationOptions())[0].sound()])
