"""Makes the evaluation material that ships in the wheel: two multiple-choice sets and a perplexity text.

Run from anywhere, ``python benchmarks/offline_tasks/make.py``; the result is a function of the texts in
``benchmarks/data`` and of ``SEED`` alone, byte for byte. README.md next to this file explains the choices.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SEED = 20240707
ITEMS = 240
"""Items of each set; a multiple of ``CHOICES``, so that every answer position occurs equally often."""
CHOICES = 4

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
CORE = Path(__file__).resolve().parents[2] / "lillama_core"

PERPLEXITY_ARTICLES = 6
"""Articles of the WikiText-2 test split in the perplexity text: 50 windows of 512 SmolLM2 tokens."""
TITLE = re.compile(r"(?m)^ = [^=\n]+ = $")
SENTENCE = re.compile(r"\S.*?(?: [.!?])(?: [\"”])?(?= |$)")
PLAIN = re.compile(r"[A-Za-z0-9 ,.;'’\"“”!?$%()–-]+")
ENDING_STARTS = frozenset(
    re.findall(r"\w+", "a an and as at by for from his in into of on over the their to under with")
)
"""An ending begins at one of these words, and so do its rivals: the first word gives nothing away."""
DETERMINERS = frozenset(
    re.findall(r"\w+", "a an another her his its my no one our some that the their these this your")
)

Item = dict[str, str | int | list[str]]


@dataclass(frozen=True)
class Sentence:
    """One detokenised sentence."""

    article: int
    before: str
    """The sentence before it in the same paragraph, or an empty string."""
    words: tuple[str, ...]


def detokenise(text: str) -> str:
    """``text`` in its tokenised form ("a low @-@ cost car , built in 1950 .") as people write it."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r' ?" ([^"]*?) "', r' "\1"', text)
    text = re.sub(r"“ ", "“", re.sub(r" ”", "”", text))
    text = re.sub(r" ’ (s|ll|t|d|re|ve|m)\b", r"’\1", text)
    text = re.sub(r" ('s|n't|'ll|'re|'ve|'d|'m)\b", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r"(\d) – (\d)", r"\1–\2", text)
    return " ".join(text.split())


def readable(sentence: str) -> bool:
    """Whether a detokenised sentence reads well alone: no gaps, no odd signs, quotes and brackets closed."""
    return (
        "unk" not in sentence
        and PLAIN.fullmatch(sentence) is not None
        and sentence[0].isupper()
        and sentence.count('"') % 2 == 0
        and sentence.count("(") == sentence.count(")")
        and sentence.count("“") == sentence.count("”")
        and " '" not in sentence
        and " ’" not in sentence
    )


def paragraphs_of_wikitext(text: str) -> Iterable[tuple[int, str]]:
    """Number of the article and text of every paragraph; headings are left out."""
    article = 0
    for line in text.splitlines():
        if TITLE.fullmatch(line):
            article += 1
        elif line.strip() and not line.startswith(" = "):
            yield article, line


def paragraphs_of_tales(text: str) -> Iterable[tuple[int, str]]:
    """The tales have one sentence a line and no headings: 40 lines stand for an article."""
    lines = text.splitlines()
    for start in range(0, len(lines), 40):
        yield start // 40, " ".join(line.strip() for line in lines[start : start + 40])


def sentences(paragraphs: Iterable[tuple[int, str]]) -> list[Sentence]:
    """The readable sentences in the order of the text, each with its predecessor if that is readable too."""
    found: list[Sentence] = []
    for article, paragraph in paragraphs:
        before = ""
        for raw in SENTENCE.findall(paragraph):
            sentence = "" if "<unk>" in raw else detokenise(raw)
            if sentence and readable(sentence):
                found.append(Sentence(article, before, tuple(sentence.split())))
                before = sentence
            else:
                before = ""
    return found


def balanced_labels(count: int, rng: random.Random) -> list[int]:
    """``count`` answer positions in random order, each position equally often."""
    labels = [position % CHOICES for position in range(count)]
    rng.shuffle(labels)
    return labels


def items(questions: Sequence[tuple[str, str, list[str]]], rng: random.Random) -> list[Item]:
    """Items from (context, true choice, three false ones), the truth at balanced positions."""
    made: list[Item] = []
    for (context, truth, rivals), label in zip(questions, balanced_labels(len(questions), rng), strict=True):
        choices = [*rivals[:label], truth, *rivals[label:]]
        made.append({"id": len(made), "context": context, "choices": choices, "label": label})
    return made


def continuation(text: str, count: int, rng: random.Random) -> list[Item]:
    """Which of four real sentence endings continues this beginning?

    The false ones begin with the same small word and are about as long; they come from the same article
    when it has enough of them, so that knowing the topic is not enough.
    """
    endings: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {}
    asked: list[tuple[int, Sentence, int]] = []
    for number, sentence in enumerate(sentences(paragraphs_of_wikitext(text))):
        words = sentence.words
        cuts = [i for i in range(8, len(words) - 3) if len(words) - i <= 7 and words[i] in ENDING_STARTS]
        if not cuts or any(mark in " ".join(words[cuts[0] :]) for mark in '"();'):
            continue
        cut = cuts[0]
        endings.setdefault(words[cut], []).append((number, sentence.article, words[cut:]))
        if cut <= 16:
            asked.append((number, sentence, cut))
    rng.shuffle(asked)
    questions: list[tuple[str, str, list[str]]] = []
    for number, sentence, cut in asked:
        truth = sentence.words[cut:]
        rivals = [
            (article != sentence.article, rng.random(), " ".join(words))
            for other, article, words in endings[truth[0]]
            if other != number and abs(len(words) - len(truth)) <= 1 and words[1:] != truth[1:]
        ]
        chosen = list(dict.fromkeys(ending for _, _, ending in sorted(rivals)))[: CHOICES - 1]
        if len(chosen) == CHOICES - 1:
            questions.append((" ".join(sentence.words[:cut]), " ".join(truth), chosen))
        if len(questions) == count:
            break
    return items(questions, rng)


def bare(word: str) -> str:
    """``word`` in lower case without the punctuation around it."""
    return word.strip(".,;!?“”’\"'()").lower()


def word_kind(word: str) -> str:
    """A rough word class by ending, so that grammar alone does not single out the right word."""
    for suffix in ("ing", "ed", "ly", "s"):
        if word.endswith(suffix):
            return suffix
    return ""


def cloze(text: str, count: int, rng: random.Random) -> list[Item]:
    """Which of four words ends this passage? After LAMBADA (Paperno et al. 2016), with choices.

    The false words end other sentences of the same text, are of the same rough class and about as
    frequent, occur somewhere behind a determiner if the right one stands behind a determiner, and occur
    in the same tale where it has enough such words.
    """
    told = sentences(paragraphs_of_tales(text))
    frequency: Counter[str] = Counter()
    places: dict[str, set[bool]] = {}
    vocabulary: dict[int, set[str]] = {}
    for sentence in told:
        words = [bare(word) for word in sentence.words]
        frequency.update(words)
        vocabulary.setdefault(sentence.article, set()).update(words)
        for previous, word in pairwise(words):
            places.setdefault(word, set()).add(previous in DETERMINERS)
    last = [(sentence, re.fullmatch(r"([a-z]{3,})[.!?]", sentence.words[-1])) for sentence in told]
    asked = [(sentence, match.group(1)) for sentence, match in last if match]
    by_frequency = sorted({word for _, word in asked}, key=lambda word: (-frequency[word], word))
    rng.shuffle(asked)
    questions: list[tuple[str, str, list[str]]] = []
    for sentence, truth in asked:
        context = " ".join(sentence.words[:-1])
        if len(sentence.words) < 14 and len(sentence.before.split()) <= 24:
            context = f"{sentence.before} {context}".strip()
        if not 7 <= len(context.split()) <= 40:
            continue
        place = bare(sentence.words[-2]) in DETERMINERS
        kind = word_kind(truth)
        peers = [word for word in by_frequency if word_kind(word) == kind and place in places[word]]
        local = [word for word in peers if word in vocabulary[sentence.article]]
        pool = local if len(local) >= 2 * CHOICES else peers
        at = pool.index(truth)
        near = [word for word in pool[max(0, at - 5) : at + 6] if word != truth]
        if len(near) >= CHOICES - 1:
            questions.append((context, truth, rng.sample(near, CHOICES - 1)))
        if len(questions) == count:
            break
    return items(questions, rng)


def make(target: Path) -> None:
    """Writes the three files below ``target``, laid out as in ``lillama_core``.

    Raises ValueError when the texts do not yield ``ITEMS`` items for a set.
    """
    wikitext = (DATA / "wikitext2-test.txt").read_text(encoding="utf-8")
    tales = (DATA / "tales-grimm.txt").read_text(encoding="utf-8")
    titles = [match.start() for match in TITLE.finditer(wikitext)]
    head_end = titles[PERPLEXITY_ARTICLES]
    # The questions come from behind the perplexity text: the two numbers rest on different sentences.
    sets = {
        "continuation": continuation(wikitext[head_end:], ITEMS, random.Random(f"{SEED} continuation")),
        "cloze": cloze(tales, ITEMS, random.Random(f"{SEED} cloze")),
    }
    shipped, tasks = target / "data" / "shipped", target / "evaluation" / "metrics" / "tasks"
    shipped.mkdir(parents=True, exist_ok=True)
    tasks.mkdir(parents=True, exist_ok=True)
    (shipped / "wikitext2-test-head.txt").write_bytes(wikitext[:head_end].encode())
    for name, made in sets.items():
        if len(made) != ITEMS:
            raise ValueError(f"{name}: the text yields {len(made)} items instead of {ITEMS}; loosen its rules")
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made)
        (tasks / f"{name}.jsonl").write_bytes(lines.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the offline evaluation material.")
    parser.add_argument("--target", type=Path, default=CORE, help="folder to write below")
    make(parser.parse_args().target)
