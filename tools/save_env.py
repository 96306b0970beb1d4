"""Says what this machine and installation are, for a report: devices, driver, versions, settings, attention backends.

    python tools/save_env.py --out environment.json

Prints text; --out writes the same as JSON. Needs no GPU. Holds no names, tokens or prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.cli import env, environment  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="save_env.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    env.prepare()
    found = environment.collect()
    print(environment.text(found))
    if args.out is not None:
        try:
            args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: --out {str(args.out)!r} cannot be written ({error.strerror})", file=sys.stderr)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
