"""A video that is made clip by clip: how long each one is, what it says, and what it goes on from. No torch.

Neighbours share frames: the last ones of a clip are given to the next. Lengths are 4n+1, the shared ones too, so that
clips and video end where latent frames do and the length of the whole is exact.
"""

from __future__ import annotations

from wan.conditioning.geometry import check_frames
from wan.engine.errors import BadRequest

__all__ = ["clip_lengths", "part_of_clip"]


def clip_lengths(num_frames: int, longest: int, shared: int, *, stride: int = 4) -> list[int]:
    """Frames of each clip with those it shares with the one before, as equal as they can be and at most `longest`.

    Together they make `num_frames`. Raises BadRequest.
    """
    for flag, value in (("--extend", longest), ("--extend_overlap", shared)):
        try:
            check_frames(value, stride=stride)
        except BadRequest as error:
            raise BadRequest(f"{flag} {value}: {error}") from error
    if shared >= longest:
        raise BadRequest(
            f"--extend_overlap {shared}: a clip of --extend {longest} frames must bring new ones; share {longest - 4} "
            "at most, 1 is usual"
        )
    new, most = max((num_frames - shared) // stride, 0), (longest - shared) // stride
    if num_frames <= longest:
        return [num_frames]
    count = -(-new // most)
    return [shared + stride * (new // count + (clip < new % count)) for clip in range(count)]


def part_of_clip(prompt: str, clip: int, count: int) -> str:
    """What clip number `clip` of `count` is told: parts of a prompt between `|` are spread evenly over the clips."""
    parts = [part.strip() for part in prompt.split("|")]
    return parts[clip * len(parts) // count]
