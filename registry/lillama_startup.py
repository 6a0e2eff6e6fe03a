"""Let transformers read compressed models in programs that import nothing of lillama: pipelines, lm-eval, servers.

``lillama.pth``, installed beside the packages, has Python import this module whenever it starts, so it does next to
nothing: a finder waits for the one module of transformers that holds the table of quantization methods, and imports
`lillama_core` then, whose own finder sees to the rest.
"""

from __future__ import annotations

import sys

# As `typing` has it, which would cost a start of Python ten times what this module does.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLE = "transformers.quantizers.auto"


class StartupFinder:
    """Finds nothing by itself."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Where lillama is in use already, its finder is there.
        if name != TABLE or "lillama_core" in sys.modules:
            return None
        try:
            import lillama_core.transformers_hook as hook
        except Exception as error:
            import warnings

            # Whoever imports transformers for something else must be able to.
            warnings.warn(f"transformers cannot load models compressed by lillama: {error!r}", stacklevel=2)
            return None
        return hook.find_spec(name, path, target)


sys.meta_path.insert(0, StartupFinder)
