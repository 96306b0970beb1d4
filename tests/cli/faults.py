"""Faults that can be put into a run of `generate.py`: "PLACE WHAT [always]", such as "step:3 kill".

Places are seams every run passes; what happens there is what a machine or its user does. A fault strikes once, with
"always" whenever its place is passed. PLACE is one of

    stage:NAME      a stage begins, as the log names it, with dashes for spaces
    network:N       the network has answered in step N
    step:N          step N is done
    write:FILE      half of FILE is written
    rename:FILE     FILE is complete and gets its name
    open:N:FILE     FILE is opened to be written for the N-th time
    mkdir:FOLDER    FOLDER is about to be made
    uncounted:N     the forwards of step N are not made
    log             a line is written to standard error
    chunk:N         the VAE is about to return its N-th frames
    frames:N        the encoder is about to get its N-th frames
    verify:N        a file is about to be read back for the N-th time (the trial's is the first)
    restart         an unfinished file is about to be removed
    rmtree          the run's folder is about to be removed
    disk:STAGE      from this stage on (without one: from the start) no space is free
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.engine.types import Step

Act = Callable[[], Any]


def inject(faults: Iterable[str]) -> None:
    """Put them into this process, for good."""
    for fault in faults:
        place, what, *rest = fault.split()
        where, _, which = place.partition(":")
        PLACES[where](which, _once(ACTS[what]) if rest != ["always"] else ACTS[what])


def _once(act: Act) -> Act:
    left = [act]
    return lambda: left.pop()() if left else None


# What happens --------------------------------------------------------------------------------------------------------


def _sends(number: int) -> Act:
    return lambda: os.kill(os.getpid(), number)


def _raises(make: Callable[[], BaseException]) -> Act:
    def act() -> None:
        raise make()

    return act


def _late() -> None:
    """The job has taken an hour longer."""
    from wan.cli.report import Terminal

    spent = Terminal.spent
    Terminal.spent = lambda self: spent(self) + 3600  # type: ignore[method-assign]


ACTS: dict[str, Act] = {
    "kill": _sends(signal.SIGKILL),
    "ctrl-c": _sends(signal.SIGINT),
    "term": _sends(signal.SIGTERM),
    "hangup": _sends(signal.SIGHUP),
    "oom": _raises(lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "ram": _raises(lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")),
    "full": _raises(lambda: OSError(errno.ENOSPC, "No space left on device")),
    "read-only": _raises(lambda: OSError(errno.EROFS, "Read-only file system")),
    "in-use": _raises(lambda: PermissionError(errno.EACCES, "The file is in use by another process")),
    "late": _late,
    "nan": lambda: float("nan"),
    "bug": lambda: None,
}


# Where ---------------------------------------------------------------------------------------------------------------


def _stage(which: str, act: Act) -> None:
    from wan.cli.report import Terminal

    stage = Terminal.stage

    def passing(self: Terminal, name: str, detail: str = "") -> None:
        stage(self, name, detail)
        if name == which.replace("-", " "):
            act()

    Terminal.stage = passing  # type: ignore[method-assign]


def _step(which: str, act: Act) -> None:
    from wan.cli.production import Production

    extras = Production.extras

    def watched(self: Production, *arguments: Any) -> dict[str, Any]:
        given = extras(self, *arguments)

        def observe(step: Step, latents: Tensor) -> None:
            if step.index + 1 == int(which):
                act()

        return given | {"observe": (observe, *given["observe"])}

    Production.extras = watched  # type: ignore[method-assign]


def _network(which: str, act: Act) -> None:
    from wan.engine.sampling.solvers import UniPC

    step = UniPC.step

    def passing(self: UniPC, velocity: Tensor, at: Step, latents: Tensor) -> Tensor:
        broken = act() if at.index + 1 == int(which) else None
        return step(self, velocity if broken is None else velocity * broken, at, latents)

    UniPC.step = passing  # type: ignore[method-assign]


def _uncounted(which: str, act: Act) -> None:
    from wan.engine.accounting import Forwards, Trunk

    counting = Forwards.counting

    def passing(self: Forwards, trunk: Trunk, **named: Any) -> Trunk:
        counted = counting(self, trunk, **named)

        def chosen(tokens: Tensor, inputs: Any, condition: Any, step: Step) -> Tensor:
            return (trunk if step.index + 1 == int(which) else counted)(tokens, inputs, condition, step)

        return chosen

    Forwards.counting = passing  # type: ignore[method-assign]


def _log(which: str, act: Act) -> None:
    class Full:
        isatty = sys.stderr.isatty

        def write(self, text: str) -> int:
            act()
            return len(text)

        def flush(self) -> None: ...

    sys.stderr = Full()  # type: ignore[assignment]


def _write(which: str, act: Act) -> None:
    write = Path.write_bytes

    def torn(path: Path, content: bytes) -> int:
        if path.name == f"{which}.part":
            write(path, content[: len(content) // 2])
            act()
        return write(path, content)

    Path.write_bytes = torn  # type: ignore[method-assign, assignment]


def _rename(which: str, act: Act) -> None:
    replace = os.replace

    def passing(source: Any, target: Any) -> None:
        if Path(target).name == which:
            act()
        replace(source, target)

    os.replace = passing  # type: ignore[assignment]


def _open(which: str, act: Act) -> None:
    number, _, name = which.partition(":")
    opened, count = builtins.open, _Count(int(number), act)

    def passing(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "r" not in mode and isinstance(file, str | Path) and Path(file).name == name:
            count()
        return opened(file, mode, *arguments, **options)

    builtins.open = passing  # type: ignore[assignment]


def _mkdir(which: str, act: Act) -> None:
    mkdir = Path.mkdir

    def passing(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == which:
            act()
        mkdir(path, *arguments, **options)

    Path.mkdir = passing  # type: ignore[method-assign]


def _chunk(which: str, act: Act) -> None:
    import wan.engine.decoding
    from wan.modules.vae import WanVAEModel

    wan.engine.decoding.DECODE_PIXELS = 1  # a latent frame at a time, as for large videos
    decode = WanVAEModel.decode_chunks

    def passing(self: WanVAEModel, *arguments: Any, **options: Any) -> Iterator[Tensor]:
        for number, chunk in enumerate(decode(self, *arguments, **options), 1):
            broken = act() if number == int(which) else None
            yield chunk if broken is None else chunk * broken

    WanVAEModel.decode_chunks = passing  # type: ignore[method-assign]


def _frames(which: str, act: Act) -> None:
    import wan.engine.decoding
    from wan.video import VideoSink

    wan.engine.decoding.DECODE_PIXELS = 1
    write, count = VideoSink.write_pixels, _Count(1 + int(which), act)  # the trial's come first

    def passing(self: VideoSink, pixels: Tensor) -> None:
        count()
        write(self, pixels)

    VideoSink.write_pixels = passing  # type: ignore[method-assign]


def _verify(which: str, act: Act) -> None:
    import wan.video.encoder

    verify, count = wan.video.encoder.verify_video, _Count(int(which), act)

    def passing(path: Any) -> Any:
        count()
        return verify(path)

    wan.video.encoder.verify_video = passing


def _restart(which: str, act: Act) -> None:
    """Not the trial's, which is over before the first network is loaded."""
    from wan.cli.production import Production
    from wan.video.files import FileSink

    restart, failed = FileSink.restart, Production.failed

    def armed(self: Production, *arguments: Any) -> BaseException:
        def passing(sink: FileSink) -> None:
            act()
            restart(sink)

        FileSink.restart = passing  # type: ignore[method-assign]
        return failed(self, *arguments)

    Production.failed = armed  # type: ignore[method-assign]


def _rmtree(which: str, act: Act) -> None:
    rmtree = shutil.rmtree

    def passing(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).suffix == ".run":
            act()
        rmtree(path, *arguments, **options)

    shutil.rmtree = passing  # type: ignore[assignment]


def _disk(which: str, act: Act) -> None:
    """Nothing is free: from the start, or from the stage `which` on."""
    usage = shutil.disk_usage
    full: list[bool] = [not which]
    shutil.disk_usage = lambda path: usage(path)._replace(free=0) if full else usage(path)  # type: ignore
    if which:
        full.clear()
        _stage(which, lambda: full.append(True))


class _Count:
    """Acts at the n-th call."""

    def __init__(self, number: int, act: Act) -> None:
        self.number, self.act = number, act

    def __call__(self) -> None:
        self.number -= 1
        if self.number == 0:
            self.act()


PLACES: dict[str, Callable[[str, Act], None]] = {
    "stage": _stage,
    "network": _network,
    "step": _step,
    "uncounted": _uncounted,
    "log": _log,
    "write": _write,
    "rename": _rename,
    "open": _open,
    "mkdir": _mkdir,
    "chunk": _chunk,
    "frames": _frames,
    "verify": _verify,
    "restart": _restart,
    "rmtree": _rmtree,
    "disk": _disk,
}
