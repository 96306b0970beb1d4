"""Results that are on the disk as soon as they are there: a measurement that is interrupted has lost nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wan.runs import write_whole


def write(path: Path, data: Any) -> None:
    """`data` as JSON, whole or as it was before: never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
