"""Decoding never gives up early: out of memory leads to tiles, then small tiles, then the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan
from wan.engine.accounting import Report
from wan.engine.attempts import SMALL_TILE, Attempt, attempts, is_out_of_memory
from wan.engine.decoding import Decode
from wan.engine.errors import NonFinite
from wan.engine.types import Shot, Tiling


class Vae(nn.Module):
    """Decodes whatever `allows` the attempt; otherwise runs out of memory after its first chunk."""

    def __init__(self, allows: Any, error: Exception | None = None) -> None:
        super().__init__()
        self.allows, self.error, self.tried = allows, error or torch.OutOfMemoryError("CUDA out of memory"), []
        self.device: str | None = None

    def decode_chunks(
        self, latents: Tensor, *, frames_per_chunk: int, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        attempt = Attempt(tiling, self.device)
        self.tried.append(attempt)
        yield torch.zeros(1, 3, 1, 8, 8)
        if not self.allows(attempt):
            raise self.error
        yield torch.ones(1, 3, 4, 8, 8)


class Recorder:
    def __init__(self) -> None:
        self.frames: list[Tensor] = []
        self.notes: list[str] = []

    def write(self, frames: Tensor) -> None:
        self.frames.append(frames)

    def restart(self) -> None:
        self.frames.clear()

    def close(self) -> None: ...
    def stage(self, name: str, detail: str = "") -> None: ...
    def step(self, step: Any, seconds: float, share: float, ahead: float) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


def decoded(
    vae: Vae,
    tiling: Tiling | None = None,
    side: int = 96,
    index: int = 0,
    recorder: Recorder | None = None,
    frames_per_call: int = 0,
) -> tuple[Recorder, Report]:
    recorder, report = recorder or Recorder(), Report()

    @contextmanager
    def use(device: str | None) -> Iterator[nn.Module]:
        vae.device = device
        yield vae

    latents = torch.zeros(1, 16, 2, side, 8)
    shot = Shot(latent_shape=(16, 2, side, 8), index=index)
    Decode(
        use=use, shot=shot, latents=latents, sink=recorder, progress=recorder, report=report,
        frames_per_call=frames_per_call,
    ).run(tiling)  # fmt: skip
    return recorder, report


LADDER = [Attempt(), Attempt(Tiling()), Attempt(SMALL_TILE), Attempt(Tiling(), "cpu")]


@pytest.mark.parametrize("last", range(4))
def test_out_of_memory_tries_the_next_way_and_writes_every_frame_once(last: int) -> None:
    vae = Vae(lambda attempt: attempt == LADDER[last])
    recorder, report = decoded(vae)
    assert vae.tried == LADDER[: last + 1]
    assert sum(frames.shape[1] for frames in recorder.frames) == 5
    assert len(recorder.notes) == last
    assert report.decode == str(LADDER[last])


@pytest.mark.parametrize("last", range(4))
def test_a_later_shot_goes_on_behind_what_it_has_written(last: int) -> None:
    vae = Vae(lambda attempt: attempt == LADDER[last])
    recorder, _ = decoded(vae, index=1)
    assert [frames.shape[1] for frames in recorder.frames] == [1, 4]


def test_the_next_shot_gets_the_last_frames_of_all_shots_before() -> None:
    @contextmanager
    def use(device: str | None) -> Iterator[nn.Module]:
        yield Vae(lambda attempt: True)

    def carried(count: int) -> Tensor | None:
        shot = Shot(latent_shape=(16, 2, 96, 8), index=1, carry_frames=count)
        recorder, earlier = Recorder(), torch.full((3, 3, 8, 8), 0.5)
        return Decode(
            use=use, shot=shot, latents=torch.zeros(1, 16, 2, 96, 8), sink=recorder, progress=recorder,
            report=Report(), earlier=earlier,
        ).run(None)  # fmt: skip

    kept = [carried(count) for count in (0, 2, 6, 9)]
    assert kept[0] is None
    assert [frames[0, :, 0, 0].tolist() for frames in kept[1:] if frames is not None] == [
        [1, 1], [0.5, 0, 1, 1, 1, 1], [0.5, 0.5, 0.5, 0, 1, 1, 1, 1],
    ]  # fmt: skip


def test_out_of_memory_everywhere_is_reported() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        decoded(Vae(lambda attempt: False))


def test_other_errors_are_not_mistaken_for_a_lack_of_memory() -> None:
    vae = Vae(lambda attempt: False, RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        decoded(vae)
    assert len(vae.tried) == 1
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))


def test_latent_frames_at_a_time_are_those_asked_for_until_memory_runs_out() -> None:
    tried: list[tuple[int, Tiling | None]] = []

    class Counting(Vae):
        def decode_chunks(self, latents: Tensor, *, frames_per_chunk: int, **options: Any) -> Iterator[Tensor]:
            tried.append((frames_per_chunk, options.get("tiling")))
            return super().decode_chunks(latents, frames_per_chunk=frames_per_chunk, **options)

    _, report = decoded(Counting(lambda attempt: len(tried) == 3), frames_per_call=3)
    assert tried == [(3, None), (10, None), (10, Tiling())]  # 10 frames have 8192 latent pixels
    assert str(attempts(None, 12, 3)[0]) == "whole, 3 latent frames at a time"
    assert report.decode == str(Attempt(Tiling()))


def test_tiles_that_would_hold_the_whole_picture_are_not_tried() -> None:
    assert attempts(None, 12) == [Attempt(), Attempt(device="cpu")]
    assert attempts(Tiling(tile=24), 96) == [Attempt(Tiling(tile=24)), Attempt(SMALL_TILE), Attempt(SMALL_TILE, "cpu")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frames_that_are_none_are_an_error_and_not_a_black_video(value: float) -> None:
    class Broken(Vae):
        def decode_chunks(self, *arguments: Any, **options: Any) -> Iterator[Tensor]:
            for chunk in super().decode_chunks(*arguments, **options):
                yield torch.where(chunk == 1, value, chunk)

    with pytest.raises(NonFinite, match="frames from 2 on hold NaN or infinity"):
        decoded(Broken(lambda attempt: True))


def test_what_overflows_fp16_is_an_error_that_names_the_flag(tiny_checkpoint: Path, tiny_config: Any) -> None:
    """Weights that are fine in float32 make more than 65504 in the last convolution."""
    for dtype in ("fp32", "fp16"):
        pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", vae_dtype=dtype)
        with torch.no_grad():
            pipe.engine.network("vae").decoder.head[-1].weight.fill_(6e4)
        make = partial(pipe.generate, "a bird", size=(32, 32), frame_num=1, sampling_steps=1, seed=1)
        if dtype == "fp32":
            assert torch.isfinite(make()).all()
            continue
        with pytest.raises(NonFinite, match="overflows in float16: pass --vae_dtype bf16"):
            make()


def test_frames_stream_so_that_memory_does_not_grow_with_length() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = [0]

    class Long(Vae):
        def decode_chunks(self, *arguments: Any, **options: Any) -> Iterator[Tensor]:
            for _ in range(40):
                chunk = torch.zeros(1, 3, 4, 8, 8)
                alive.append(weakref.ref(chunk))
                most[0] = max(most[0], sum(ref() is not None for ref in alive))
                yield chunk

    class Forgetful(Recorder):
        def write(self, frames: Tensor) -> None:
            alive.append(weakref.ref(frames))

    decoded(Long(lambda attempt: True), recorder=Forgetful())
    assert most[0] <= 4  # two chunks and what was cut from them
