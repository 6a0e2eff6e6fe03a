"""What the user may choose about calibration data."""

from __future__ import annotations

from dataclasses import dataclass

from lillama_core.data.sources import SELF, Source


@dataclass(frozen=True)
class CalibrationOptions:
    """How much text, from where, and by which seed; `check_sources` says whether the values make sense."""

    sources: tuple[Source, ...] = ()
    """Where the text comes from; empty means the model itself."""
    tokens: int = 32768
    """Number of tokens in all; rounded down to whole rows."""
    sequence_length: int = 512
    """Tokens per row."""
    seed: int = 0
    self_share: float = 0.5
    """Fraction of the tokens that the model writes itself when other data is named; 0 switches it off.

    Without effect when ``self`` is itself among the sources: then the weights say.
    """
    use_all: bool = False
    """Take what there is of data that is too small, instead of an error that says how much there is."""

    def effective_sources(self) -> tuple[Source, ...]:
        """Return the sources with the model itself among them; the weights need not sum to one."""
        if not self.sources:
            return (Source(SELF),)
        if self.self_share == 0 or any(source.name == SELF for source in self.sources):
            return self.sources
        total = sum(source.weight for source in self.sources)
        named = tuple(Source(source.name, source.weight / total * (1 - self.self_share)) for source in self.sources)
        return (Source(SELF, self.self_share), *named)

    def rows(self) -> int:
        """Number of rows of ``sequence_length`` tokens."""
        return self.tokens // self.sequence_length
