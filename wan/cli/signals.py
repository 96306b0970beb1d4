"""What ends the program from outside leaves it the time to keep what it has.

SIGTERM (a scheduler, `kill`, a machine going down) and SIGHUP (the terminal has gone) act like Ctrl-C. While something
is tidied up, or a finished video gets its name, further signals change nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from wan.engine.errors import WanError

if TYPE_CHECKING:
    from wan.cli.report import Terminal

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """Ended by another signal than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def exit_status(act: Callable[[], int], terminal: Terminal) -> int:
    """What a program ends with: what `act` returns, or that of what it raises, which is told in a line."""
    try:
        return act()
    except WanError as error:
        terminal.failed(str(error))
        return error.exit_code
    except Stopped as stop:
        terminal.line(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        terminal.line("interrupted")
        return INTERRUPTED
    except SystemExit as leaving:  # --help
        return int(leaving.code or 0)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, the signals that end a process raise `Stopped`; those that somebody ignores (nohup) stay ignored."""
    with _handled([each for each in _ENDING if signal.getsignal(each) is signal.SIG_DFL], _stop):
        yield


@contextmanager
def held(*, answer: bool) -> Iterator[None]:
    """Within, no signal stops the program. The last one that came is answered at the end, or forgotten."""
    came: list[int] = []
    answering = {each: signal.getsignal(each) for each in (signal.SIGINT, *_ENDING)}
    ours = [each for each, handler in answering.items() if callable(handler)]
    with _handled(ours, lambda number, frame: came.append(number)):
        yield
    if came and answer:
        handler: Any = answering[signal.Signals(came[-1])]
        handler(came[-1], None)


@contextmanager
def _handled(signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Signals reach the main thread alone, and only it may say what they do."""
    here = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, handler) for each in (signals if here else ())}
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
