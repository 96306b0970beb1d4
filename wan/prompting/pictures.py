"""Pictures as a language model gets them: upright, RGB, no larger than it can look at."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    Source = str | os.PathLike[str] | Image.Image


def read_pictures(source: Source | Sequence[Source] | None, max_area: int) -> list[Image.Image]:
    """The picture or pictures as RGB of at most `max_area` pixels. Raises BadRequest for a file that is none."""
    if source is None:
        return []
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [_read(each, max_area) for each in source]
    return [_read(source, max_area)]


def data_url(picture: Image.Image) -> str:
    """The picture as text that stands for its address."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _read(source: Source, max_area: int) -> Image.Image:
    from PIL import Image

    from wan.conditioning.image import load_image, to_rgb

    picture = to_rgb(source) if isinstance(source, Image.Image) else load_image(os.fspath(source), "picture")
    scale = math.sqrt(max_area / (picture.width * picture.height))
    if scale >= 1:
        return picture
    width, height = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    width = min(width, max_area // height)  # a line of pixels is still one pixel high
    return picture.resize((width, min(height, max_area // width)), Image.Resampling.LANCZOS)
