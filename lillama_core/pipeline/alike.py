"""Whether the processes of a job were all started to do the same."""

from __future__ import annotations

from typing import Any

from lillama_core.errors import UserError
from lillama_core.output.run_directory import differences
from lillama_core.system.processes import World


def check_alike(world: World, fingerprint: dict[str, Any]) -> None:
    """Raise UserError when the processes of a job were not started to do the same, naming how the first differs."""
    first, *others = world.gather(fingerprint)
    for rank, other in enumerate(others, start=1):
        if found := differences(first, other):
            raise UserError(f"process {rank} differs from process 0 in {', '.join(found)}; start all of them alike")
