"""Measures how the demo continues a picture: first frames of scenes never trained on, captions that say what happens
and do not name the object, clips judged from pixels.

Beside the image model stand its control, the text model with the same captions and seeds, which never saw the picture,
and two bounds: the rendered clip, and that clip through the VAE. What is to be kept (colour, shape, size, backdrop) is
what the judge reads in the picture itself; what is to happen is what the scene was drawn with.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from wan.cli.benchmarking.intervals import wilson
from wan.cli.judge import judge

from . import scenes
from .evaluate import cell, drawn, in_two

LABELS = {
    "i2v": "i2v, object not named",
    "i2v full": "i2v, full caption",
    "flf2v": "i2v, last frame too",
    "t2v": "control: t2v, object not named",
    "truth": "ground truth",
    "vae": "VAE reconstruction",
}
KEPT = ("color", "shape", "size", "tone", "texture")
NO_JUMP = 2.0  # times the usual change from frame to frame
NOISE = 0.02  # root mean square of changes that are none, of values in -1..1


def evaluate(folder: Path, split: str, count: int, seed: int) -> dict[str, Any]:
    """Results over `count` scenes of the combinations in `split`, in two single-threaded processes."""
    found, seconds = in_two(_share, folder, split, count, seed)
    result = {"split": split, "clips": count, "seed": seed, "seconds": seconds}
    return result | {row: _summary([entry[row] for entry in found]) for row in LABELS}


def _share(folder: str, split: str, numbers: list[int], seed: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    studio, found = _Studio(Path(folder)), []
    for number, rng, scene in drawn(split, numbers, seed):
        truth = scenes.render([scene])[0]
        clips = studio.clips(scenes.event(scene, rng, complete=True), scenes.caption(scene, rng, True), truth, number)
        found.append({row: _measured(clip, truth, scene) for row, clip in clips.items()})
    return found


class _Studio:
    """Both models, and every row's clip of a scene."""

    def __init__(self, folder: Path) -> None:
        import wan
        from wan.configs import WAN_CONFIGS

        self._text = wan.WanT2V(WAN_CONFIGS["t2v-demo"], folder, device="cpu")
        self._image = wan.WanI2V(WAN_CONFIGS["i2v-demo"], folder / "i2v", device="cpu")

    def clips(self, event: str, full: str, truth: Tensor, seed: int) -> dict[str, Tensor]:
        config, size = self._image.config, (scenes.SIDE, scenes.SIDE)
        common = {
            "frame_num": scenes.FRAMES, "shift": config.sample_shift, "sampling_steps": config.sample_steps,
            "guide_scale": config.sample_guide_scale, "seed": seed,
        }  # fmt: skip
        first, last = (scenes.picture(truth[:, number]) for number in (0, -1))
        from_image = common | {"size": size, "fit": "crop"}
        with torch.no_grad():
            rebuilt = self._text.vae.decode(self._text.vae.encode([truth]))[0]
        return {
            "i2v": self._image.generate(event, first, **from_image),
            "i2v full": self._image.generate(full, first, **from_image),
            "flf2v": self._image.generate(event, first, last_frame=last, **from_image),
            "t2v": self._text.generate(event, size=size, **common),
            "truth": truth,
            "vae": rebuilt,
        }


def _measured(video: Tensor, truth: Tensor, scene: scenes.Scene) -> dict[str, Any]:
    """Everything about one clip: {"right": {attribute: bool}, and numbers}."""
    given, shown, whole = _still(truth[:, 0]), _still(video[:, 0]), judge(video)
    changes = (video[:, 1:] - video[:, :-1]).square().mean((0, 2, 3)).sqrt().tolist()
    usual = median(changes[1:])
    kept = {name: getattr(given, name) for name in KEPT}
    right = {f"frame 0: {name}": ok for name, ok in shown.agrees(**kept).items()}
    # While its size changes, an object has none.
    lasting = {name: value for name, value in kept.items() if name != "size" or scene.size is not None}
    right |= {f"clip: {name}": ok for name, ok in whole.agrees(**lasting).items()}
    right |= whole.agrees(motion=scene.motion, speed=scene.speed)
    right["no jump after frame 0"] = changes[0] <= NO_JUMP * usual + NOISE
    right["object kept and motion obeyed"] = all(
        right[name] for name in ("frame 0: color", "frame 0: shape", "clip: color", "clip: shape", "motion")
    )
    return {
        "right": right,
        "first frame, dB": psnr(video[:, 0], truth[:, 0]),
        "last frame, dB": psnr(video[:, -1], truth[:, -1]),
        "change after frame 0": changes[0],
        "usual change": usual,
        "outline overlap, 0 to 1": judge(video[:, :2]).outline_iou,
        "outline overlap, all": whole.outline_iou,
    }


def _still(frame: Tensor) -> Any:
    """The judge's view of one frame."""
    return judge(torch.stack([frame, frame], 1))


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two pictures with values in -1..1; 60 dB, the rounding to 8 bits, at most."""
    return float(-10 * ((a - b).square().mean() / 4).clamp_min(1e-6).log10())


def _summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    rights: list[dict[str, bool]] = [entry["right"] for entry in entries]
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for right in rights for name in right):
        hits = [right[name] for right in rights if name in right]
        low, high = wilson(sum(hits), len(hits))
        summary[name] = {"right": sum(hits), "of": len(hits), "low": round(low, 4), "high": round(high, 4)}
    for name in (name for name in entries[0] if name != "right"):
        values = [entry[name] for entry in entries if entry[name] is not None]
        summary[name] = round(fmean(values), 4) if values else None
    return summary


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [f"| | {' | '.join(LABELS.values())} |", "|---|" + "---|" * len(LABELS)]
    for name in result["i2v"]:
        cells = ["" if (value := result[row].get(name)) is None else cell(value) for row in LABELS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_into(readme: Path, result: dict[str, Any], results: str) -> None:
    """Puts the table `results` in place of what stands between the marks of the checkpoint's README."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    said = (
        f"{result['clips']} clips of the {result['split']} combinations (seed {result['seed']}), all in `results.json`."
    )
    readme.write_text(f"{before}{begin}{said}\n\n{results}\n{end}{after}", encoding="utf-8")
