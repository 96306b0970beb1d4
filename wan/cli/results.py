"""The results of a queue: a line of JSON when a job begins and one when it ends, so that it can be started again.

The file is only ever added to, and every line is on the disk before the next job begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan.engine.errors import BadRequest

STARTED, DONE, FAILED, INTERRUPTED = "started", "done", "failed", "interrupted"


def default_path(prompt_file: Path) -> Path:
    """Beside the prompts: prompts.txt has prompts.results.jsonl."""
    return prompt_file.with_name(f"{prompt_file.stem}.results.jsonl")


class Results:
    """The rows of a file, those of earlier runs too. A row has "key" (what was asked for), "index" and "status"."""

    def __init__(self, path: Path) -> None:
        """Raises BadRequest where the file is something else, or cannot be read."""
        self.path = path
        self._rows: list[dict[str, Any]] = []
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise BadRequest(f"--results {str(path)!r} cannot be read: {error.strerror}; choose another") from error
        self._torn = bool(content) and not content.endswith(b"\n")
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:  # a process was killed while it wrote
                continue
            if not isinstance(row, dict) or not {"key", "index", "status"} <= row.keys():
                raise BadRequest(
                    f"--results {str(path)!r}, line {number}: this is no result of a queue; choose another file"
                )
            self._rows.append(row)

    def begin(self) -> None:
        """Make sure that lines can be added. Raises BadRequest."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise BadRequest(
                f"--results {str(self.path)!r} cannot be written: {error.strerror}; choose another"
            ) from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OSError."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self.path.open("ab") as file:
            file.write(b"\n" * self._torn + line)
            self._torn = False
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(dict(row))

    def drawn_seed(self) -> int | None:
        """The seed that was drawn when the queue was first started without one."""
        seeds = [row["drawn_seed"] for row in self._rows if isinstance(row.get("drawn_seed"), int)]
        return seeds[-1] if seeds else None

    def before(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """What became of each job of the queue with these keys: its last row, None where it was never begun.

        Jobs may have moved in the file since: then the one with the same key counts, once.
        """
        last = {(str(row["key"]), row["index"]): row for row in self._rows}
        found = [last.pop((key, index), None) for index, key in enumerate(keys)]
        for index, key in enumerate(keys):
            if found[index] is None:
                moved = [place for place in last if place[0] == key]
                moved.sort(key=lambda place: last[place]["status"] != DONE)
                found[index] = last.pop(moved[0]) if moved else None
        return found
