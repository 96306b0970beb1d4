"""Attention frame by frame against a loop over frames."""

from __future__ import annotations

import torch

from wan.engine.ops.attention import sdpa
from wan.engine.ops.frames import attend_own_frame


def test_a_token_sees_the_entries_of_its_own_frame_wherever_it_stands() -> None:
    q, k, v = torch.randn(2, 7, 3, 8), torch.randn(2, 4, 5, 3, 8), torch.randn(2, 4, 5, 3, 8)
    frames = torch.tensor([2, 0, -1, 3, 3, 0, 2])
    out = attend_own_frame(q, k, v, frames)
    assert torch.isfinite(out).all()
    for token, frame in enumerate(frames.tolist()):
        if frame >= 0:
            expected = sdpa(q[:, token : token + 1], k[:, frame], v[:, frame])
            torch.testing.assert_close(out[:, token : token + 1], expected)
