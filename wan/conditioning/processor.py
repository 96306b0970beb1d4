"""Upstream's `VaceVideoProcessor`, name and arguments; `wan.conditioning.video` does the work."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.video import Source, choose, fit, open_video, read_frames
from wan.engine.errors import BadRequest

__all__ = ["VaceVideoProcessor"]


class VaceVideoProcessor:
    """Chooses frames of videos and fits them to the model's budget: `max_area` pixels, `seq_len` tokens.

    `downsample` is (frames, rows, columns) per token. `min_area`, `min_fps` and `max_fps` are upstream's and have no
    part in its only mode that is used, frames spread from first to last (`zero_start`, `keep_last`). Raises BadRequest.
    """

    def __init__(
        self,
        downsample: tuple[int, int, int],
        min_area: int,
        max_area: int,
        min_fps: float,
        max_fps: float,
        zero_start: bool,
        seq_len: int,
        keep_last: bool,
        **kwargs: Any,
    ) -> None:
        if not (zero_start and keep_last):
            raise BadRequest(f"zero_start={zero_start!r}, keep_last={keep_last!r}: both must be True, as Wan has them")
        self.downsample = downsample
        self.min_area, self.max_area = min_area, max_area
        self.min_fps, self.max_fps = min_fps, max_fps
        self.zero_start, self.keep_last = zero_start, keep_last
        self.seq_len = seq_len

    def set_area(self, area: int) -> None:
        self.min_area = self.max_area = area

    def set_seq_len(self, seq_len: int) -> None:
        self.seq_len = seq_len

    @staticmethod
    def resize_crop(video: Tensor, oh: int, ow: int) -> Tensor:
        """uint8 [T, H, W, 3] -> float32 [3, T, oh, ow] in -1..1, covering the size and cut at the centre."""
        return fit(video, oh, ow)

    def load_video(
        self, data_key: str | os.PathLike[str], crop_box: tuple[int, int, int, int] | None = None, seed: int = 2024,
        **kwargs: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """(video, frame numbers, (height, width), frames per second)."""
        return self.load_video_batch(data_key, crop_box=crop_box, seed=seed, **kwargs)

    def load_video_pair(
        self, data_key: str | os.PathLike[str], data_key2: str | os.PathLike[str],
        crop_box: tuple[int, int, int, int] | None = None, seed: int = 2024, **kwargs: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """(video, second video, frame numbers, (height, width), frames per second)."""
        return self.load_video_batch(data_key, data_key2, crop_box=crop_box, seed=seed, **kwargs)

    def load_video_batch(
        self, *data_key_batch: str | os.PathLike[str], crop_box: tuple[int, int, int, int] | None = None,
        seed: int = 2024, **kwargs: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The same frames of every video [3, T, H, W]; the first one decides, the shortest one bounds.

        `crop_box` (left, right, top, bottom) is cut out first; `seed` is upstream's and unused.
        """
        sources = [open_video(path, "video") for path in data_key_batch]
        left, right, top, bottom = crop_box or (0, sources[0].width, 0, sources[0].height)
        shown = replace(sources[0], width=right - left, height=bottom - top)
        frames = min(source.frames for source in sources)
        choice = choose(shown, frames=frames, area=self.max_area, tokens=self.seq_len, step=self.downsample)

        def load(source: Source) -> Tensor:
            pieces = read_frames(source, [[number] for number in choice.frames])
            cropped = (piece[:, top:bottom, left:right] if crop_box else piece for piece in pieces)
            return torch.cat([fit(piece, *choice.size) for piece in cropped], dim=1)

        return *(load(source) for source in sources), list(choice.frames), choice.size, choice.fps
