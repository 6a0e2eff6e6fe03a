"""``python -m pretend_cuda.worker GUARD``: reads a job a line, forks, and says how the child ended.

A child has torch changed as it needs it, counts that start at 0, and whatever a failed run leaves ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(guard: str) -> None:
    """Serve jobs until stdin ends."""
    # Before torch, which asks once what devices there are.
    ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all()
    # Nothing of it is collected, or copied for that, in a child.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                serve(json.loads(line))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{status}\n")
        answers.flush()


def import_all() -> None:
    """Import what runs need, so that no child has to."""
    for name in ("torch", "scipy.linalg", "lillama_core.pipeline", "pretend_cuda.cuda_api"):
        importlib.import_module(name)
    import torch
    import transformers

    from lillama_registry import registry

    for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM", "WhisperProcessor"):
        getattr(transformers, name)
    registry()
    torch.set_num_threads(1)


def serve(job: dict[str, Any]) -> None:
    """Do one job and write its report, or the traceback of what went wrong."""
    try:
        found = execute(job["source"]) if "source" in job else run(job)
    except Exception:
        found = {"error": traceback.format_exc()}
    Path(job["report"]).write_text(json.dumps(found), encoding="utf-8")


def execute(source: str) -> dict[str, Any]:
    """Execute ``source`` where the pretend device is; return what it leaves in ``found``."""
    from pretend_cuda.cuda_api import pretend_device

    names: dict[str, Any] = {}
    with pretend_device():
        exec(source, names)
    return {"found": names["found"]}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Compress on the pretend device; return the fields of a `DeviceReport`."""
    from lillama_core import load_recipe
    from lillama_core.output import directory
    from lillama_core.output.record import RunRecord
    from lillama_core.pipeline import Request, compress
    from pretend_cuda.cuda_api import pretend_device
    from pretend_cuda.device import LEDGER

    if job["bug"] is not None:
        make_mistake(**job["bug"])
    timed = RunRecord.timed

    @contextlib.contextmanager
    def counted(self: RunRecord, name: str) -> Iterator[None]:
        with LEDGER.phase(name), timed(self, name):
            yield

    RunRecord.timed = counted  # type: ignore[method-assign]
    # Half of the time of such a run, and nothing on the device: a fresh process that loads the result, and plots.
    for name in ("check_reload", "write_report"):
        setattr(directory, name, lambda *args, **kwargs: None)
    options = dict(job["options"])
    recipe = load_recipe(options.pop("recipe", "default")).with_options(options)
    request = Request(
        job["model"],
        Path(job["output"]),
        recipe,
        device=job["device"],
        overwrite=not job["resume"],
        resume=job["resume"],
        stream=job["stream"],
    )
    started = time.monotonic()
    with pretend_device() if job["device"] != "cpu" else contextlib.nullcontext():
        record = compress(request, "quiet")
    copies = [(f"{way} {line}", way, n) for (way, line), n in LEDGER.copies.most_common()]
    return {
        "synchronisations": dict(LEDGER.synchronisations.most_common()),
        "synchronisations_by_phase": dict(LEDGER.by_phase),
        "copied_to_device": sum(n for _, way, n in copies if way == "to device"),
        "copied_to_host": sum(n for _, way, n in copies if way == "to host"),
        "copies": {name: n for name, _, n in copies},
        "peak_bytes": LEDGER.peak,
        "peak_by_phase": LEDGER.peak_by_phase,
        "seconds": round(time.monotonic() - started, 3),
        "record": record.to_dict(),
    }


def make_mistake(function: str, right: str, wrong: str) -> None:
    """Change the code of a function, wherever it was imported to; raises ValueError when ``right`` is not in it."""
    module_name, _, qualified = function.partition(":")
    module = importlib.import_module(module_name)
    found: Any = module
    for name in qualified.split("."):
        found = inspect.getattr_static(found, name)
    source = textwrap.dedent(inspect.getsource(found))
    if source.count(right) != 1:
        raise ValueError(f"a seeded bug is out of date: {right!r} does not occur once in {function}")
    names: dict[str, Any] = {}
    # Where it stands, so that lines are counted as those of the file.
    code = compile("from __future__ import annotations\n" + source.replace(right, wrong), module.__file__ or "", "exec")
    exec(code, vars(module) | {"__name__": module_name}, names)
    found.__code__ = names[found.__name__].__code__


if __name__ == "__main__":
    main(*sys.argv[1:])
