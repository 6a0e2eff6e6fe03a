"""Processes that start at once: each is forked from one process that has loaded the libraries and done nothing else.

A fresh process loads torch and transformers for three to five seconds, more than most tests need for all else, and
every compression starts one to load its result again. Those of `ENTRIES` are forked instead: they have their own
memory, environment, arguments and end, and know nothing of the process that asked for them. What a process loads, and
from where, is tested by those that are started as a user starts them: ``run_process(..., fresh=True)``.

What an export is checked by, without lillama, is forked from a second process that has never seen lillama.

    python -m warm SOCKET [plain]

serves until its standard input ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

ENTRIES = {
    "lillama_core": "lillama_core.cli.main",
    "lillama_core.output.verify": "lillama_core.output.verify",
}
"""What ``-m`` names -> the module whose ``main`` it calls."""
ADDRESS = {False: "LILLAMA_TEST_WARM", True: "LILLAMA_TEST_WARM_PLAIN"}
"""The variables that tell a forked process where to ask for others: with lillama, and plain ones without it."""
STARTERS = ("lillama_core.output.directory", "lillama_benchmarks.cells")
"""Modules of lillama that start processes of `ENTRIES`."""
PLAIN_STARTER = "lillama_core.exporting.fresh"
"""The one that starts those that must not have lillama."""
POLL_SECONDS = 0.01
PYTHON = sys.executable
"""Taken now: a test may name another program for lillama to start."""


READ_EARLY = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE")
"""Variables that libraries read when they are loaded: a process that has other values is a fresh one."""


def read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in READ_EARLY if name in environment}


LOADED_WITH = read_early({**os.environ, "HF_HUB_OFFLINE": "1"})
"""Those that the server's libraries have read."""


def served(
    command: Any, environment: Mapping[str, str] | None = None, plain: bool = False
) -> tuple[str, list[str]] | None:
    """The module and the arguments of a command that can be forked; None: start it as it is."""
    if sys.platform != "linux" or not isinstance(command, list) or command[:1] != [PYTHON]:
        return None
    early, loaded = read_early(os.environ if environment is None else environment), dict(LOADED_WITH)
    if plain:
        # It is told, see `become`.
        for read in (early, loaded):
            read.pop("HF_MODULES_CACHE", None)
    if early != loaded:
        return None
    words = [str(word) for word in command[1:] if word != "-P"]
    if words[:1] == ["-c"]:
        return words[0], words[1:]
    return (words[1], words[2:]) if len(words) > 1 and words[0] == "-m" and words[1] in ENTRIES else None


class Process:
    """A forked process, as far as lillama and its tests use `subprocess.Popen`."""

    def __init__(
        self,
        args: list[str],
        stdin: int | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        text: bool = True,
        file_bytes: int | None = None,
        plain: bool = False,
    ) -> None:
        """``file_bytes``: how large a file it may write; by itself it may as much as this process.

        ``plain``: one that has not loaded lillama.
        """
        found = served(args, env, plain)
        assert found is not None, args
        assert stdin in (None, subprocess.DEVNULL)
        assert text
        self.args = args
        self.returncode: int | None = None
        # Files, and no pipes: they are never full.
        self._said = [
            tempfile.TemporaryFile() if out == subprocess.PIPE else None  # noqa: SIM115  read after the end
            for out in (stdout, stderr)
        ]
        address = _address(plain)
        order = {
            "module": found[0],
            "arguments": found[1],
            "environment": dict(os.environ if env is None else env) | _known_addresses(),
            "folder": str(Path.cwd() if cwd is None else cwd),
            "file_bytes": resource.getrlimit(resource.RLIMIT_FSIZE)[0] if file_bytes is None else file_bytes,
        }
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(address)
        with open(os.devnull) as nothing:
            files = [own or out for own, out in zip(self._said, (stdout, stderr), strict=True)]
            fds = [nothing.fileno(), *(n if out is None else out.fileno() for n, out in enumerate(files, 1))]  # type: ignore[union-attr]
            text_ = json.dumps(order).encode()
            socket.send_fds(self._line, [len(text_).to_bytes(4, "big")], fds)
            self._line.sendall(text_)
        self.pid = self._answer()
        self._line.setblocking(False)

    def _answer(self) -> int:
        """The number in the server's next line, and nothing of what comes after it."""
        text = b""
        while not text.endswith(b"\n"):
            if not (more := self._line.recv(1)):
                raise RuntimeError(f"nobody knows how {self.args} ended")
            text += more
        return int(text)

    def poll(self) -> int | None:
        """The exit status, once there is one."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                # A line is written at once.
                self.returncode = self._answer()
                self._line.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(POLL_SECONDS)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Wait; what it wrote, where that was piped."""
        self.wait(timeout)
        found = []
        for file in self._said:
            if file is not None:
                file.seek(0)
            found.append(None if file is None else file.read().decode())
            if file is not None:
                file.close()
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: list[str], plain: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` for what can be forked, and itself for what cannot."""
    if served(command, options.get("env"), plain) is None:
        if (size := options.pop("file_bytes", None)) is not None:
            options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return subprocess.run(command, **options)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    timeout, check = options.pop("timeout", None), options.pop("check", False)
    process = Process(command, plain=plain, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    done = subprocess.CompletedProcess(command, process.wait(), stdout, stderr)
    if check:
        done.check_returncode()
    return done


def start(command: list[str], **options: Any) -> Any:
    """`subprocess.Popen`, likewise."""
    return (
        subprocess.Popen(command, **options)
        if served(command, options.get("env")) is None
        else Process(command, **options)
    )


class Forking(ModuleType):
    """Stands for the module ``subprocess`` where lillama starts processes."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__("subprocess")
        self.run, self.Popen = functools.partial(run, plain=plain), start

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def fork_from_now_on() -> None:
    """Have lillama fork what it starts in this process."""
    for name in STARTERS:
        module: Any = importlib.import_module(name)
        module.subprocess = Forking()
    starter: Any = importlib.import_module(PLAIN_STARTER)
    starter.subprocess = Forking(plain=True)


def _known_addresses() -> dict[str, str]:
    """What a forked process is told: where the servers are that there are already."""
    return {
        name: address for plain, name in ADDRESS.items() if (address := _started.get(plain) or os.environ.get(name))
    }


_started: dict[bool, str] = {}


def _address(plain: bool = False) -> str:
    """Where the server listens; it is started when nobody has yet."""
    if found := _known_addresses().get(ADDRESS[plain]):
        return found
    folder = tempfile.mkdtemp(prefix="lillama-warm-", dir="/tmp")
    address = f"{folder}/socket"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # Whatever the first test that needs it has changed.
    env = {name: value for name, value in os.environ.items() if name not in read_early(os.environ)} | LOADED_WITH
    env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "PYTHONPATH": path}
    command = [PYTHON, "-P", "-m", "warm", address, *(["plain"] if plain else [])]
    pipe = subprocess.PIPE
    # A session of its own: whoever interrupts the tests waits for what they started.
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)

    @atexit.register
    def end() -> None:
        assert server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        server.wait(timeout=60)
        Path(address).unlink(missing_ok=True)
        Path(folder).rmdir()

    assert server.stdout is not None
    if not server.stdout.readline():
        raise RuntimeError(f"the server of warm processes ended with status {server.wait()}")
    _started[plain] = address
    return address


# The server


def serve(address: str, plain: bool) -> tuple[str, list[str]]:
    """Fork a process for each order that comes. Returns only in these, with the module and the arguments to run."""
    import select

    known = list(sys.path)
    import_libraries() if plain else import_all()
    # Nothing of it is collected, looked at, or copied for that in a child.
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, socket.socket]] = {}
    """What becomes readable when a process ends -> its number, and who is told."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(16)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listening, 0, *running], [], [])
            for ended in running.keys() & set(ready):
                tell(*running.pop(ended))
                os.close(ended)
            if 0 in ready:
                os._exit(0)
            if listening not in ready:
                continue
            line, _ = listening.accept()
            length, fds, _, _ = socket.recv_fds(line, 4, 3)
            wanted, text = int.from_bytes(length, "big"), b""
            while len(text) < wanted and (more := line.recv(wanted - len(text))):
                text += more
            if len(text) < wanted or not wanted:
                # Whoever asked has ended.
                line.close()
                continue
            order = json.loads(text)
            child = os.fork()
            if child == 0:
                for ended, (_, other) in running.items():
                    os.close(ended)
                    other.close()
                listening.close()
                line.close()
                become(order, fds, known)
                if plain:
                    tell_transformers(os.environ.get("HF_MODULES_CACHE"))
                else:
                    use_own_plugins(order, known)
                    fork_from_now_on()
                return order["module"], order["arguments"]
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(OSError):
                line.sendall(f"{child}\n".encode())
            running[os.pidfd_open(child)] = child, line


def tell(child: int, line: socket.socket) -> None:
    """Say how a process has ended."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        line.sendall(f"{status}\n".encode())
    line.close()


def become(order: Mapping[str, Any], fds: Sequence[int], known: list[str]) -> None:
    """Make this process look like a fresh one that was started for ``order``."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["folder"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["module"], *order["arguments"][order["module"] == "-c" :]]
    here = str(Path(__file__).parent)
    added = added_paths(order)
    sys.path[:] = [*added, *(path for path in known if path not in ("", here, *added))]
    importlib.invalidate_caches()
    import torch

    torch.set_num_threads(int(order["environment"].get("OMP_NUM_THREADS", torch.get_num_threads())))


def added_paths(order: Mapping[str, Any]) -> list[str]:
    return [path for path in order["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]


def use_own_plugins(order: Mapping[str, Any], known: list[str]) -> None:
    """Look for plugins anew where the process of ``order`` may have others than the server."""
    import lillama_registry

    if order["environment"].get("LILLAMA_PLUGINS") != SERVED_PLUGINS or set(added_paths(order)) - set(known):
        lillama_registry.registry.cache_clear()


SERVED_PLUGINS = os.environ.get("LILLAMA_PLUGINS")
"""As it was when this module was loaded, in the server."""


def tell_transformers(modules: str | None) -> None:
    """Where code that comes with models is copied to, which transformers has read when it was loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers") and modules and "HF_MODULES_CACHE" in vars(module):
            module.HF_MODULES_CACHE = modules  # type: ignore[attr-defined]


def import_libraries() -> None:
    """Import what a model is loaded by where there is no lillama."""
    # What an installation has Python load when it starts would import lillama with transformers.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "") != "lillama_startup"]
    sys.modules.pop("lillama_startup", None)
    for name in ("torch", "safetensors.torch", "transformers", "transformers.dynamic_module_utils"):
        importlib.import_module(name)
    prepare_transformers()
    assert not [name for name in sys.modules if name.startswith("lillama")]


def import_all() -> None:
    """Import what commands and compressions need, so that no child has to."""
    names = (
        *("torch", "scipy.linalg", "jinja2", "matplotlib.backends.backend_svg", "matplotlib.figure"),
        # Not the commands: what they offer depends on a process's plugins when they are imported.
        *("lillama_core.api", "lillama_core.pipeline"),
        *("lillama_benchmarks.command", "lillama_benchmarks.engines.in_turns", "lillama_testing"),
        *(
            "lillama_core.evaluation.metrics.perplexity",
            "lillama_core.output.report",
            *ENTRIES.values(),
            *STARTERS,
            PLAIN_STARTER,
        ),
    )
    for name in names:
        importlib.import_module(name)
    if importlib.util.find_spec("lm_eval") is not None:
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface"):
            importlib.import_module(name)
    import lillama_registry

    lillama_registry.registry()
    prepare_transformers()


def prepare_transformers() -> None:
    import transformers

    # A table of a thousand regular expressions, made when the first model is loaded.
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    classes = ("AutoModelForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast", "GenerationMixin")
    for name in classes:
        getattr(transformers, name)


def main() -> None:
    module, arguments = serve(sys.argv[1], sys.argv[2:] == ["plain"])
    if module == "-c":
        sys.modules["__main__"] = ModuleType("__main__")
        exec(arguments[0], vars(sys.modules["__main__"]))
        end(0)
    entry = importlib.import_module(ENTRIES[module]).main
    end(entry() if module == "lillama_core" else entry(*arguments))


def end(status: int) -> NoReturn:
    """End this process as the interpreter does, but for taking apart all that was loaded, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Of a pipe that nobody reads any more the command has said what there is to say.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
