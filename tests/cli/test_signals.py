"""What ends the program is answered once what must not be torn is whole. The fault matrix sends real ones to runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from wan.cli.signals import Stopped, held, stoppable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers are the ones of before; and the code under test restores them itself."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    after = {each: signal.getsignal(each) for each in before}
    for each, handler in before.items():
        signal.signal(each, handler)
    assert after == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_ends_a_process_is_raised_like_ctrl_c(number: signal.Signals, status: int) -> None:
    with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name}") as caught, stoppable():
        os.kill(os.getpid(), number)
    assert isinstance(caught.value, Stopped) and caught.value.exit_code == status


def test_signal_somebody_ignores_stays_ignored() -> None:
    """As `nohup` does with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
        with held(answer=True):
            os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_held_signal_is_answered_at_the_end() -> None:
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), stoppable(), held(answer=True):
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(True)
    assert done == [True]


def test_signals_change_nothing_where_they_are_not_answered() -> None:
    with stoppable(), held(answer=False):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)


def test_error_is_not_replaced_by_a_signal() -> None:
    with pytest.raises(OSError, match="disk"), stoppable(), held(answer=True):
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError("disk")


def test_thread_that_may_not_handle_signals_runs_all_the_same() -> None:
    done = []

    def work() -> None:
        with stoppable(), held(answer=True):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
