"""Prints what attention in fewer bits costs in accuracy: on the demo model's own queries, keys and values, and in the
video it makes. 8 bits are their definition in PyTorch, so no GPU is needed.

    python tools/measure_attention.py [--steps 20]
"""

from __future__ import annotations

import argparse
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
sys.path.insert(0, str(ROOT))

import wan  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.ops.attention import Attend, sdpa  # noqa: E402
from wan.engine.ops.float8_attention import attend_float8  # noqa: E402
from wan.resources import folder  # noqa: E402

PROMPTS = ("a big red circle moves to the right", "a small blue square moves up")


def in_bf16(q: Tensor, k: Tensor, v: Tensor, layout: Any = None) -> Tensor:
    """What an exact backend computes of half-precision inputs."""
    return sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)


def as_stored(form: Attend) -> Attend:
    """A form whose inputs are in bfloat16 first, as they leave a layer."""
    return lambda q, k, v, layout=None: form(*(x.bfloat16().float() for x in (q, k, v)))


FORMS: dict[str, Attend] = {
    "bf16": in_bf16,
    "e4m3, keys smoothed": as_stored(attend_float8),
    "e4m3, keys as they are": as_stored(partial(attend_float8, smooth=False)),
}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a video")
    settings = {"size": (96, 96), "frame_num": 33, "sampling_steps": parser.parse_args().steps}
    config = WAN_CONFIGS["t2v-demo"]
    pipe = wan.WanT2V(config, folder("demo"), device="cpu")
    errors: dict[str, list[float]] = defaultdict(list)
    with attending(pipe, partial(watched, errors)):
        pipe.generate(PROMPTS[0], seed=1, **settings)
    changed: dict[str, list[float]] = defaultdict(list)
    for seed, prompt in enumerate(PROMPTS):
        make = partial(pipe.generate, prompt, seed=seed, **settings)
        plain = make()
        for name, form in FORMS.items():
            with attending(pipe, lambda attend, form=form: form):  # type: ignore[misc]
                changed[name].append(decibels(make(), plain))
    print("| attention in | error, median | error, worst | video, median PSNR | video, worst |")
    print("|---|---|---|---|---|")
    for name, found in errors.items():
        print(
            f"| {name} | {median(found):.4f} | {max(found):.4f} "
            f"| {median(changed[name]):.1f} dB | {min(changed[name]):.1f} dB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
