"""Workers that need no process: one that computes here, and one that says what a test wants to hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan.cli.benchmarking.ceilings import Ceilings
from wan.cli.benchmarking.trial import Order, Ready, Seen, Setting, Trial, Variant
from wan.engine.errors import WanError

Start = Callable[[Variant, Sequence[str], Setting], Any]


def make_trial(seconds: float, *, level: float = 1.0, seen: Seen | None = None) -> Trial:
    """A run whose stages are a tenth, eight tenths and a tenth; latents are all `level`."""
    stages = {"text": 0.1 * seconds, "denoise": 0.8 * seconds, "decode": 0.1 * seconds}
    return Trial(
        seconds=seconds, stages=stages, components={f"{name} net": took for name, took in stages.items()},
        peaks={"host": 2**30}, latents=np.full((1, 2, 2, 2, 2), level), forwards=4, seen=seen, missing="no card here",
    )  # fmt: skip


class Scripted:
    """Says `Ready`, then a trial for every order; a WanError in `says` is said in place of a run."""

    def __init__(self, name: str, says: Sequence[float | WanError], log: list[str]) -> None:
        self.name, self.says, self.log = name, list(says), log
        ceilings = Ceilings(dtype="float32", matmul_tflops=0.5, copy_gb_s=8.0)
        machine = {"device": {"type": "cpu"}, "versions": {"torch": torch.__version__}}
        self.answers: list[Any] = [
            Ready(plan="plain", hardware="CPU (1 threads)", versions={"torch": "2"}, machine=machine, ceilings=ceilings)
        ]

    def send(self, order: Order | None) -> None:
        if order is None:
            return
        self.log.append(self.name)
        word = self.says.pop(0)
        if isinstance(word, WanError):
            self.answers.append(word)
            return
        if order.keep is not None:
            np.save(order.keep, np.full((3, 16, 16, 3), 108, np.uint8))
        texts = {"cond": np.ones((2, 3)), "uncond": np.ones((1, 3))}
        velocity = np.full((1, 2, 2, 2, 2), 1.0 if self.name == "baseline" else 1.25)
        seen = Seen(flop=10**9, parts={"ffn": 0.1}, texts=texts, velocity=velocity) if order.watch else None
        self.answers.append(make_trial(word, seen=seen))

    def recv(self) -> Any:
        return self.answers.pop(0)


@pytest.fixture
def scripted() -> Callable[..., tuple[Start, list[str]]]:
    """`scripted(baseline=[1.0, ...], ...)`: a starter of such workers, and the list of who ran in which order."""

    def make(**says: Sequence[float | WanError]) -> tuple[Start, list[str]]:
        log: list[str] = []

        @contextmanager
        def start(variant: Variant, words: Sequence[str], setting: Setting) -> Iterator[Scripted]:
            yield Scripted(variant.name, says[variant.name], log)

        return start, log

    return make


@contextmanager
def in_process(variant: Variant, words: Sequence[str], setting: Setting) -> Iterator[Any]:
    """The real thing without the process."""
    from wan.cli.benchmarking.worker import build, obeyed

    runner, ready, _ = build(variant, words, setting)
    answers: list[Any] = [ready]

    class Line:
        def send(self, order: Order) -> None:
            try:
                answers.append(obeyed(runner, order))
            except WanError as error:
                answers.append(error)

        def recv(self) -> Any:
            return answers.pop(0)

    yield Line()


@pytest.fixture
def here() -> Start:
    return in_process


@pytest.fixture
def matrix_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a matrix and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
