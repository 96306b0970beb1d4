"""Prints what options do to the clips of the demo model: distance to plain float32, and whether clips obey as before.

python tools/measure_options.py --clips 24 param_dtype=bfloat16 param_dtype=bfloat16,residual_dtype=bfloat16

Every clip is told as it comes, and its numbers are in the file of --out then: what is interrupted keeps them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import partly  # noqa: E402
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

    def add(self, latents: Tensor, video: Tensor, reference: tuple[Tensor, Tensor], words: dict[str, str]) -> str:
        """Judge a clip beside the plain one, whose own are `reference`, and say what it is like."""
        right = judge(video).agrees(**words)
        self.obeyed.append(all(right[name] for name in ASKED))
        told = "obeys" if self.obeyed[-1] else "does not obey"
        if latents is reference[0]:
            return told
        self.latents.append(float((latents - reference[0]).norm() / reference[0].norm()))
        self.psnr.append(compare(to_pixels(video), to_pixels(reference[1]))[0].get("psnr_db", float("inf")))
        return f"latents differ by {self.latents[-1]:.2e}, {self.psnr[-1]:.1f} dB, {told}"

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
    parser.add_argument("--out", type=Path, help="JSON to write after every clip of every variant")
    args = parser.parse_args()
    names = [PLAIN, *args.variants]
    pipes = [wan.WanT2V(WAN_CONFIGS["t2v-demo"], ROOT / "demo", device="cpu", **options(name)) for name in names]
    found = {name: Found() for name in names}
    try:
        for number in range(args.clips):
            measure(number, pipes, found, args.out)
    finally:
        print(
            "| options | latents differ: median, worst | PSNR of frames, dB: median, worst | colour, shape and motion |"
        )
        print("|---|---|---|---|")
        for name, each in found.items():
            print(each.row(name))


def measure(number: int, pipes: Sequence[Any], found: Mapping[str, Found], out: Path | None) -> None:
    """One clip of all variants, the plain one first."""
    combos = scenes.split_combos()["test"]
    rng = random.Random(f"{SEED}/{number}")
    scene = scenes.random_scene(rng, combos[number % len(combos)])
    prompt = scenes.caption(scene, rng, complete=True)
    reference: tuple[Tensor, Tensor] | None = None
    for pipe, (name, each) in zip(pipes, found.items(), strict=True):
        latents, video = clip(pipe, prompt, number)
        reference = reference or (latents, video)
        print(f"clip {number}, {name}: {each.add(latents, video, reference, scene.words())}", flush=True)
        if out is not None:
            partly.write(out, {"seed": SEED, "clips": {name: asdict(each) for name, each in found.items()}})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
