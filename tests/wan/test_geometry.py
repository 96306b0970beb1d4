"""Sizes and frame counts: what a model cannot make is refused in microseconds, with the nearest it can."""

from __future__ import annotations

import random
import re
import time

import pytest

from wan.conditioning.geometry import (
    check_frames,
    check_video,
    frames_for,
    nearest_frames,
    nearest_size,
    parse_size,
)
from wan.engine.errors import BadRequest

MODELS = [((4, 8, 8), (1, 2, 2)), ((4, 16, 16), (1, 2, 2))]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1280*720", (1280, 720)),
        ("1280x720", (1280, 720)),
        (" 480 X 832 ", (480, 832)),
        ("832×480", (832, 480)),
        ("720p", (1280, 720)),
        ("480P", (832, 480)),
    ],
)
def test_every_spelling_of_a_size_is_width_then_height(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1280", "1280*", "axb", "-16*16", "1280*720*3", "1080i", "16.0*16", "9999999*16"])
def test_an_unreadable_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadRequest, match=r"1280x720.*720p"):
        parse_size(text)


def cases() -> list[tuple[int, int, int]]:
    """Random sizes up to 1920 and frames up to 257, and the edges."""
    draw = random.Random(20)
    edges = [0, 1, 8, 15, 16, 17, 31, 32, 33, 1072, 1080, 1904, 1919, 1920]
    random_ones = [(draw.randint(1, 1920), draw.randint(1, 1920), draw.randint(1, 257)) for _ in range(3000)]
    legal = [(draw.randint(1, 120) * 16, draw.randint(1, 120) * 16, draw.randint(0, 64) * 4 + 1) for _ in range(1000)]
    at_edges = [(w, h, f) for w in edges for h in edges for f in (0, 1, 2, 4, 5, 81, 256, 257)]
    return random_ones + legal + at_edges


@pytest.mark.parametrize(("stride", "patch"), MODELS)
def test_every_size_and_length_passes_or_is_refused_with_the_nearest_legal_one(stride, patch) -> None:
    unit = stride[1] * patch[1]
    started = time.perf_counter()
    all_cases = cases()
    for width, height, frames in all_cases:
        legal = width >= unit and height >= unit and width % unit == height % unit == 0
        if legal and frames >= 1 and frames % 4 == 1:
            check_video(height, width, frames, stride=stride, patch=patch)
            continue
        with pytest.raises(BadRequest) as refusal:
            check_video(height, width, frames, stride=stride, patch=patch)
        named = [int(number) for number in re.findall(r"\d+", str(refusal.value).split("nearest")[1])]
        if not legal:
            near_width, near_height = named
            check_video(near_height, near_width, 1, stride=stride, patch=patch)
            assert abs(near_width - width) <= unit / 2 or near_width == unit
            assert abs(near_height - height) <= unit / 2 or near_height == unit
        else:
            for near in named:
                check_frames(near)
                assert abs(near - frames) < 4
    assert (time.perf_counter() - started) / len(all_cases) < 1e-3, "a check must cost microseconds"


def test_the_nearest_size_of_a_legal_one_is_itself() -> None:
    assert nearest_size(1280, 720) == (1280, 720)
    assert nearest_size(1920, 1080) == (1920, 1072)
    assert nearest_size(1280, 720, stride=(4, 16, 16)) == (1280, 704)
    assert nearest_size(1, 1) == (16, 16)


def test_the_message_of_a_wrong_frame_count_names_both_neighbours() -> None:
    with pytest.raises(BadRequest, match=r"80 frames.*4n\+1.*77 and 81"):
        check_video(480, 832, 80)


def test_five_seconds_at_16_frames_per_second_are_81_frames() -> None:
    assert frames_for(5, 16) == 81
    assert frames_for(5, 24) == 121
    assert frames_for(0.01, 16) == 1
    assert frames_for(2, 16) == 33
    assert [nearest_frames(n) for n in (1, 2, 3, 4, 5, 79, 80, 81)] == [1, 1, 5, 5, 5, 81, 81, 81]
