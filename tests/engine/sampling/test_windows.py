"""Windows over a long video: every frame is seen, means are means, and the noise of later windows is the first's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from wan.engine.sampling.windows import Mean, halving, of_window, shuffled_noise, weights, windows

SIZES = [(57, 21, 4), (22, 21, 4), (42, 21, 0), (57, 5, 4), (10, 5, 1), (3, 2, 1), (57, 2, 0)]
"""(frames, size, overlap)."""


@pytest.mark.parametrize("schedule", ["uniform", "looped", "static"])
@pytest.mark.parametrize(("count", "size", "overlap"), SIZES)
def test_every_frame_is_seen_in_every_step_by_windows_of_one_size(
    schedule: str, count: int, size: int, overlap: int
) -> None:
    for step in range(9):
        found = windows(schedule, count, size, overlap, step)
        assert {len(window) for window in found} == {size}
        assert {frame for window in found for frame in window} == set(range(count))
        for fuse in ("linear", "pyramid"):
            assert all(weight > 0 for window in found for weight in weights(window, count, overlap, fuse))


def test_a_video_of_one_window_is_one_window() -> None:
    assert windows("uniform", 21, 21, 4, 3) == windows("looped", 21, 21, 4, 3) == [tuple(range(21))]


def test_static_windows_overlap_and_the_last_one_ends_with_the_video() -> None:
    assert windows("static", 12, 5, 2, 7) == [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10), (7, 8, 9, 10, 11)]


def test_moving_windows_put_their_joints_elsewhere_in_the_next_step() -> None:
    joints = [{window[0] for window in windows("uniform", 57, 21, 4, step)} - {0, 36} for step in range(4)]
    assert all(before != after for before, after in pairwise(joints))


def test_looped_windows_go_on_at_the_beginning() -> None:
    assert any(window[-1] < window[0] for window in windows("looped", 12, 5, 2, 0))


def test_halving_spreads_the_steps() -> None:
    assert [halving(step) for step in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]


def test_linear_weights_rise_and_fall_over_the_overlap_but_not_at_the_ends_of_the_video() -> None:
    assert weights((0, 1, 2, 3, 4), 12, 2, "linear") == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    assert weights((3, 4, 5, 6, 7), 12, 2, "linear") == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert weights((7, 8, 9, 10, 11), 12, 2, "linear") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert weights((3, 4, 5, 6, 7), 12, 0, "linear") == [1.0] * 5


@pytest.mark.parametrize("fuse", ["linear", "pyramid"])
def test_windows_that_agree_are_joined_to_what_they_say(fuse: str) -> None:
    whole = torch.randn(1, 2, 12, 3, 3, dtype=torch.float64)
    for schedule in ("uniform", "looped", "static"):
        found = windows(schedule, 12, 5, 2, 1)
        mean = Mean(whole)
        for window in found:
            mean.add(window, whole[:, :, list(window)], weights(window, 12, 2, fuse))
        torch.testing.assert_close(mean.value(), whole)


def test_later_windows_begin_from_the_first_ones_noise_in_another_order() -> None:
    noise = torch.randn(1, 2, 17, 2, 2)
    shuffled = shuffled_noise(noise, size=5, overlap=2, seed=3)
    assert torch.equal(shuffled[:, :, :5], noise[:, :, :5])
    first = {float(frame.sum()) for frame in noise[0, :, :5].unbind(1)}
    assert {float(frame.sum()) for frame in shuffled[0].unbind(1)} == first
    assert torch.equal(shuffled, shuffled_noise(noise, size=5, overlap=2, seed=3))


def test_several_prompts_are_spread_evenly() -> None:
    parts = ["a", "b", "c"]
    assert [of_window(parts, range(start, start + 4), 12) for start in (0, 4, 8)] == [0, 1, 2]
