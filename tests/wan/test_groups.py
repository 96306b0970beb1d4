"""Videos made together: the same ones as alone, with one change of experts, and one failure hurts no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import BadRequest, NonFinite, OutputError
from wan.pipeline import Group
from wan.video import TensorSink

SMALL: dict[str, Any] = {"size": (64, 48), "frame_num": 5, "shift": 12.0, "guide_scale": (3.0, 4.0)}
JOBS: list[dict[str, Any]] = [
    {"input_prompt": "a red bird", "seed": 1, "sampling_steps": 4},
    {"input_prompt": "a blue cat", "seed": 2, "sampling_steps": 6},
    {"input_prompt": "a dog", "seed": 3, "sampling_steps": 4, "sample_solver": "euler"},
]


@pytest.fixture
def pipe(tiny_checkpoint: Path, tiny_config: Any) -> wan.WanT2V:
    return wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")


def grouped(pipe: wan.WanT2V, jobs: list[dict[str, Any]], **extras: Any) -> tuple[list[TensorSink], list[Any]]:
    group, sinks = Group(), [TensorSink() for _ in jobs]
    for job, sink in zip(jobs, sinks, strict=True):
        assert pipe.generate(**SMALL, **job, sink=sink, group=group, **extras) is None
    return sinks, pipe.run_group(group)


def test_group_gives_the_videos_of_one_by_one_with_one_switch(pipe: wan.WanT2V) -> None:
    alone = [pipe.generate(**SMALL, **job) for job in JOBS]
    experts: list[str] = []
    sinks, failures = grouped(pipe, JOBS, observe=(lambda step, latents: experts.append(step.expert),))
    assert failures == [None] * 3
    for video, sink in zip(alone, sinks, strict=True):
        assert video is not None and torch.equal(sink.result, video)
    assert experts == sorted(experts)  # all of "high" before all of "low"


def test_failing_job_leaves_the_others_of_its_group_alone(pipe: wan.WanT2V) -> None:
    alone = pipe.generate(**SMALL, **JOBS[2])

    def spoil(step: Any, latents: Tensor) -> None:
        if step.count == 6 and step.index == 2:
            raise NonFinite("broken on purpose")

    sinks, failures = grouped(pipe, JOBS, observe=(spoil,))
    assert [type(failure) for failure in failures] == [type(None), NonFinite, type(None)]
    assert alone is not None and torch.equal(sinks[2].result, alone)


class Counting(TensorSink):
    """Knows how many frames it has."""

    frames = 0

    def write(self, frames: Tensor) -> None:
        self.frames += frames.shape[1]
        super().write(frames)


def test_each_video_is_done_before_the_next_is_decoded_and_its_report_is_at_hand(pipe: wan.WanT2V) -> None:
    group, told = Group(), []
    sinks = [Counting() for _ in JOBS]

    def done(number: int) -> None:
        told.append((number, [sink.frames for sink in sinks], pipe.report))

    for number, (job, sink) in enumerate(zip(JOBS, sinks, strict=True)):
        pipe.generate(**SMALL, **job, sink=sink, done=lambda number=number: done(number), group=group)
    assert pipe.run_group(group) == [None] * 3
    assert [(number, full) for number, full, _ in told] == [
        (0, [5, 0, 0]), (1, [5, 5, 0]), (2, [5, 5, 5])
    ]  # fmt: skip
    assert [report for _, _, report in told] == [job.report for job in group.jobs]


def test_video_that_cannot_be_finished_is_a_failure_of_its_job_alone(pipe: wan.WanT2V) -> None:
    def full() -> None:
        raise OutputError("no space left")

    group, sinks = Group(), [TensorSink(), TensorSink()]
    for job, sink, done in zip(JOBS, sinks, (full, None), strict=False):
        pipe.generate(**SMALL, **job, sink=sink, done=done, group=group)
    failures = pipe.run_group(group)
    assert [type(failure) for failure in failures] == [OutputError, type(None)]
    assert torch.equal(sinks[1].result, pipe.generate(**SMALL, **JOBS[1]))  # type: ignore[arg-type]


def test_group_with_two_sets_of_options_is_refused(pipe: wan.WanT2V) -> None:
    group = Group()
    pipe.generate(**SMALL, **JOBS[0], group=group)
    with pytest.raises(BadRequest, match="one set of options"):
        pipe.generate(**SMALL, **JOBS[1], group=group, use_batched_cfg=True)
