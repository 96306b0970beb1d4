"""Make a video: `python generate.py --task t2v-demo --prompt "..."`; `--help` lists the flags."""

import sys

from wan.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
