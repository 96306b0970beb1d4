"""What a command line may ask for in place of a video. Nothing is loaded for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan.cli.report import Terminal
    from wan.engine.plan import Optimization


def answered(args: argparse.Namespace, registry: Sequence[type[Optimization]], terminal: Terminal, preset: str) -> bool:
    """True when `args` asked for something else, which is done and printed. Raises WanError."""
    if args.clear_compile_cache or args.dry_run:
        from wan.cli.caches import clear_compiled

        print("\n".join(clear_compiled(args)))
        return True
    if args.find_max is not None:
        from wan.cli.find_max import find_max

        print(find_max(args, registry, terminal, args.preset or preset))
        return True
    return False
