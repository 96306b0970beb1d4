"""Conditions batch, window and memoise by what their tensors declare; a denoise can be stored and taken up again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wan.engine.sampling.schedule import flow_steps
from wan.engine.sampling.solvers import make_solver
from wan.engine.types import Condition, Denoising, Known, Request, Shot, tensor


@dataclass(frozen=True, kw_only=True)
class Spoken(Condition):
    """What a family with sound and a hint per video frame declares."""

    audio: Tensor | None = tensor(time=1, default=None)
    hints: Tensor | None = tensor(time=1, rate=4, first=1, default=None)
    pairs: Tensor | None = tensor(time=1, rate=2, default=None)
    loudness: float = 1.0


def spoken(batch: int = 1, frames: int = 3) -> Spoken:
    return Spoken(
        context=torch.randn(batch, 2, 3),
        channels=torch.randn(batch, 2, frames, 2, 2),
        audio=torch.arange(frames).expand(batch, frames),
        hints=torch.arange(1 + 4 * (frames - 1)).expand(batch, -1),
        pairs=torch.arange(2 * frames).expand(batch, -1),
        loudness=0.5,
    )


@pytest.mark.parametrize(
    ("frames", "hints", "pairs"),
    [
        ([0], [0], [0, 1]),
        ([0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3]),
        ([2], [5, 6, 7, 8], [4, 5]),
        ([2, 1], [5, 6, 7, 8, 1, 2, 3, 4], [4, 5, 2, 3]),  # order is the window's
    ],
)
def test_a_window_takes_what_belongs_to_its_frames(frames: list[int], hints: list[int], pairs: list[int]) -> None:
    condition = spoken()
    window = condition.window(frames)
    assert window.audio is not None and window.audio.tolist() == [frames]
    assert window.hints is not None and window.hints.tolist() == [hints]
    assert window.pairs is not None and window.pairs.tolist() == [pairs]
    assert condition.channels is not None and window.channels is not None
    assert torch.equal(window.channels, condition.channels[:, :, frames])
    assert window.context is condition.context
    assert window.frozen is None
    assert window.loudness == 0.5
    assert isinstance(window, Spoken)


def test_a_window_over_all_frames_is_the_condition() -> None:
    condition = spoken()
    assert all(
        torch.equal(getattr(condition, name), getattr(condition.window(range(3)), name))
        for name in ("context", "channels", "audio", "hints", "pairs")
    )


def test_stacked_conditions_hold_every_tensor_in_order() -> None:
    one, two = spoken(), spoken(batch=2)
    both = Spoken.cat([one, two])
    assert both.context.shape[0] == 3
    assert torch.equal(both.context, torch.cat([one.context, two.context]))
    assert both.hints is not None and both.hints.shape == (3, 9)
    assert both.frozen is None
    assert both.loudness == 0.5


def test_conditions_that_differ_in_kind_cannot_be_stacked() -> None:
    plain = Spoken(context=torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="'channels'"):
        Spoken.cat([plain, spoken()])
    assert plain.shapes() != spoken().shapes()
    assert spoken().shapes() == spoken().shapes()


def test_once_computes_once_for_each_owner_and_dies_with_the_condition() -> None:
    calls: list[str] = []

    def compute(name: str) -> Tensor:
        calls.append(name)
        return torch.zeros(1)

    condition = spoken()
    first = condition.once("high.image", lambda: compute("high"))
    assert condition.once("high.image", lambda: compute("again")) is first
    assert condition.once("low.image", lambda: compute("low")) is not first
    spoken().once("high.image", lambda: compute("other"))
    assert calls == ["high", "low", "other"]


def test_a_window_keeps_memos_without_time_and_drops_the_others() -> None:
    condition = spoken()
    image = condition.once("image", lambda: torch.zeros(1))
    condition.once("sound", lambda: torch.zeros(1, 3), time=1)
    window = condition.window([0, 1])
    assert window.once("image", lambda: torch.ones(1)) is image
    assert window.once("sound", lambda: torch.ones(1, 2), time=1).tolist() == [[1, 1]]
    assert condition.once("sound", lambda: torch.ones(1, 3), time=1).tolist() == [[0, 0, 0]]


def test_stacked_conditions_start_without_memos() -> None:
    """A memo of one branch has that branch's batch size."""
    condition = spoken()
    condition.once("image", lambda: torch.zeros(1))
    assert Spoken.cat([condition, condition]).memo == {}


def test_known_latents_replace_the_others_where_the_mask_says_so() -> None:
    mask = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1)
    given, latents = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 4, 3, 2, 2)
    out = Known(given, mask).apply(latents, None)
    assert torch.equal(out[:, :, 0], given[:, :, 0])
    assert torch.equal(out[:, :, 1:], latents[:, :, 1:])


def denoising() -> Denoising:
    request = Request(
        task="t2v", prompt="a cat", negative_prompt="", height=32, width=32, num_frames=5, steps=5, shift=5.0,
        solver="unipc", guide_scale=(3.0, 4.0), seed=7,
    )  # fmt: skip
    steps = flow_steps("unipc", 5, 5.0)
    generator = torch.Generator().manual_seed(request.seed)
    latents = torch.randn(1, 4, 2, 4, 4, generator=generator)
    return Denoising(
        request=request, shot=Shot(latent_shape=(4, 2, 4, 4)), index=0, branches={}, steps=steps, latents=latents,
        solver=make_solver("unipc", steps), generator=generator,
    )  # fmt: skip


def advance(run: Denoising, until: int) -> None:
    for step in run.steps[run.done : until]:
        velocity = torch.tanh(run.latents) + torch.randn(run.latents.shape, generator=run.generator)
        run.latents, run.done = run.solver.step(velocity, step, run.latents), step.index + 1


@pytest.mark.parametrize("stop", range(6))
def test_a_stored_denoise_continues_bit_by_bit(stop: int) -> None:
    whole, first, second = denoising(), denoising(), denoising()
    advance(whole, 5)
    advance(first, stop)
    state = {key: value.clone() for key, value in first.state().items()}
    assert all(isinstance(value, Tensor) for value in state.values())
    second.load(state)
    assert second.done == stop
    advance(second, 5)
    assert torch.equal(second.latents, whole.latents)
