"""A pretend CUDA device: a run that needs no GPU shows whether it would work on one, and what it would wait for.

Tensors on it say ``cuda:0`` and are computed by the CPU. What mixes devices fails as on a GPU; synchronisations and
copies are counted by the line of lillama that asks for them, and live bytes are those of all tensors on the device.

    report = run_on_pretend_device(folder, {"recipe": "fast", "calibration": [str(text)], "steps": 2})
    report.synchronisations, report.copied_to_host, report.peak_by_phase

It is no GPU: there are no kernels of its own, no streams and no caching allocator, workspaces inside an operation are
not seen, and numbers are the CPU's. It works where g++ and a torch without CUDA are: see `reason_to_skip`.
"""

from pretend_cuda.build import reason_to_skip
from pretend_cuda.run import (
    DeviceReport,
    PerBlock,
    PretendRunError,
    SeededBug,
    execute_on_pretend_device,
    per_block,
    run_on_pretend_device,
)

__all__ = [
    "DeviceReport",
    "PerBlock",
    "PretendRunError",
    "SeededBug",
    "execute_on_pretend_device",
    "per_block",
    "reason_to_skip",
    "run_on_pretend_device",
]
