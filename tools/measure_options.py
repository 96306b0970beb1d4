"""Prints what options do to the clips of the demo model: distance to plain float32, and whether clips obey as before.

python tools/measure_options.py --clips 24 param_dtype=bfloat16 param_dtype=bfloat16,residual_dtype=bfloat16
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo import scenes  # noqa: E402

import wan  # noqa: E402
from wan.cli.benchmarking.quality import compare  # noqa: E402
from wan.cli.judge import judge  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.video import to_pixels  # noqa: E402

SEED = 7
PLAIN = "param_dtype=float32"
ASKED = ("color", "shape", "motion")


@dataclass
class Found:
    """What the clips of one variant are: final latents' distances, pictures' likeness, and who obeyed."""

    latents: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    obeyed: list[bool] = field(default_factory=list)

    def row(self, name: str) -> str:
        said = [f"{statistics.median(each):{spec}}, {worst(each):{spec}}" if each else "-"
                for each, spec, worst in ((self.latents, ".2e", max), (self.psnr, ".1f", min))]  # fmt: skip
        return f"| {name} | {said[0]} | {said[1]} | {sum(self.obeyed)} of {len(self.obeyed)} |"


def options(text: str) -> dict[str, Any]:
    """NAME=VALUE, several with commas; true and false are switches."""
    pairs = (part.split("=", 1) for part in text.split(","))
    return {name: {"true": True, "false": False}.get(value, value) for name, value in pairs}


def clip(pipe: Any, prompt: str, seed: int) -> tuple[Tensor, Tensor]:
    """Final latents and frames [3, n, H, W]."""
    last: list[Tensor] = []
    config = pipe.config
    video = pipe.generate(
        prompt, size=(scenes.SIDE, scenes.SIDE), frame_num=scenes.FRAMES, shift=config.sample_shift, seed=seed,
        sampling_steps=config.sample_steps, guide_scale=config.sample_guide_scale,
        observe=(lambda step, latents: last.append(latents) if step.index + 1 == step.count else None,),
    )  # fmt: skip
    return last[0], video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME=VALUE[,NAME=VALUE...]")
    parser.add_argument("--clips", type=int, default=24)
    args = parser.parse_args()
    names = [PLAIN, *args.variants]
    pipes = [wan.WanT2V(WAN_CONFIGS["t2v-demo"], ROOT / "demo", device="cpu", **options(name)) for name in names]
    found = [Found() for _ in names]
    combos = scenes.split_combos()["test"]
    for number in range(args.clips):
        rng = random.Random(f"{SEED}/{number}")
        scene = scenes.random_scene(rng, combos[number % len(combos)])
        prompt = scenes.caption(scene, rng, complete=True)
        made = [clip(pipe, prompt, number) for pipe in pipes]
        reference, frames = made[0][0], to_pixels(made[0][1])
        for each, (latents, video) in zip(found, made, strict=True):
            right = judge(video).agrees(**scene.words())
            each.obeyed.append(all(right[name] for name in ASKED))
            if latents is not reference:
                each.latents.append(float((latents - reference).norm() / reference.norm()))
                each.psnr.append(compare(to_pixels(video), frames)[0].get("psnr_db", float("inf")))
    print("| options | latents differ: median, worst | PSNR of frames, dB: median, worst | colour, shape and motion |")
    print("|---|---|---|---|")
    for name, each in zip(names, found, strict=True):
        print(each.row(name))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
