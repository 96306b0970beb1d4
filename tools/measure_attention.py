"""Measures what attention in fewer bits costs in accuracy: on the demo model's own queries, keys and values, and in the
videos it makes. Attention in 8 bits is its definition in PyTorch, so no GPU is needed.

    python tools/measure_attention.py --out docs/benchmarks/attention/cpu.json

Every row is told and on the disk as soon as it is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import partly  # noqa: E402

import wan  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.ops.attention import Attend, InCodes, sdpa  # noqa: E402
from wan.engine.ops.float8 import Quantized  # noqa: E402
from wan.engine.ops.float8_attention import attend_float8  # noqa: E402

PROMPTS = ("a big red circle moves to the right", "a small blue square moves up")


def in_bf16(q: Tensor, k: Tensor, v: Tensor, layout: Any = None) -> Tensor:
    """What an exact backend makes of half-precision inputs."""
    return sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)


def in_codes(q: Tensor | Quantized, k: Tensor, v: Tensor, layout: Any = None, *, smooth: bool = True) -> Tensor:
    """Attention in 8 bits of keys and values in bfloat16, as they leave their layers; queries may be in codes."""
    q = q if isinstance(q, Quantized) else q.bfloat16().float()
    return attend_float8(q, k.bfloat16().float(), v.bfloat16().float(), smooth=smooth)


FORMS: dict[str, Attend] = {
    "bf16": in_bf16,
    "e4m3, keys smoothed": in_codes,
    "e4m3, keys as they are": partial(in_codes, smooth=False),
}
"""What an attention's output is compared under; videos are made under `VIDEOS`."""
VIDEOS = FORMS | {"e4m3, keys smoothed, queries rounded in their norm": InCodes(in_codes)}


@contextmanager
def attending(pipe: Any, wrap: Callable[[Attend], Attend]) -> Iterator[None]:
    """Self-attention of both experts, wrapped."""
    layers = [block.self_attn for dit in (pipe.high_noise_model, pipe.low_noise_model) for block in dit.blocks]
    before = [layer.attend for layer in layers]
    try:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = wrap(attend)
        yield
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend


def watched(errors: dict[str, list[float]], attend: Attend) -> Attend:
    """`attend`, noting for each sample and head how far every form is from it."""

    def run(q: Tensor, k: Tensor, v: Tensor, layout: Any = None) -> Tensor:
        exact = attend(q, k, v, layout)
        for name, form in FORMS.items():
            apart = (form(q, k, v) - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))
            errors[name] += apart.flatten().tolist()
        return exact

    return run


def decibels(video: Tensor, reference: Tensor) -> float:
    """PSNR; values span 2."""
    return float(10 * torch.log10(4 / (video - reference).square().mean()))


def rows(pipe: Any, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The error of every form in one clip, then the distance of every clip that is made under one."""
    errors: dict[str, list[float]] = defaultdict(list)
    with attending(pipe, partial(watched, errors)):
        pipe.generate(PROMPTS[0], seed=1, **settings)
    for name, found in errors.items():
        yield {"attention": name, "heads": len(found), "error": median(found), "worst": max(found)}
    for seed, prompt in enumerate(PROMPTS):
        plain = pipe.generate(prompt, seed=seed, **settings)
        for name, form in VIDEOS.items():
            with attending(pipe, lambda attend, form=form: form):  # type: ignore[misc]
                video = pipe.generate(prompt, seed=seed, **settings)
            yield {"attention": name, "clip": prompt, "seed": seed, "psnr_db": decibels(video, plain)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a video")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write after every row")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = {
        "command": f"python tools/measure_attention.py --steps {args.steps} --out {args.out}",
        "commit": commit.stdout.strip(), "torch": torch.__version__, "rows": [],
    }  # fmt: skip
    pipe = wan.WanT2V(WAN_CONFIGS["t2v-demo"], ROOT / "demo", device="cpu")
    for row in rows(pipe, {"size": (96, 96), "frame_num": 33, "sampling_steps": args.steps}):
        result["rows"].append(
            {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        )
        partly.write(args.out, result)
        print(result["rows"][-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
