"""``lillama`` and ``python -m lillama_core``: the command line."""

import sys


def run() -> int:
    """Run the command line; Ctrl-C is one line while its modules are still being imported, too."""
    try:
        from lillama_core.cli.main import main

        return main()
    except KeyboardInterrupt:
        print("lillama: error: interrupted", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(run())
