"""VACE's control latents, value by value on cases small enough to work out by hand, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wan.conditioning.control import control_latents, mask_channels, nearest_frames, on_canvas
from wan.engine.errors import BadRequest
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAEConfig


@pytest.fixture(scope="module")
def vae() -> WanVAEModel:
    torch.manual_seed(0)
    return WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1)).eval().requires_grad_(False)


def video(frames: int = 9, height: int = 16, width: int = 32) -> Tensor:
    return torch.rand(3, frames, height, width) * 2 - 1


def encoded(vae: WanVAEModel, pixels: Tensor) -> Tensor:
    return vae.encode(pixels[None])[0]


def half(frames: int = 9) -> Tensor:
    """A mask of the right half, soft: 0.6 counts as made anew, 0.4 as kept."""
    mask = torch.full((1, frames, 16, 32), 0.4)
    mask[..., 16:] = 0.6
    return mask


def test_what_stays_and_what_is_made_anew_are_encoded_apart(vae: WanVAEModel) -> None:
    pixels, mask = video(), half()
    control = control_latents(vae, pixels, mask, (), (9, 16, 32))
    assert control.shape == (1, 96, 3, 2, 4) and control.dtype == torch.float32
    inside = torch.zeros(9, 16, 32)
    inside[..., 16:] = 1
    assert torch.equal(control[0, :16], encoded(vae, pixels * (1 - inside)))
    assert torch.equal(control[0, 16:32], encoded(vae, pixels * inside))
    # The mask itself goes in as it is: soft.
    assert torch.equal(control[0, 32:, :, :, :2], torch.full((64, 3, 2, 2), 0.4))
    assert torch.equal(control[0, 32:, :, :, 2:], torch.full((64, 3, 2, 2), 0.6))


def test_without_a_mask_all_is_made_anew_and_nothing_stays(vae: WanVAEModel) -> None:
    pixels = video()
    control = control_latents(vae, pixels, None, (), (9, 16, 32))
    assert torch.equal(control[0, :16], encoded(vae, torch.zeros_like(pixels)))
    assert torch.equal(control[0, 16:32], encoded(vae, pixels))
    assert torch.equal(control[0, 32:], torch.ones(64, 3, 2, 4))


def test_without_a_video_both_parts_are_grey(vae: WanVAEModel) -> None:
    control = control_latents(vae, None, None, (), (5, 16, 32))
    grey = encoded(vae, torch.zeros(3, 5, 16, 32))
    assert torch.equal(control[0, :16], grey) and torch.equal(control[0, 16:32], grey)


def test_references_come_first_in_time_one_latent_frame_each_without_a_mask(vae: WanVAEModel) -> None:
    pixels, refs = video(5), (video(1), video(1))
    control = control_latents(vae, pixels, None, refs, (5, 16, 32))
    assert control.shape == (1, 96, 2 + 2, 2, 4)
    for index, ref in enumerate(refs):
        assert torch.equal(control[0, :16, index : index + 1], encoded(vae, ref))
        assert not control[0, 16:, index].any()
    assert torch.equal(control[:, :, 2:], control_latents(vae, pixels, None, (), (5, 16, 32)))


def test_a_cell_of_the_mask_becomes_channels_row_by_row() -> None:
    mask = torch.zeros(1, 16, 24)
    mask[0, 8 + 3, 16 + 5] = 1  # row 3, column 5 of the cell in the second row and third column
    channels = mask_channels(mask)
    assert channels.shape == (64, 1, 2, 3)
    assert channels.nonzero().tolist() == [[3 * 8 + 5, 0, 1, 2]]


@pytest.mark.parametrize(("available", "count"), [(1, 1), (5, 2), (9, 3), (17, 5), (81, 21)])
def test_each_latent_frame_takes_the_mask_of_the_frame_at_its_middle(available: int, count: int) -> None:
    assert nearest_frames(available, count) == [int((i + 0.5) * available / count) for i in range(count)]


def test_the_masks_frames_are_chosen_across_pieces(vae: WanVAEModel) -> None:
    mask = torch.linspace(0, 1, 17)[None, :, None, None].expand(1, 17, 16, 16).clone()
    control = control_latents(vae, video(17, 16, 16), mask, (), (17, 16, 16))
    expected = torch.linspace(0, 1, 17)[[1, 5, 8, 11, 15]]
    assert torch.equal(control[0, 32, :, 0, 0], expected)


def test_a_mask_of_three_channels_cuts_each_colour_and_its_first_channel_goes_in(vae: WanVAEModel) -> None:
    pixels, mask = video(5), torch.zeros(3, 5, 16, 32)
    mask[1] = 1
    control = control_latents(vae, pixels, mask, (), (5, 16, 32))
    assert torch.equal(control[0, 16:32], encoded(vae, pixels * mask))
    assert not control[0, 32:].any()


def test_a_picture_is_fitted_whole_onto_white() -> None:
    picture = torch.full((3, 1, 10, 30), -1.0)
    fitted = on_canvas(picture, 16, 24)  # scaled by 0.8 to 8 x 24
    assert fitted.shape == (3, 1, 16, 24)
    assert torch.equal(fitted[:, :, 4:12], torch.full((3, 1, 8, 24), -1.0))
    assert (fitted[:, :, :4] == 1).all() and (fitted[:, :, 12:] == 1).all()
    tall = on_canvas(torch.full((3, 1, 40, 10), 0.5), 16, 24)  # to 16 x 4, at columns 10 to 13
    assert (tall[..., 10:14] == 0.5).all() and (tall[..., :10] == 1).all() and (tall[..., 14:] == 1).all()
    same = torch.rand(3, 1, 16, 24)
    assert on_canvas(same, 16, 24) is same


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mask": torch.zeros(1, 9, 32, 16)}, r"the mask is \[1, 9, 32, 16\]; it must be \[1 or 3, 9, 16, 32\]"),
        ({"mask": torch.zeros(1, 5, 16, 32)}, r"the mask is \[1, 5, 16, 32\]"),
        ({"frames": torch.zeros(4, 9, 16, 32)}, r"the video is \[4, 9, 16, 32\]; it must be \[3, 9, 16, 32\]"),
        ({"refs": (torch.zeros(3, 1, 16, 32), torch.zeros(3, 1, 8, 8))}, r"reference image 2 is \[3, 1, 8, 8\]"),
    ],
)
def test_what_is_not_of_one_size_is_refused(vae: WanVAEModel, changed: dict[str, Any], says: str) -> None:
    given = {"frames": video(), "mask": None, "refs": ()} | changed
    with pytest.raises(BadRequest, match=says):
        control_latents(vae, given["frames"], given["mask"], given["refs"], (9, 16, 32))


@pytest.mark.parametrize("references", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_no_more_pixels_are_held_than_the_vae_takes_at_once(vae: WanVAEModel, references: int) -> None:
    """A long video that is made while it is read: at no moment are two pieces of it alive, references or not."""
    import gc
    import weakref

    from wan.conditioning.video import Clip, Source

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Made(Clip):
        def chunks(self) -> Any:
            nonlocal most
            for length in (1, *[4] * 10):
                gc.collect()
                most = max(most, sum(each() is not None for each in alive))
                piece = torch.rand(3, length, 16, 16)
                alive.append(weakref.ref(piece))
                yield piece
                del piece

    source = Source(path="made", width=16, height=16, frames=41, fps=16)  # type: ignore[arg-type]
    clip = Made(source=source, frames=tuple(range(41)), size=(16, 16))
    refs = [torch.rand(3, 1, 16, 16) for _ in range(references)]
    assert control_latents(vae, clip, None, refs, (41, 16, 16)).shape == (1, 96, references + 11, 2, 2)
    assert most <= 1 and len(alive) == 11
