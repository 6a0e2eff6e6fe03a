"""``python -m lillama_benchmarks.zoo [NAME...]``: list the zoo, or make the named models and say where they are."""

from __future__ import annotations

import sys

from lillama_benchmarks.zoo import fetch, models
from lillama_core.errors import LillamaError


def main(names: list[str]) -> int:
    """Print the list, or a line ``name<TAB>folder`` for each name. Returns the exit status."""
    if not names:
        for model in models():
            megabytes = f"{model.size / 1e6:5.0f} MB"
            print(f"{model.name:20} {model.architecture:13} {megabytes}  {model.licence:13} {model.source}")
        return 0
    try:
        for name in names:
            print(f"{name}\t{fetch(name)}", flush=True)
    except LillamaError as error:
        print(f"zoo: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
