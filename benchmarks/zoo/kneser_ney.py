"""Interpolated modified Kneser-Ney n-grams: what a language model must beat to have learned more than counts.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Context = tuple[int, ...]


class KneserNey:
    """P(token | the ``order`` - 1 tokens before), estimated from one stream of tokens.

    The highest order counts occurrences; each lower one counts in how many different contexts an n-gram was seen
    (at the beginning of the stream, where no token comes before, occurrences). Below the unigrams lies the uniform
    distribution over ``vocabulary`` tokens, so that every token has a probability above zero.
    """

    def __init__(self, tokens: Sequence[int], order: int, vocabulary: int | None = None) -> None:
        if order < 1 or len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens are too few for an n-gram of order {order}")
        self.order = order
        self.vocabulary = max(tokens) + 1 if vocabulary is None else vocabulary
        if max(tokens) >= self.vocabulary:
            raise ValueError(f"token {max(tokens)} is not in a vocabulary of {self.vocabulary}")
        counts: Counter[Context] = Counter(_grams(tokens, order))
        self._levels = [_Level(counts)]
        for n in range(order - 1, 0, -1):
            counts = Counter(gram[1:] for gram in counts)
            # The stream's first n-gram has no token before it; without this it would be missing.
            counts[tuple(tokens[:n])] += 1
            self._levels.append(_Level(counts))
        self._levels.reverse()

    def probability(self, token: int, context: Sequence[int]) -> float:
        """P(``token`` | ``context``), of which at most the last ``order`` - 1 tokens count."""
        past = tuple(context)[-(self.order - 1) :] if self.order > 1 else ()
        p = 1.0 / self.vocabulary
        for n, level in enumerate(self._levels):
            if n > len(past):
                break
            seen = past[len(past) - n :]
            total = level.totals.get(seen)
            if total is None:
                # A longer context cannot have been seen either.
                break
            count = level.counts.get((*seen, token), 0)
            p = (max(count - level.discount(count), 0.0) + level.left_over[seen] * p) / total
        return p

    def window_perplexity(self, tokens: Sequence[int], length: int) -> float:
        """Perplexity over whole windows of ``length`` tokens, whose first is not predicted.

        The context reaches back over the beginning of a window, which only helps.
        """
        positions = [i for i in range(len(tokens) // length * length) if i % length]
        total = sum(math.log(self.probability(tokens[i], tokens[max(0, i - self.order + 1) : i])) for i in positions)
        return math.exp(-total / len(positions))


class _Level:
    """The counts of one order, their three discounts, and what they leave to the order below."""

    def __init__(self, counts: Counter[Context]) -> None:
        self.counts = counts
        of_counts = Counter(counts.values())
        n1, n2, n3, n4 = (of_counts.get(c, 0) for c in (1, 2, 3, 4))
        Y = n1 / (n1 + 2 * n2) if n1 else 0.5
        # Chen & Goodman, equation 17; tiny texts lack some of the counts, and a discount takes at most the count.
        self._discounts = tuple(
            min(max(c - (c + 1) * Y * above / n, 0.0), c) if n else Y
            for c, n, above in ((1, n1, n2), (2, n2, n3), (3, n3, n4))
        )
        self.totals: Counter[Context] = Counter()
        self.left_over: defaultdict[Context, float] = defaultdict(float)
        for gram, count in counts.items():
            self.totals[gram[:-1]] += count
            self.left_over[gram[:-1]] += min(self.discount(count), count)

    def discount(self, count: int) -> float:
        return self._discounts[min(count, 3) - 1] if count else 0.0


def _grams(tokens: Sequence[int], n: int) -> zip[Context]:
    return zip(*(tokens[i:] for i in range(n)))  # noqa: B905 - the shorter ones end it
