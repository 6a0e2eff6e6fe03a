"""Feed every reader of files with input that is almost right, and count what comes out.

    python benchmarks/fuzz.py --inputs 1000000 --json results/fuzz.json

Each input has a number: ``--reader record --first 77 --inputs 1`` repeats that one. A reader runs in a process of its
own, which gets no more than `ROOM` bytes; one input may take `MEMORY` of them, and `SECONDS` of the processor's time,
or `PATIENCE` of waiting. Exit status 1 says that something else than a documented error came out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOM = 8 << 30
MEMORY = 256 << 20
SECONDS = 10
PATIENCE = 120
"""Longer, since other work may hold the machine; what waits for ever is found all the same."""
MOST_SHOWN = 20


class TooLong(BaseException):
    """One input took longer than it may."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed readers of files with faulty input, and count what comes out.")
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together (default: 10000)")
    parser.add_argument("--reader", help="this one alone (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["LILLAMA_CACHE"] = f"{work}/cache"
        readers = _readers(Path(work))
        wanted = [options.reader] if options.reader else list(readers)
        shares = sum(readers[name].share for name in wanted)
        figures = {}
        for name in wanted:
            count = max(1, options.inputs * readers[name].share // shares)
            figures[name] = found = apart(readers[name], options.first, count)
            told = f"{found['inputs']:,} inputs, {found['refused']:,} refused, {found['seconds']:.0f} s"
            print(f"{name}: {told}, {found['memory']:,} bytes more, slowest {found['slowest']:.2f} s", flush=True)
            for number, error in found["defects"][:MOST_SHOWN]:
                print(f"  input {number}: {error}", flush=True)
    if options.json:
        lines = {n: f | {"defects": len(f["defects"])} for n, f in figures.items()}
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return int(any(f["defects"] for f in figures.values()))


def _readers(work: Path) -> dict[str, Any]:
    from lillama_core.pipeline import Request, compress
    from lillama_core.system.quiet import quiet
    from lillama_registry import registry
    from lillama_testing.readers import make_readers
    from lillama_testing.tiny import make_tiny_model

    (architecture,) = registry().architectures_for("llama")
    tiny = make_tiny_model(architecture, "llama", work / "tiny")
    with quiet():
        compress(Request(str(tiny.folder), work / "small", tiny.recipe()), "quiet")
    return make_readers(work / "inputs", tiny.folder, work / "small")


def apart(reader: Any, first: int, count: int) -> dict[str, Any]:
    """The figures of ``count`` inputs of a reader, from a process that may die of them."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    current = context.Value("q", first)
    process = context.Process(target=_work, args=(reader, first, count, send, current))
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        number, status = current.value, process.exitcode
        found = {"inputs": number - first + 1, "refused": 0, "seconds": 0.0, "slowest": 0.0, "memory": 0}
        found["defects"] = [(number, f"the process ended with status {status}")]
    process.join()
    return found


def _work(reader: Any, first: int, count: int, send: Any, current: Any) -> None:
    import psutil

    from lillama_core.system.quiet import quiet

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {SECONDS if number == signal.SIGPROF else PATIENCE} s")

    timers = ((signal.ITIMER_PROF, SECONDS), (signal.ITIMER_REAL, PATIENCE))
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    limit = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refused, slowest, defects = 0, 0.0, []
    before = peak = _peak()
    started = time.monotonic()
    with quiet(), open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        for number in range(first, first + count):
            current.value = number
            data = reader.input(Random(number))
            begun = time.process_time()
            for timer, most in timers:
                signal.setitimer(timer, most)
            try:
                refused += not reader.ends_as_documented(data)
            except (Exception, TooLong) as error:
                # Of what took too long the last place is the handler's.
                place = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, TooLong) else -1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                defects.append((number, f"{type(error).__name__}: {error} ({where})"[:300]))
            finally:
                for timer, _ in timers:
                    signal.setitimer(timer, 0)
            if (now := _peak()) > peak + MEMORY:
                defects.append((number, f"it took {now - peak:,} bytes"))
            peak = max(peak, now)
            slowest = max(slowest, time.process_time() - begun)
    seconds = time.monotonic() - started
    found = {"inputs": count, "refused": refused, "seconds": round(seconds, 1), "slowest": round(slowest, 2)}
    send.send(found | {"memory": _peak() - before, "defects": defects})


def _peak() -> int:
    from lillama_core.output.record import peak_memory_bytes

    return peak_memory_bytes()


if __name__ == "__main__":
    sys.exit(main())
