"""The C++ part of the pretend device: compiled when it is needed, and why it may not be."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def reason_to_skip() -> str | None:
    """Say why there can be no pretend device on this machine; None: there can be."""
    if sys.platform != "linux":
        return "the pretend device is built and forked as Linux does it"
    if shutil.which("g++") is None:
        return "no g++ to build the pretend device with"
    if not (torch_folder() / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").is_file():
        return "this torch comes without its C++ headers"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return f"torch {metadata.version('torch')} is built with CUDA, which answers for the device itself"
    return None


def torch_folder() -> Path:
    """Return the folder of torch, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def build_guard(folder: Path) -> Path:
    """Compile ``guard.cpp`` into ``folder`` (some 3 s) and return the library, to be loaded before torch.

    Raises RuntimeError with what the compiler says where it fails.
    """
    library, headers, libraries = folder / "guard.so", torch_folder() / "include", torch_folder() / "lib"
    # Warnings would be of torch's headers. The oldest supported torch, 2.6, wants C++17.
    command = [
        *("g++", "-O0", "-w", "-shared", "-fPIC", "-std=c++17", str(SOURCE), "-o", str(library)),
        *(f"-I{headers}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the pretend device does not compile:\n{done.stderr}")
    return library
