"""The picture of README: what the demo model makes of a few prompts, one clip a row."""

from __future__ import annotations

from pathlib import Path

from . import scenes
from .evaluate import sampled

PROMPTS = (
    "a large red circle moves slowly to the right on a black striped background",
    "a small yellow triangle slides quickly toward the upper left corner on a white dotted background",
    "a blue square grows on a gray checkered background",
    "a big green disc drifts gently from right to left over a plain dark backdrop",
)
SHOWN = (0, 8, 16, 24, 32)
GAP, ENLARGED = 4, 2


def draw(folder: Path, out: Path, seed: int = 42) -> None:
    """Clips of PROMPTS by the checkpoint in `folder`, as a PNG of some of their frames side by side."""
    from PIL import Image

    import wan
    from wan.configs import WAN_CONFIGS

    side = scenes.SIDE + GAP
    pipe = wan.WanT2V(WAN_CONFIGS["t2v-demo"], str(folder), device="cpu")
    sheet = Image.new("RGB", (len(SHOWN) * side - GAP, len(PROMPTS) * side - GAP), "white")
    for row, prompt in enumerate(PROMPTS):
        clip = sampled(pipe, prompt, seed)
        for column, number in enumerate(SHOWN):
            sheet.paste(scenes.picture(clip[:, number]), (column * side, row * side))
    sheet.resize((sheet.width * ENLARGED, sheet.height * ENLARGED), Image.Resampling.NEAREST).save(out, optimize=True)
