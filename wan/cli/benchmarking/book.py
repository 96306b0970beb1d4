"""The results of a benchmark on the disk: JSON with everything, CSV and a page to look at, written after every cell.

A run that is cut off loses the cell at work; `--resume` goes on behind the ones that are written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan.cli.benchmarking.page import page
from wan.cli.benchmarking.processes import Outcome
from wan.cli.benchmarking.rows import Row
from wan.engine.errors import BadRequest, OutputError
from wan.runs import write_whole

FORMAT = 1
THUMBNAIL = 320
"""Width in pixels of a frame in the report."""


@dataclass
class Book:
    """Rows and what they share. `head` says what was run, on what, from which commit."""

    path: Path
    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """The three files, the one for programs first."""
        return [self.path, self.path.with_suffix(".csv"), self.path.with_suffix(".html")]

    def done(self, key: str, variants: int) -> bool:
        """Whether the cell with this key is written, be its rows good or failed."""
        return sum(row["key"] == key for row in self.rows) == variants

    def add(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
        """A cell is over: keep a strip of each variant's frames and write everything. Raises OutputError."""
        folder = self.path.with_name(f"{self.path.stem}_pictures")
        try:
            for row, outcome in zip(rows, outcomes, strict=True):
                row["picture"] = "" if outcome.frames is None else _strip(outcome.frames, folder, len(self.rows))
                self.rows.append(row)
            self.save()
        except OSError as error:
            raise OutputError(f"--output_dir: {str(self.path)!r} cannot be written: {error.strerror}") from error

    def save(self) -> None:
        """Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        json_path, csv_path, page_path = self.files
        content = {**self.head, "rows": self.rows}
        write_whole(json_path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        write_whole(csv_path, _csv(self.rows).encode())
        write_whole(page_path, page(self.head, self.rows, self.path.parent).encode())


def read_book(path: Path, flag: str) -> Book:
    """A results file, also one of before there was a head. Raises BadRequest."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{flag} {str(path)!r} cannot be read ({error}); name a results file (.json)") from error
    head = content if isinstance(content, dict) else {"format": 0, "rows": content}
    rows = head.pop("rows", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "variant" in row for row in rows):
        raise BadRequest(f"{flag} {str(path)!r} is no results file of benchmark_t2v.py; name another")
    if head.get("format", 0) > FORMAT:
        raise BadRequest(f"{flag} {str(path)!r} has format {head['format']}; this version reads {FORMAT}: update it")
    return Book(path, head, rows)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _flat(value) for name, value in row.items()})
    return text.getvalue()


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


def _strip(frames: Path, folder: Path, number: int) -> str:
    """First, middle and last of the frames in a file beside each other, as a picture; its path beside the results."""
    import numpy as np
    from PIL import Image

    video = np.load(frames, mmap_mode="r")
    chosen = [video[index] for index in dict.fromkeys((0, len(video) // 2, len(video) - 1))]
    picture = Image.fromarray(np.concatenate(chosen, axis=1))
    width = min(THUMBNAIL * len(chosen), picture.width)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:03}.png"
    picture.resize((width, round(picture.height * width / picture.width))).save(path)
    return f"{folder.name}/{path.name}"
