"""One video on its way to its file, so that nothing is lost: what is kept while it is made, and what is done when the
encoder, the disk, the memory or the patience of the user gives out.

Before the first step the run's folder is made; before decoding the latents lie in it; frames stream into the encoder
as they are decoded; the folder goes only when the file has been read back. An encoder that fails costs a second
decode, into PNG frames.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import pipelines, record
from wan.cli.naming import run_folder
from wan.engine.decoding import is_out_of_memory
from wan.engine.errors import GenerationFailed, OutputError, WanError
from wan.runs import Latents, Run, read_latents

if TYPE_CHECKING:
    from torch import Tensor

    from wan.cli.generate import Job
    from wan.cli.report import Terminal
    from wan.engine.types import Keeper, Sink, Step


class Production:
    """The life of one video. `extras` go to `generate`; then `finish`, or `failed` with what was raised."""

    def __init__(self, job: Job, terminal: Terminal) -> None:
        self.job = job
        self.terminal = terminal
        self.path = job.output.path
        care = job.care
        self.run = Run(
            care.resume or run_folder(self.path), job.record, every=care.state_every, keep_switch=care.keep_latents,
            progress=terminal,
        )  # fmt: skip
        self.keeper: Keeper = self.run if care.latents is None else Latents(read_latents(care.latents)[0])
        self.sink = self._sink()
        self._end = None if care.timeout_s is None else time.monotonic() + care.timeout_s
        try:
            self.run.begin()
        except OSError as error:
            raise OutputError(
                f"--save_file: cannot write {str(self.run.folder)!r} ({error}); choose another"
            ) from error

    def extras(self) -> dict[str, Any]:
        """What `generate` gets beyond upstream's arguments."""
        timed = _Timed(self.sink, self._check_time) if self._end is not None else self.sink
        return {"sink": timed, "keeper": self.keeper, "observe": (lambda step, latents: self._check_time(step),)}

    def finish(self, pipeline: Any) -> Path:
        """Complete and verify the file, write the sidecar, drop what was kept. Raises OutputError after a rescue."""
        self.terminal.stage("save")
        try:
            self.sink.close()
        except OutputError as error:
            raise self._rescued(pipeline, error) from error
        self.terminal.end_stage()
        if self.job.care.metadata:
            self._write_sidecar(pipeline)
        kept = self.path.with_name(f"{self.path.stem}.latents.safetensors")
        self.run.close(kept if self.job.care.keep_latents else None)
        return self.path

    def failed(self, pipeline: Any, error: BaseException) -> BaseException:
        """Clean up and return what to raise, with the way to go on in its message."""
        self.sink.restart()
        if isinstance(error, OutputError):
            return self._rescued(pipeline, error)
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            error = GenerationFailed(f"out of memory during {self.terminal.current!r}: {self._memory_advice()}")
        if not self._worth_keeping():
            self.run.close()
            return error
        go_on = f"continue with --resume {str(self.run.folder)!r}"
        if isinstance(error, GenerationFailed):
            return type(error)(f"{error}; {go_on}")
        self.terminal.line(f"kept    {self.run.folder}: {go_on}")
        return error

    # -----------------------------------------------------------------------------------------------------------------

    def _sink(self) -> Any:
        from wan.video import open_sink

        output = self.job.output
        if self.job.care.metadata:
            output = dataclasses.replace(output, metadata=record.embedded(self.job.record))
        return open_sink(output)

    def _rescued(self, pipeline: Any, error: OutputError) -> OutputError:
        """The file could not be written: decode again into PNG frames, and say where they and the latents are."""
        from wan.video import PngSink

        self.sink.restart()
        frames = PngSink(self.path.with_name(f"{self.path.stem}_frames"))
        latents = self.run.latents_path() if self.job.care.latents is None else self.job.care.latents
        again = f"make the file from {str(latents)!r} with --decode" if latents.is_file() else ""
        self.terminal.note(f"{error}; saving the frames as PNG")
        try:
            pipelines.call(pipeline, self.job, sink=frames, keeper=self.keeper)
            frames.close()
        except (WanError, OSError, RuntimeError) as second:
            frames.restart()
            kept = again or "nothing could be kept, as no file can be written here"
            return OutputError(f"{error}, nor its frames as PNG ({second}); {kept}")
        return OutputError("; ".join(filter(None, (f"{error}. All frames are in {str(frames.folder)!r}", again))))

    def _worth_keeping(self) -> bool:
        return self.job.care.latents is None and any(self.run.folder.glob("*.safetensors"))

    def _check_time(self, step: Step | None = None) -> None:
        if self._end is not None and time.monotonic() > self._end:
            where = f"step {step.index + 1} of {step.count}" if step else "decoding"
            raise GenerationFailed(f"--timeout_s {self.job.care.timeout_s:g}: the time was up at {where}")

    def _write_sidecar(self, pipeline: Any) -> None:
        report = getattr(pipeline, "report", None)
        complete = record.complete(
            self.job.record, report=report, stages=self.terminal.stages, peak_bytes=record.peak_bytes(self.job.hardware)
        )
        try:
            record.write_sidecar(complete, record.sidecar_path(self.path))
        except OSError as error:
            self.terminal.note(f"the video is saved, its sidecar is not ({error})")

    def _memory_advice(self) -> str:
        """What to try next, leaving out what is on already."""
        values = pipelines.plan_values(self.job.plan)
        savers = ("offload_model", "vae_cpu", "convert_model_dtype", "vae_tiling")
        off = [f"--{name}" + " True" * (name == "offload_model") for name in savers if values.get(name) is False]
        return "try " + ", ".join([*off, "a smaller --size", "fewer --frame_num"])


class _Timed:
    """A sink that checks the time with every chunk of frames."""

    def __init__(self, sink: Sink, check: Callable[[], None]) -> None:
        self._sink, self._check = sink, check

    def write(self, frames: Tensor) -> None:
        self._check()
        self._sink.write(frames)

    def restart(self) -> None:
        self._sink.restart()

    def close(self) -> None:
        self._sink.close()
