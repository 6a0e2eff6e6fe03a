"""The results of a suite: one line of JSON for each cell, appended as it ends."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lillama_core.errors import UserError

FILE = "results.jsonl"
CELL_FILE = "result.json"
"""In the folder of a cell that was run alone: its result, until `collect` takes it into FILE."""
DENSE = "dense"
"""The method of a model as it is."""


@dataclass(frozen=True)
class Result:
    """What came of one cell: a model, compressed by a method, or as it is."""

    model: str
    architecture: str
    method: str
    """DENSE for the model as it is."""
    reduction: float
    """Part of the parameters that was to be removed; 0 for the model as it is."""
    options: dict[str, Any] = field(default_factory=dict)
    """All that was said to ``compress`` and ``evaluate``, beyond the model."""
    parameters: int | None = None
    bytes: int | None = None
    """Of the weight files."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Measurements of the architecture's evaluation, as ``lillama evaluate --json`` writes them."""
    seconds: float | None = None
    """Time to compress, as the run measured it."""
    peak_memory_bytes: int | None = None
    """Largest resident memory of the process that compressed."""
    error: str | None = None
    """The last line of what failed; None when nothing did."""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, float]:
        return self.model, self.method, self.reduction

    def metric(self, name: str) -> dict[str, Any] | None:
        """The measurement of this name."""
        return next((m for m in self.metrics if m["name"] == name), None)


def append(folder: Path, result: Result) -> None:
    """Add a line; it is on the disk when this returns."""
    path = folder / FILE
    with path.open("a+b") as stream:
        # A line that a kill cut off must not swallow this one.
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(asdict(result), allow_nan=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_alone(cell: Path, result: Result) -> None:
    """Write the result of a cell into its folder ``cell``.

    Many processes, on many machines, may do so at once, which no file system promises of lines that are appended.
    """
    unfinished = cell / f"{CELL_FILE}.tmp"
    unfinished.write_text(json.dumps(asdict(result), allow_nan=True), encoding="utf-8")
    unfinished.replace(cell / CELL_FILE)


def collect(folder: Path, order: Sequence[tuple[str, str, float]]) -> None:
    """Take the results of cells that were run alone into FILE, those of ``order`` first; nobody else may be at work.

    Raises UserError as `read` does.
    """
    place = {key: number for number, key in enumerate(order)}
    found = sorted(_alone(folder), key=lambda pair: (place.get(pair[1].key, len(place)), pair[0]))
    for path, result in found:
        append(folder, result)
        path.unlink()


def read(folder: Path) -> dict[tuple[str, str, float], Result]:
    """The last result of every cell, in the order in which they first appeared; lines cut off by a kill are left out.

    Raises UserError for a line or file that is no result.
    """
    path = folder / FILE
    found: dict[tuple[str, str, float], Result] = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
            except ValueError:
                continue
            result = _result(values, f"{str(path)!r}, line {number},")
            found[result.key] = result
    # What is in the folder of a cell is newer: a cell that is worked on again starts with an empty one.
    found |= {result.key: result for _, result in _alone(folder)}
    return found


def _alone(folder: Path) -> list[tuple[Path, Result]]:
    """The results of cells that were run alone, with their files."""
    found = []
    for path in sorted(folder.glob(f"cells/*/*/{CELL_FILE}")):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            # Its cell has just been started again.
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{str(path)!r} is not a result of this suite: {error}") from None
        found.append((path, _result(values, repr(str(path)))))
    return found


def _result(values: Any, where: str) -> Result:
    try:
        return Result(**values)
    except TypeError as error:
        raise UserError(f"{where} is not a result of this suite: {error}") from None


def by_model(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by model, the dense one first, then by reduction in the order of the methods' first appearance."""
    grouped: dict[str, list[Result]] = {}
    methods: list[str] = []
    for result in results:
        grouped.setdefault(result.model, []).append(result)
        if result.method not in methods:
            methods.append(result.method)
    for rows in grouped.values():
        rows.sort(key=lambda r: (r.method != DENSE, r.reduction, methods.index(r.method)))
    return grouped


def with_retention(rows: Sequence[Result], names: Sequence[str]) -> list[Result]:
    """``rows`` of one model, the compressed ones with what they keep of the dense one's metrics ``names``, in %.

    That is compressed over dense where higher is better, else dense over compressed; no finite number keeps nothing.
    Shown are the means over the metrics of one kind, such as ``perplexity/…``, and over all. A row that lacks one of
    ``names``, or of which the dense one does, stays as it is: means of other metrics are not to be compared.
    """
    dense = next((row for row in rows if row.method == DENSE), None)
    wanted = {} if dense is None else {name: dense.metric(name) for name in names}
    if not wanted or any(metric is None or not _is_positive(metric["value"]) for metric in wanted.values()):
        return list(rows)
    return [row if row.method == DENSE else _retaining(row, {n: m for n, m in wanted.items() if m}) for row in rows]


def _retaining(row: Result, dense: dict[str, dict[str, Any]]) -> Result:
    own = {name: row.metric(name) for name in dense}
    kept = {
        name: _kept(metric["value"], dense[name]["value"], metric["better"])
        for name, metric in own.items()
        if metric is not None
    }
    if len(kept) < len(dense):
        return row
    groups: dict[str, list[float]] = {}
    for name, value in kept.items():
        groups.setdefault(f"retention/{name.partition('/')[0]}", []).append(value)
    groups["retention/mean"] = list(kept.values())
    return replace(row, metrics=[*row.metrics, *(_mean(name, values) for name, values in groups.items())])


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _kept(value: float, dense: float, better: str) -> float:
    if better == "higher":
        return value / dense if math.isfinite(value) else 0.0
    return dense / value if _is_positive(value) else 0.0


def _mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "name": name,
        "value": 100 * sum(values) / len(values),
        "unit": "%",
        "better": "higher",
        "meaning": f"Of the dense model's, mean of {len(values)} metrics with the same weight.",
    }
