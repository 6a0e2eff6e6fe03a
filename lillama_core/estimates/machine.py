"""What a machine can do: rates and memory, of this one or of one that a file names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from lillama_core.errors import UserError, nearest, one_line
from lillama_core.estimates.work import Work
from lillama_core.strategies.validation import Validated, explain, shown
from lillama_core.system.regular import check_regular

NAMED = Path(__file__).with_name("machines.yaml")
LARGEST_FILE = 100_000
"""Bytes of a file of machines: one has a few hundred."""


def rate(description: str) -> Any:
    return Field(description=description, gt=0.0, allow_inf_nan=False)


class Machine(Validated):
    """Rates and memory of a machine. A second stands for the machine at work alone."""

    name: str = Field(description="what it is called")
    devices: int = Field(1, description="accelerators, or 1", ge=1, le=4096)
    accelerator: bool = Field(False, description="whether tensors are computed on a device with memory of its own")
    host_memory: float = rate("bytes of memory of the host that are free")
    device_memory: float | None = Field(None, description="bytes of one device that are free", gt=0)
    libraries: float = rate("bytes of a process that has loaded all libraries and a model of no size")
    float32: float = rate("operations a second of products in fp32")
    bfloat16: float | None = Field(None, description="the same in bfloat16; none: not done in hardware", gt=0)
    float64: float = rate("the same in fp64")
    eigh: Mapping[int, float] = Field(description="size of a symmetric fp64 matrix -> seconds of its decomposition")
    pivoting: float = rate("operations a second of QR with column pivoting on the host")
    bandwidth: float = rate("bytes a second that kernels read and write where tensors are")
    kernel: float = rate("seconds that each kernel costs besides")
    draw: float = rate("seconds for each probability among which a label is drawn, on the host")
    disk_write: float = rate("bytes a second to disk")
    disk_read: float = rate("bytes a second from disk")
    link: float | None = Field(None, description="bytes a second between host and device", gt=0)
    start: float = rate("seconds until a fresh process has loaded all libraries")

    @field_validator("eigh", mode="after")
    @classmethod
    def _sizes(cls, value: Mapping[int, float]) -> Mapping[int, float]:
        if not 1 <= len(value) <= 100 or not all(0 < n <= 10**6 and 0 < s < math.inf for n, s in value.items()):
            raise PydanticCustomError("value_error", "a mapping of sizes to seconds, all above 0")
        return dict(sorted(value.items()))

    def eigh_seconds(self, size: int) -> float:
        """Seconds of one decomposition: between measured sizes and beyond them by the cube of the nearest."""
        nearest_size = min(self.eigh, key=lambda n: abs(math.log(n / size)))
        low = [n for n in self.eigh if n <= size]
        high = [n for n in self.eigh if n >= size]
        if low and high and low[-1] != high[0]:
            a, b = low[-1], high[0]
            power = math.log(self.eigh[b] / self.eigh[a]) / math.log(b / a)
            return self.eigh[a] * (size / a) ** power
        # Smaller ones are not cubic any more, but then cost nothing worth knowing.
        return float(self.eigh[nearest_size] * (size / nearest_size) ** 3)

    def seconds(self, work: Work, half: bool) -> float:
        """How long ``work`` takes on one device, with products in half precision or in fp32."""
        products = self.bfloat16 if half and self.bfloat16 else self.float32
        found = work.products / products + work.full / self.float32 + work.exact / self.float64
        found += sum(count * self.eigh_seconds(n) for n, count in work.eigh.items())
        found += work.pivoting / self.pivoting + work.drawn * self.draw
        found += work.moved / self.bandwidth + work.operations * self.kernel
        found += work.read / self.disk_read + work.written / self.disk_write
        if self.link is not None:
            found += work.crossed / self.link
        return found + work.starts * self.start


def machine_names() -> list[str]:
    """The machines that can be named."""
    return sorted(_entries(NAMED, str(NAMED)))


def named_machine(name: str) -> Machine:
    """A machine by name, or from the user's YAML file; raises UserError for a name that nobody knows, or a bad file."""
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or path.is_file():
        return _machine(_mapping(path, f"machine {name!r}"), path.stem, f"machine {name!r}")
    entries = _entries(NAMED, str(NAMED))
    if name not in entries:
        known = sorted(entries)
        raise UserError(
            f"no machine named {name!r} (there are: {', '.join(known)}; or give a YAML file){nearest(name, known)}"
        )
    return _machine(entries[name], name, f"machine {name!r}")


def _entries(path: Path, where: str) -> dict[str, dict[str, Any]]:
    """All machines of the file that comes with lillama; one names another in ``like`` and says what differs."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in _mapping(path, where).items():
        found[name] = {**found.get(own.pop("like", ""), {}), **own}
    return found


def _mapping(path: Path, where: str) -> dict[str, Any]:
    check_regular(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{where} is no list of rates: {path.stat().st_size:,} bytes")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    # Whatever is in the file: values such as the date 2024-99-99 fail in Python, not in the parser.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not YAML: {one_line(error)}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{where} must be a mapping of rate to number")
    return data


def _machine(data: Mapping[str, Any], name: str, where: str) -> Machine:
    values = {"name": name, **{key.replace("-", "_"): _number(value) for key, value in data.items()}}
    for key in values:
        if key not in Machine.model_fields:
            raise UserError(f"{where}: unknown key {shown(key)}{nearest(key, list(Machine.model_fields))}")
    try:
        found = Machine(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {first['loc'][0]}") from None
        raise UserError(explain(error, Machine, lambda key: f"{where}: {key}")) from None
    if found.accelerator and (found.device_memory is None or found.link is None):
        raise UserError(f"{where} has an accelerator: device_memory and link must be given")
    return found


def _number(value: Any) -> Any:
    """A number as YAML 1.2 reads it: 19.5e12 without a sign is text to YAML 1.1."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return {k: _number(v) for k, v in value.items()} if isinstance(value, dict) else value
