"""``python -m lillama_core``: the command line."""

import sys

from lillama_core.cli.main import main

sys.exit(main())
