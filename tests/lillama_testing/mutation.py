"""Inputs that are almost right: values and bytes with a few faults in them, drawn from a random stream.

The stream is `random.Random`, or hypothesis's, which then looks for the smallest input that fails.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

MOST_FAULTS = 4
DEEP = 200
"""Lists within one another in a value; as bytes there are more, which no parser of JSON goes along with."""

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 255, 65535, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 2**63, 2**64),
    *(10**15, 10**30, -(10**30), 10**300),
    *(0.0, -0.0, 0.5, -0.5, 1e-300, 5e-324, 1e300, 1.7976931348623157e308, math.inf, -math.inf, math.nan),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], {"": None}, [None, {}], {"name": "x"}, [0, "a", None], {"a": {"b": [1]}}),
    *("", " ", "0", "-1", "nan", "1e999", "None", "\0", "\n", "é", "\ud800", "\U0001f600", "../..", "/", "a" * 5000),
    *("auto", "default", "low", "*", "%", "100%", "{{ 1 }}", "!!python/object:os.system", "2024-99-99", "__class__"),
)


def faulty(value: Any, random: Random) -> Any:
    """A value of dicts, lists and scalars with one to four faults in it; the given one is not changed."""
    for _ in range(random.randint(1, MOST_FAULTS)):
        # Seldom the whole: whoever wants a mapping says no more of anything else.
        value = odd(value, random) if random.random() < 0.02 else _with_fault(value, random)
    return value


def _with_fault(value: Any, random: Random) -> Any:
    """One fault: here, or in something that ``value`` holds."""
    kind = random.random()
    if isinstance(value, dict) and value:
        key = random.choice(list(value))
        inner = odd(value[key], random) if kind < 0.15 else _with_fault(value[key], random)
        return _of_dict(value, key, random) if kind > 0.75 else {**value, key: inner}
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        inner = odd(value[at], random) if kind < 0.15 else _with_fault(value[at], random)
        return _of_list(value, at, random) if kind > 0.75 else [*value[:at], inner, *value[at + 1 :]]
    return odd(value, random)


def _of_dict(value: dict[Any, Any], key: Any, random: Random) -> dict[Any, Any]:
    """Without the entry, under another name, twice, or with that of its neighbour."""
    rest = {k: v for k, v in value.items() if k != key}
    other = random.choice(list(value))
    name = str(key)
    return random.choice(
        (
            lambda: rest,
            lambda: {
                **rest,
                name[: random.randint(0, len(name))] + random.choice(("", "_", "x", ".", "\0")): value[key],
            },
            lambda: {**value, f"{key}{random.choice(('2', ' ', '.x'))}": value[key]},
            lambda: {**value, key: value[other], other: value[key]},
            lambda: {**value, str(random.choice((*OTHERS, *NUMBERS))): value[key]},
        )
    )()


def _of_list(value: list[Any], at: int, random: Random) -> list[Any]:
    """Without the element, with it twice or many times, cut, or in another order."""
    return random.choice(
        (
            lambda: value[:at] + value[at + 1 :],
            lambda: [*value[: at + 1], *value[at:]],
            lambda: [*value, *[value[at]] * random.choice((10, 300))],
            lambda: value[:at],
            lambda: value[at:] + value[:at],
        )
    )()


def odd(value: Any, random: Random) -> Any:
    """What does not belong in the place of ``value``, or nearly does."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or random.random() < 0.4:
        return random.choice((*NUMBERS, *OTHERS, *([nested(random.randint(2, DEEP))] if random.random() < 0.1 else ())))
    if isinstance(value, str):
        cut = random.randint(0, len(value))
        return random.choice(
            (value[:cut], value + "x", value * 2, value.upper(), value[:cut] + "\0" + value[cut:], [value])
        )
    return random.choice((value + 1, -value, value * 2, value // 3, float(value), str(value), [value], *NUMBERS))


def nested(depth: int) -> list[Any]:
    """Lists within one another."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
)


def faulty_bytes(data: bytes, random: Random, near: int | None = None) -> bytes:
    """``data`` with one to four faults: bits turned, bytes lost, repeated or made up, numbers that are too large.

    ``near`` is a number of bytes from the beginning: half of the faults lie within it.
    """
    for _ in range(random.randint(1, MOST_FAULTS)):
        size = len(data)
        reach = min(near, size) if near is not None and random.random() < 0.5 else size
        at = random.randint(0, max(0, reach - 1))
        data = random.choice(_FAULTS)(data, at, random)
    return data


def _number(data: bytes, at: int, random: Random) -> bytes:
    code, width = random.choice((("<B", 1), ("<H", 2), ("<I", 4), ("<Q", 8), (">I", 4), (">Q", 8)))
    return data[:at] + struct.pack(code, random.choice(INTEGERS) % 256**width) + data[at + width :]


def _length(random: Random) -> int:
    return random.choice((1, 1, 2, 4, 8, 16, 64, 512))


def _flip(data: bytes, at: int, random: Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << random.randint(0, 7)]) + data[at + 1 :] if data else data


_FAULTS: tuple[Callable[[bytes, int, Random], bytes], ...] = (
    _flip,
    _flip,
    _number,
    _number,
    lambda data, at, random: data[:at] + bytes([random.randint(0, 255)]) + data[at + 1 :],
    lambda data, at, random: data[:at],
    lambda data, at, random: data[:at] + data[at + _length(random) :],
    lambda data, at, random: data[: at + _length(random)] + data[at:],
    lambda data, at, random: data[:at] + made_up(random) + data[at:],
    lambda data, at, random: (
        data[:at] + random.choice((b"[", b'{"a":', b"- ")) * random.choice((9, 500, 20_000)) + data[at:]
    ),
)


def made_up(random: Random) -> bytes:
    """Bytes at random, or of the signs that text formats are made of."""
    count = random.choice((0, 1, 2, 4, 8, 32, 200))
    if random.random() < 0.5:
        return bytes(random.randint(0, 255) for _ in range(count))
    return bytes(random.choice(b'{}[]":,-0123456789.eE \n\ttrufalsn&*!|>%@`#?\\') for _ in range(count))
