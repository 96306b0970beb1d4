"""Large files over an unsteady line: several at once, each continued where it stopped, each checked by its hash.

The hub's client resumes within one call but throws an unfinished file away when it gives up or is interrupted. For
weights of ten gigabytes that is hours, so its transfer runs here into a file that stays beside the finished one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from wan.cli.report import clock_time

RETRY_WAITS_S = (2.0, 5.0, 15.0, 30.0, 60.0)
"""Pauses after the client itself has given up five times; from the start again whenever more has come."""

WORKERS = 4

# What a lost connection loses, and how long Ctrl-C may take: the client's own 10 MiB are a minute of a slow line.
CHUNK_BYTES = 1 << 20

_LOG = logging.getLogger("wan.cli.transfer")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file to fetch. While it is incomplete it is called `part`."""

    url: str
    size: int
    sha256: str
    target: Path

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def have(self) -> int:
        """Bytes on disk, of `size`."""
        if self.target.exists():
            return self.size
        return min(self.part.stat().st_size, self.size) if self.part.exists() else 0


class Stopped(Exception):
    """The user interrupted, or another file failed."""


def transfer(
    items: Sequence[Item], label: str, headers: Mapping[str, str], *, waits_s: Sequence[float] = RETRY_WAITS_S
) -> None:
    """Fetch all `items`. Whatever ends it early, the bytes that came stay on disk and the next call continues."""
    stop = threading.Event()
    meter = Meter(label, lambda: sum(item.have for item in items), sum(item.size for item in items))
    with _chunks_of(CHUNK_BYTES), ThreadPoolExecutor(WORKERS) as pool:
        try:
            open_ones = {pool.submit(_fetch, item, dict(headers), stop, waits_s) for item in items}
            while open_ones:
                done, open_ones = wait(open_ones, timeout=0.5, return_when="FIRST_COMPLETED")
                meter.show()
                for future in done:
                    future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            meter.close()


def transport_errors() -> tuple[type[Exception], ...]:
    """What the client raises for a lost connection, a refusal of the server, or a full disk."""
    from huggingface_hub.utils import httpx

    return (OSError, httpx.HTTPError)


def _fetch(item: Item, headers: dict[str, str], stop: threading.Event, waits_s: Sequence[float]) -> None:
    waits = iter(waits_s)
    while not item.target.exists():
        before = item.have
        try:
            _attempt(item, headers, stop)
        except transport_errors() as error:
            if item.have > before:
                waits = iter(waits_s)
            pause = next(waits, None) if _may_pass(error) else None
            if pause is None:
                raise
            _LOG.info("the connection was lost (%s); trying again in %g s", type(error).__name__, pause)
            if stop.wait(pause):
                raise Stopped from error


def _attempt(item: Item, headers: dict[str, str], stop: threading.Event) -> None:
    """Continue the part, and give it its name when it is what the hub says it is."""
    from huggingface_hub.file_download import http_get

    item.part.parent.mkdir(parents=True, exist_ok=True)
    if item.part.exists() and item.part.stat().st_size > item.size:
        item.part.unlink()
    with item.part.open("ab") as file:
        # The address of the hub itself, not of the storage it redirects to: that one expires within the hour.
        http_get(
            item.url, file, resume_size=item.have, headers=headers, expected_size=item.size,
            displayed_filename=item.target.name, tqdm_class=lambda **unused: _StopBar(stop),
        )  # fmt: skip
    if _sha256(item.part, stop) != item.sha256:
        item.part.unlink()
        raise OSError("a file arrived damaged: its SHA-256 is not the one the hub names")
    os.replace(item.part, item.target)


def _may_pass(error: Exception) -> bool:
    """True for what a later attempt may not meet again: a lost connection, a busy server; no refusal, no full disk."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return not isinstance(error, OSError) or error.errno is None


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            if stop.is_set():
                raise Stopped
            digest.update(block)
    return digest.hexdigest()


class _StopBar:
    """What the client takes for its progress bar: leaves the transfer at the next chunk after `stop`."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def update(self, count: float | None = 1) -> None:
        if self._stop.is_set():
            raise Stopped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is drawn, so nothing ends."""


@contextmanager
def _chunks_of(size: int) -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = size
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


class Meter:
    """How much has come, how fast, how long still: one line redrawn on a terminal, one note per tenth in a log."""

    def __init__(
        self,
        label: str,
        have: Callable[[], int],
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._have, self._total = label, have, total
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start, self._since = have(), clock()
        self._tenth = self._start * 10 // max(total, 1)
        self._drawn = False

    def show(self) -> None:
        have = self._have()
        tenth = have * 10 // max(self._total, 1)
        if self._stream.isatty():
            self._stream.write(f"\r{self.text(have):<90}")
            self._stream.flush()
            self._drawn = True
        elif tenth > self._tenth:
            _LOG.info("%s", self.text(have))
        self._tenth = tenth

    def text(self, have: int) -> str:
        """`name: 12.6 of 126.2 GB (9 %), 55.1 MB/s, 34:22 left`."""
        speed = (have - self._start) / max(self._clock() - self._since, 1e-3)
        left = f", {clock_time((self._total - have) / speed)} left" if speed > 0 and have < self._total else ""
        percent = have * 100 // max(self._total, 1)
        return f"{self._label}: {of_gb(have, self._total)} ({percent} %), {speed / 1e6:.1f} MB/s{left}"

    def close(self) -> None:
        """Leave the line that was redrawn."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()


def gb(size: int) -> str:
    """Bytes as the hub's pages show them: decimal, `9.8 GB` or `512 MB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def of_gb(have: int, total: int) -> str:
    """`12.6 of 126.2 GB`: both in the unit of the second."""
    text, _, unit = gb(total).partition(" ")
    return f"{have / (total or 1) * float(text):.1f} of {text} {unit}"
