"""`generate.py` with `--preset auto` as its default: the same flags, with what speeds up this machine switched on.

Some flags may come from environment variables: docs/presets.md lists them.
"""

import sys

from wan.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(default_preset="auto", variables=True))
