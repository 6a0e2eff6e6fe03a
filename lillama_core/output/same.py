"""Whether two runs gave the same: their records, and their files to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lillama_core.output.record import RunRecord
from lillama_core.output.run_directory import differences
from lillama_core.system.files import sha256_of

TOLD = frozenset({"README.md", "lillama.json", "report.html", "lillama_recipe.yaml"})
"""Files that tell of the run: when it was, how long it took and what its data was called."""
MOST = 5
"""Maps or tensors that are named; of further ones only how many there are."""


def different_conditions(before: RunRecord, after: RunRecord) -> list[str]:
    """In what the two runs differ that the numbers depend on, a line each: data, versions, machine, arithmetic."""
    lines = []
    found, known = ({"data": r.data.get("sha256"), **_parts(r)} for r in (before, after))
    if found["data"] != known["data"]:
        lines.append(f"data: SHA-256 {found['data']} -> {known['data']}")
    for key in ("versions", "machine"):
        # A record of an earlier version tells less.
        old, new = ({k: v for k, v in r[key].items() if k in found[key] and k in known[key]} for r in (found, known))
        lines += [f"{key}: {change}" for change in differences({key: old}, {key: new})]
    for key in ("architecture", "device", "compute", "dtype", "processes"):
        lines += differences({key: found[key]}, {key: known[key]})
    return lines


def _parts(record: RunRecord) -> dict[str, Any]:
    keys = ("versions", "machine", "architecture", "device", "compute", "dtype", "processes")
    return {key: getattr(record, key) for key in keys}


def different_plans(before: RunRecord, after: RunRecord) -> list[str]:
    """What the two plans share out otherwise, a line each."""
    lines = []
    for key in sorted({*before.plan, *after.plan}):
        old, new = before.plan.get(key), after.plan.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            paths = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
            lines += _first([f"plan: {key} of {path}: {old.get(path)} -> {new.get(path)}" for path in paths])
        else:
            lines.append(f"plan: {key}: {old} -> {new}")
    return lines


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MOST
    return lines if more <= 0 else [*lines[:MOST], f"{lines[0].partition(':')[0]}: {more} more"]


def compared_files(before: Path, after: Path, record: RunRecord) -> list[str]:
    """The files that are to be the same: all that a run writes but for what tells of the run itself."""
    files = {file.name for file in after.iterdir() if file.is_file()} - TOLD
    return sorted(files | {file.name for file in before.glob("*.safetensors")} | set(record.sha256))


def different_files(before: Path, after: Path, record: RunRecord) -> list[str]:
    """The files of two directories that differ, a line each; ``record`` is that of ``before``.

    Where a weight file of ``before`` is not at hand, what the record says of it counts.
    """
    lines = []
    for name in compared_files(before, after, record):
        recorded = record.sha256.get(name)
        old = sha256_of(before / name) if (before / name).is_file() else recorded
        new = sha256_of(after / name) if (after / name).is_file() else None
        if recorded not in (None, old):
            lines.append(f"file: {name} is not what was written: its SHA-256 is another than in the record")
        if old is None or new is None:
            lines.append(f"file: {name} is in {'the new' if old is None else 'the old'} directory alone")
        elif old != new:
            lines.append(f"file: {name}: SHA-256 {old} -> {new}")
    return lines


def different_tensors(before: Path, after: Path) -> list[str]:
    """The tensors of two directories that differ, and by how much, a line each; those that differ most come first."""
    with contextlib.ExitStack() as stack:
        old, new = _tensors(before, stack), _tensors(after, stack)
        if not old:
            return []
        lines = [f"tensor: {name} is in one of them alone" for name in sorted(set(old) ^ set(new))]
        found = []
        for name in sorted(set(old) & set(new)):
            first, second = old[name].get_tensor(name), new[name].get_tensor(name)
            if first.shape != second.shape or first.dtype != second.dtype:
                lines.append(f"tensor: {name}: {_kind(first)} -> {_kind(second)}")
            elif not torch.equal(first, second):
                by = (second.double() - first.double()).abs().max().item()
                size = first.double().abs().max().item()
                of = f", where the largest number is {size:.3g}"
                found.append((by / size if size else by, f"tensor: {name}: by up to {by:.3g}{of}"))
    found.sort(key=lambda pair: -pair[0])
    return _first([*lines, *(line for _, line in found)])


def _tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name of a tensor -> the open file that holds it."""
    return {name: file for file in _opened(folder, stack) for name in file.keys()}  # noqa: SIM118  no mapping


def _opened(folder: Path, stack: contextlib.ExitStack) -> Iterator[Any]:
    for path in sorted(folder.glob("*.safetensors")):
        yield stack.enter_context(safe_open(path, framework="pt"))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
