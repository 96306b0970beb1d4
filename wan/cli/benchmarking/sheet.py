"""The picture of a survey: one clip of each case, frames side by side, so that a loss can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 9
SIDE = 96
"""Frames of a clip that are shown, and the height they are shrunk to, at most."""
TEXT = 13


def strip(frames: Any) -> Image:
    """Frames [N, H, W, 3] spread over a clip, the first and the last among them."""
    import numpy as np
    from PIL import Image

    count = min(SHOWN, len(frames))
    chosen = [frames[round(place * (len(frames) - 1) / max(count - 1, 1))] for place in range(count)]
    picture = Image.fromarray(np.concatenate([np.asarray(each) for each in chosen], axis=1))
    height = min(SIDE, picture.height)
    return picture.resize((round(picture.width * height / picture.height), height))


def save_sheet(path: Path, strips: Sequence[tuple[str, Path]]) -> None:
    """One row for each (label, picture) whose picture is there. Raises OSError."""
    from PIL import Image, ImageDraw, ImageFont

    rows = [(label, Image.open(file)) for label, file in strips if file.is_file()]
    if not rows:
        return
    height = sum(image.height + TEXT + 5 for _, image in rows)
    sheet = Image.new("RGB", (max(image.width for _, image in rows), height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for label, image in rows:
        draw.text((2, top + 1), label, fill="black", font=ImageFont.load_default(TEXT - 2))
        sheet.paste(image, (0, top + TEXT + 2))
        top += image.height + TEXT + 5
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
