"""One video on its way to its file, so that nothing is lost: what is kept while it is made, and what is done when the
encoder, the disk, the memory or the patience of the user gives out.

Before the first step the run's folder is made; before decoding the latents lie in it; frames stream into the encoder
as they are decoded; the folder goes only when the file has been read back. An encoder that fails costs a second
decode, into PNG frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import pipelines, record
from wan.cli.naming import run_folder
from wan.cli.signals import held
from wan.engine.attempts import is_out_of_memory
from wan.engine.errors import BadRequest, GenerationFailed, OutputError, WanError
from wan.runs import Latents, Run, holds_work

if TYPE_CHECKING:
    from torch import Tensor

    from wan.cli.generate import Job
    from wan.cli.report import Terminal
    from wan.engine.types import Keeper, Sink, Step
    from wan.video import VideoInfo
    from wan.video.color import ClipColors


class Production:
    """The life of one video. `extras` go to `generate`; then `finish`, or `failed` with what was raised."""

    def __init__(self, job: Job, terminal: Terminal) -> None:
        self.job = job
        self.terminal = terminal
        self.path = job.output.path
        self.saved = False
        """True once the video has its name."""
        self._pipeline: Any = None
        care = job.care
        self.run = Run(
            care.resume or run_folder(self.path), job.record, every=care.state_every, keep_switch=care.keep_latents,
            progress=terminal,
        )  # fmt: skip
        self.keeper: Keeper = self.run if care.latents is None else Latents.kept(care.latents)
        self.sink = self._sink()
        self._colors = self._colored(self.sink)
        self._limit = None if care.timeout_s is None else terminal.spent() + care.timeout_s
        self._begin()

    def extras(self, pipeline: Any) -> dict[str, Any]:
        """What `pipeline.generate` gets beyond upstream's arguments."""
        self._pipeline = pipeline
        sink, keeper = self._colors, self._colors.marking(self.keeper)
        timed = _Timed(sink, self._check_time) if self._limit is not None else sink
        return {"sink": timed, "keeper": keeper, "observe": (lambda step, latents: self._check_time(step),)}

    def finish(self, pipeline: Any) -> Path:
        """Complete, verify and name the file, write the sidecar, drop what was kept. Raises OutputError."""
        self.terminal.stage("save")
        self._colors.flush()
        self.sink.finish()
        with held(answer=True):
            self.sink.rename()
            self.saved = True
            self.terminal.end_stage()
            if self.job.care.metadata and self.job.care.sidecar:
                self._write_sidecar()
            self._drop()
        return self.path

    def failed(self, pipeline: Any, error: BaseException) -> BaseException:
        """Clean up and return what to raise, with the way to go on in its message."""
        if self.saved:
            self.terminal.line(f"saved   {self.path}")
            return error
        if isinstance(error, OutputError):
            failure = self._complete(error) or self._rescued(pipeline, error)
            self.run.release()
            return failure
        with held(answer=False):
            self.sink.restart()
            more_than_record = self.run.interrupted()
            if is_out_of_memory(error):
                advice = pipelines.memory_advice(self.job.plan)
                error = GenerationFailed(f"out of memory during {self.terminal.current!r}: {advice}")
            go_on = self._way_on(more_than_record)
            if not more_than_record:
                self.run.close()
        if isinstance(error, GenerationFailed):
            return type(error)("; ".join(filter(None, (str(error), go_on))))
        if go_on:
            self.terminal.line(f"kept    {self.job.care.latents or self.run.folder}: {go_on}")
        return error

    # -----------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            self.run.begin()
        except OSError as error:
            if not holds_work(self.run.folder):
                self.run.close()
            self.run.release()
            folder = str(self.run.folder)
            raise BadRequest(f"--save_file: cannot write {folder!r} ({error}); choose another") from error

    def _sink(self) -> Any:
        from wan.video import open_sink

        output = self.job.output
        if self.job.care.metadata:
            output = dataclasses.replace(output, metadata=record.Tags(self._record))
        return open_sink(output)

    def _colored(self, sink: Any) -> ClipColors:
        """`sink` behind what measures, or matches, the colours of clips."""
        from wan.video.color import ClipColors

        inputs = self.job.wanted.inputs
        return ClipColors(sink, match=inputs is not None and inputs.match_color)

    def _complete(self, error: OutputError) -> OutputError | None:
        """What to raise where the video is complete and only its name could not be given."""
        if not self.sink.part.is_file():
            return None
        return OutputError("; or ".join(filter(None, (str(error), self._way_on(holds_work(self.run.folder))))))

    def _rescued(self, pipeline: Any, error: OutputError) -> OutputError:
        """The file could not be written: decode again into PNG frames, and say where they and the latents are."""
        from wan.video import PngSink

        self.sink.restart()
        frames = PngSink(self.path.with_name(f"{self.path.stem}_frames"))
        colored = self._colored(frames)
        latents = self.job.care.latents or self.run.safe_latents()
        again = f"make the file from {str(latents)!r} with --decode" if latents else ""
        self.terminal.note(f"{error}; saving the frames as PNG")
        try:
            pipelines.call(pipeline, self.job, sink=colored, keeper=colored.marking(self.keeper))
            colored.close()
        except (WanError, OSError, RuntimeError, KeyboardInterrupt) as second:
            with held(answer=False):
                frames.restart()
            kept = again or "nothing could be kept, as no file can be written here"
            return OutputError(f"{error}, nor its frames as PNG ({str(second) or 'interrupted'}); {kept}")
        return OutputError("; ".join(filter(None, (f"{error}. All frames are in {str(frames.folder)!r}", again))))

    def _way_on(self, more_than_record: bool) -> str:
        """How the user continues from what is kept; "" where nothing is."""
        latents = self.job.care.latents or self.run.safe_latents()
        if latents is not None and (self.job.care.latents or latents.parent != self.run.folder):
            return f"continue with --decode {str(latents)!r}"
        return f"continue with --resume {str(self.run.folder)!r}" if more_than_record else ""

    def _drop(self) -> None:
        """The video is safe: what was kept on the way goes, or stays under its name."""
        kept = self.path.with_name(f"{self.path.stem}.latents.safetensors")
        try:
            self.run.close(kept if self.job.care.keep_latents else None)
        except OSError as error:
            self.run.release()
            self.terminal.note(f"the video is saved, its latents stay in {str(self.run.folder)!r} ({error})")

    def _check_time(self, step: Step | None = None) -> None:
        if self._limit is not None and self.terminal.spent() > self._limit:
            where = f"step {step.index + 1} of {step.count}" if step else "decoding"
            raise GenerationFailed(f"--timeout_s {self.job.care.timeout_s:g}: the time was up at {where}")

    def _record(self, frames: VideoInfo | None = None) -> dict[str, Any]:
        """What the video was made by, and how that has gone so far."""
        made = record.complete(
            self.job.record, report=getattr(self._pipeline, "report", None), stages=self.terminal.stages,
            peak_bytes=record.peak_bytes(self.job.hardware), frames=frames,
        )  # fmt: skip
        if frames is not None and len(self._colors.clips) > 1:
            made["result"]["clips"] = self._colors.told()
        return made

    def _write_sidecar(self) -> None:
        from wan.video import VideoInfo

        wanted = self.job.wanted
        found = VideoInfo(self.sink.frames, wanted.width, wanted.height, float(wanted.fps))
        try:
            record.write_sidecar(self._record(found), record.sidecar_path(self.path))
        except OSError as error:
            self.terminal.note(f"the video is saved, its sidecar is not ({error})")


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
