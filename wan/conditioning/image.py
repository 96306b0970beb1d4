"""Pictures as the given frames of a video: files of any kind to pixels, the size they ask for, and what a model is
conditioned on: a mask of known frames, the latents of a video that is grey everywhere else, and CLIP's view of them.

Letters: T/h/w latent frames/height/width, F video frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.conditioning.clips import clip_lengths, part_of_clip
from wan.conditioning.text import embed
from wan.engine.errors import BadRequest
from wan.engine.types import Condition, Encoders, Request, Shot
from wan.modules.clip import look
from wan.modules.image_embedding import ImageCondition

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "FITS", "ImageInputs", "area_size", "framed", "image_branches", "image_channels", "known_mask", "load_image",
    "look_at", "pixels_of", "resized", "to_rgb",
]  # fmt: skip

FITS = {
    "area": "as many pixels as --size, in the picture's own shape (as upstream)",
    "crop": "exactly --size, cut at the centre",
    "pad": "exactly --size, with black bars",
    "stretch": "exactly --size, distorted",
}
"""How a picture meets the size that was asked for."""


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """RGB pictures that a video begins with and, where `last` is given, ends with; `fit` is one of `FITS`.

    With `extend` it is made clip by clip of so many frames at most, each beginning with the last `extend_overlap` of
    the one before.
    """

    first: Image
    last: Image | None = None
    fit: str = "area"
    extend: int | None = None
    extend_overlap: int = 1

    def clips(self, num_frames: int) -> list[int]:
        """Frames of each clip. Raises BadRequest."""
        if self.extend is None:
            return [num_frames]
        return clip_lengths(num_frames, self.extend, self.extend_overlap)

    def pictures(self, width: int, height: int) -> list[Image]:
        """Each at its own resolution and in the video's shape; a last one of another shape is cut to the first's."""
        from PIL import Image, ImageOps

        pictures = [framed(self.first, width, height, self.fit)]
        if self.last is not None:
            last = framed(self.last, width, height, self.fit)
            same = last.size == pictures[0].size
            pictures.append(last if same else ImageOps.fit(last, pictures[0].size, Image.Resampling.LANCZOS))
        return pictures


def image_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    """Both branches see the same pictures, through CLIP where the model has it; they differ in the text alone."""
    given: ImageInputs = request.inputs
    clips = given.clips(request.num_frames)
    prompt = request.prompt if given.extend is None else part_of_clip(request.prompt, shot.index, len(clips))
    context = encoders.once(f"text {prompt}", lambda: embed(encoders, [request.negative_prompt, prompt]))
    pictures = given_pictures(given, request, shot, clips)
    first = [pictures[number] for number in pictures if number in (0, clips[shot.index] - 1)]
    image = look_at(encoders, first) if "clip_checkpoint" in encoders.config else None
    frames = {
        number: resized(picture, request.width, request.height, antialias=given.fit != "area")
        for number, picture in pictures.items()
    }
    channels = image_channels(encoders, frames, clips[shot.index])
    branch = ImageCondition(context=context[:1], channels=channels, image=image)
    return {"uncond": branch, "cond": dataclasses.replace(branch, context=context[1:], memo={})}


def given_pictures(given: ImageInputs, request: Request, shot: Shot, clips: Sequence[int]) -> dict[int, Tensor]:
    """Number in the clip -> [3, h, w] in -1..1 of the frames it is given: pictures, or the end of the clip before."""
    pictures = [pixels_of(picture) for picture in given.pictures(request.width, request.height)]
    before = pictures[:1] if shot.before is None else list(shot.before.unbind(1))
    found = dict(enumerate(before))
    if given.last is not None and shot.index == len(clips) - 1:
        found[clips[-1] - 1] = pictures[1]
    return found


def load_image(path: str | Path, flag: str = "--image") -> Image:
    """The picture in a file, upright and RGB; of an animation the first frame.

    Raises BadRequest naming `flag` and the file where there is none that can be read.
    """
    from PIL import Image

    given = f"{flag} {str(path)!r}"
    try:
        with Image.open(Path(path).expanduser()) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise BadRequest(f"{given}: there is no such file") from error
    except IsADirectoryError as error:
        raise BadRequest(f"{given} is a folder; name a picture in it") from error
    except Image.UnidentifiedImageError as error:
        raise BadRequest(f"{given} is no picture that can be read; save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise BadRequest(f"{given} is too large ({error}); save it smaller") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's words for files that are damaged
        reason = getattr(error, "strerror", None) or error
        raise BadRequest(f"{given} cannot be read ({reason}); save it again as PNG or JPEG") from error


def to_rgb(image: Image) -> Image:
    """8-bit RGB of any PIL image: turned as its EXIF says, 16 bits brought to 8, transparency laid over white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _eight_bits(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Grey values of more than 8 bits brought to 0..255; Pillow's own conversion cuts them off there."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = float(values.max(initial=0.0))
    # 32-bit integers hold 8 or 16 bits, floats also 0..1; what the file does not say the largest value tells.
    ranges = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    top = next((each for each in ranges if peak <= each), peak)
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def pixels_of(image: Image) -> Tensor:
    """float32 [3, height, width] in -1..1 of an RGB picture, by upstream's order of operations."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def area_size(
    width: int, height: int, max_area: int, *, stride: Sequence[int] = (4, 8, 8), patch: Sequence[int] = (1, 2, 2)
) -> tuple[int, int]:
    """Upstream's (width, height) for a picture of that shape and at most `max_area` pixels.

    Every rounding is upstream's (wan/image2video.py), so a picture of 832 x 480 at 480p gives 832 x 464.
    """
    aspect = height / width
    rows = round(math.sqrt(max_area * aspect) // stride[1] // patch[1] * patch[1])
    columns = round(math.sqrt(max_area / aspect) // stride[2] // patch[2] * patch[2])
    if not rows or not columns:
        raise BadRequest(
            f"a picture of {width}x{height} pixels is too narrow for a video of {max_area} pixels: cut it, or choose "
            "--fit crop or --fit pad"
        )
    return columns * stride[2], rows * stride[1]


def framed(image: Image, width: int, height: int, fit: str) -> Image:
    """The picture cut or padded to the shape of width x height, at its own resolution; "area" and "stretch" keep it."""
    from PIL import ImageOps

    if fit not in FITS:
        raise BadRequest(f"fit={fit!r} is unknown; use {', '.join(FITS)}")
    if fit not in ("crop", "pad") or image.width * height == image.height * width:
        return image
    wide = image.width * height > image.height * width
    if wide == (fit == "crop"):
        across, down = max(1, round(image.height * width / height)), image.height
    else:
        across, down = image.width, max(1, round(image.width * height / width))
    if fit == "pad":
        return ImageOps.pad(image, (max(across, image.width), max(down, image.height)), color="black")
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def resized(pixels: Tensor, width: int, height: int, *, antialias: bool) -> Tensor:
    """[3, height, width] of pixels [3, h, w], bicubic. Upstream takes no care of aliasing; a fit of ours does."""
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=antialias)[0]


def known_mask(known: Sequence[int], num_frames: int, height: int, width: int, *, rate: int = 4) -> Tensor:
    """[rate, T, height, width], 1 where the video frames with these numbers are known.

    A latent frame holds `rate` video frames, one channel each; the first one holds frame 0 alone, `rate` times.
    """
    frames = torch.zeros(num_frames)
    frames[list(known)] = 1
    entries = torch.cat([frames[:1].expand(rate), frames[1:]]).view(-1, rate)
    return entries.t()[:, :, None, None].expand(-1, -1, height, width)


def image_channels(encoders: Encoders, frames: Mapping[int, Tensor], num_frames: int) -> Tensor:
    """[1, 4 + z, T, h, w] on the engine's device: the mask of `frames` [3, H, W] by number, and the video's latents.

    The video is 0 (grey) where no frame is given.
    """
    with encoders.use("vae") as vae:
        device = next(vae.parameters()).device
        given = {number: frame.to(device)[None] for number, frame in frames.items()}
        latents = vae.encode_sparse(given, num_frames, tiling=encoders.tiling)
    latents = latents.to(encoders.device, torch.float32)
    mask = known_mask(list(frames), num_frames, *latents.shape[3:], rate=encoders.config.vae_stride[0])
    return torch.cat([mask[None].to(latents), latents], dim=1)


def look_at(encoders: Encoders, pictures: Sequence[Tensor]) -> Tensor:
    """[1, I, D] on the engine's device: CLIP's hidden states of pictures [3, h, w], one after the other."""
    with encoders.use("clip") as tower:
        hidden = look(tower.visual, [picture[:, None] for picture in pictures])
    return hidden.to(encoders.device).flatten(0, 1)[None]
