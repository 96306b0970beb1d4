"""Times text-to-video: baseline, optimised, and diffusers on the same weights. See `--help`."""

from __future__ import annotations

import sys

from wan.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
