"""Trains the demo's VAE: first colour and layout from nothing, then the outlines."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes
from .parallel import Average, Clock, average_gradients, cosine
from .vae import Params, Z, compute_copy, decode, encode, init_params


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a step sees until `until`, a share of the time allowed."""

    until: float
    batch: int
    frames: int
    side: int


@dataclass(frozen=True, kw_only=True)
class VaeTraining:
    """One run. The defaults learn colour and layout from nothing; `SHARPENING` then pays for outlines."""

    base: int = 8
    res_blocks: int = 1
    seconds: float = 1260.0
    stop_at: float = 1.0  # share of the time at which to stop, schedules unfinished
    clips: int = 600  # rendered ahead per process; one is replaced every few steps
    rate: float = 4e-3
    kl: float = 1e-3  # per latent value, against errors per pixel
    kl_ramp: float = 0.4  # share of the time until the weight is whole
    edges: tuple[float, float] = (0.3, 0.5)  # shares of the time between which the gradient loss comes in
    importance: float = 2.0  # extra weight of pixels on and near the object
    stages: tuple[Stage, ...] = (
        Stage(until=0.06, batch=16, frames=1, side=48),
        Stage(until=0.28, batch=8, frames=5, side=48),
        Stage(until=0.68, batch=8, frames=9, side=48),
        Stage(until=1.0, batch=1, frames=17, side=96),
    )
    seed: int = 1


SHARPENING = VaeTraining(
    seconds=660.0, rate=2e-3, kl=4e-4, kl_ramp=0.0, edges=(-1.0, 0.0), importance=7.0, seed=2,
    stages=(Stage(until=0.6, batch=8, frames=9, side=48), Stage(until=1.0, batch=1, frames=17, side=96)),
)  # fmt: skip


class ClipPool:
    """Rendered training clips, kept as bytes, from which crops are cut; most crops show the object."""

    def __init__(self, count: int, combos: list[scenes.Combo], seed: int) -> None:
        self._rng = random.Random(seed)
        self._combos = combos
        self._scenes: list[scenes.Scene] = []
        self._clips = torch.empty(count, 3, scenes.FRAMES, scenes.SIDE, scenes.SIDE, dtype=torch.uint8)
        for index in range(count):
            self._scenes.append(self._draw(index))

    def _draw(self, index: int) -> scenes.Scene:
        scene = scenes.random_scene(self._rng, self._rng.choice(self._combos))
        self._clips[index] = ((scenes.render([scene])[0] + 1) * 127.5).round().byte()
        return scene

    def refresh(self) -> None:
        index = self._rng.randrange(len(self._scenes))
        self._scenes[index] = self._draw(index)

    def crops(self, batch: int, frames: int, side: int) -> Tensor:
        """[batch, 3, frames, side, side] in [-1, 1], bfloat16, channels last."""
        out = torch.stack([self._crop(frames, side) for _ in range(batch)])
        return (out.float() / 127.5 - 1).bfloat16().contiguous(memory_format=torch.channels_last_3d)

    def _crop(self, frames: int, side: int) -> Tensor:
        rng, index = self._rng, self._rng.randrange(len(self._scenes))
        scene, first = self._scenes[index], self._rng.randint(0, scenes.FRAMES - frames)
        room = scenes.SIDE - side
        share = (first + frames / 2) / scenes.FRAMES
        corner = []
        for axis in (1, 0):
            centre = scene.start[axis] + (scene.end[axis] - scene.start[axis]) * share
            wanted = centre - side / 2 + rng.uniform(-20, 20) if rng.random() < 0.85 else rng.uniform(0, room)
            corner.append(min(room, max(0, round(wanted))))
        y, x = corner
        return self._clips[index, :, first : first + frames, y : y + side, x : x + side]


def importance_map(video: Tensor, extra: float) -> Tensor:
    """[B, 1, T, H, W] with mean 1: pixels within two of a saturated one weigh 1 + extra times as much as the others."""
    with torch.no_grad():
        saturated = (video - video.mean(1, keepdim=True)).abs().amax(1, keepdim=True) > 0.15
        weight = 1 + extra * F.max_pool3d(saturated.float(), (1, 5, 5), 1, (0, 2, 2))
        return weight / weight.mean()


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    kl: float
    edges: float
    importance: float


def vae_loss(params: Params, video: Tensor, noise: Tensor, by: LossWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, mean squared error, KL in nats per latent value)."""
    weights = compute_copy(params)
    mean, logvar = encode(weights, video)
    mean, logvar = mean.float(), logvar.float().clamp(-20, 4)
    latents = mean + noise * torch.exp(0.5 * logvar)
    shown = decode(weights, latents.bfloat16().contiguous(memory_format=torch.channels_last_3d)).float()
    target = video.float()
    importance = importance_map(target, by.importance)
    error = shown - target
    loss = (importance * (error.abs() + error.square())).mean()
    if by.edges:
        across = (importance[..., 1:] * error.diff(dim=-1).abs()).mean()
        along = (importance[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        loss = loss + by.edges * (across + along)
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
    return loss + by.kl * kl, error.detach().square().mean(), kl.detach()


@torch.no_grad()
def psnr(params: Params, video: Tensor) -> float:
    weights = compute_copy(params)
    shown = decode(weights, encode(weights, video.bfloat16())[0]).float().clamp(-1, 1)
    return -10 * math.log10(float((shown - video).square().mean()) / 4)


def train_vae(rank: int, world: int, config: VaeTraining, out: Path, start: Path | None = None) -> None:
    """Trains for `config.seconds`, from `start` or from nothing, and writes the averaged weights to `out`.

    They are float32 and not normalised yet, see `fold_normalization`.
    """
    combos = scenes.split_combos()
    pool = ClipPool(config.clips, combos["train"], config.seed + 100 * rank)
    rng = random.Random(99)
    held_out = scenes.render([scenes.random_scene(rng, rng.choice(combos["validation"])) for _ in range(4)])
    params = (
        init_params(config.base, config.res_blocks, config.seed)
        if start is None
        else torch.load(start, weights_only=True)
    )
    for value in params.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(
        list(params.values()), lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
    )
    average = Average(params, 0.998)
    generator = torch.Generator().manual_seed(config.seed + rank)
    clock, step, reported = Clock(config.seconds, world), 0, time.monotonic()
    for done in clock.shares(config.stop_at):
        stage = next(stage for stage in config.stages if done < stage.until)
        video = pool.crops(stage.batch, stage.frames, stage.side)
        noise = torch.randn(
            stage.batch, Z, (stage.frames - 1) // 4 + 1, stage.side // 8, stage.side // 8, generator=generator
        )
        by = LossWeights(
            kl=config.kl * (min(1.0, 0.2 + 0.8 * done / config.kl_ramp) if config.kl_ramp else 1.0),
            edges=0.5 * min(1.0, max(0.0, (done - config.edges[0]) / (config.edges[1] - config.edges[0]))),
            importance=config.importance,
        )
        loss, error, nats = vae_loss(params, video, noise, by)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(params.values(), world)
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1) / 50) * cosine(done)
        optimizer.step()
        average.update(params)
        step += 1
        if step % 5 == 0:
            pool.refresh()
        if rank == 0 and time.monotonic() - reported > 30:
            reported = time.monotonic()
            decibel = -10 * math.log10(float(error) / 4)
            print(f"vae {done:.3f} step {step} loss {loss.item():.4f} batch {decibel:.1f} dB KL {nats.item():.2f} "
                  f"held out {psnr(average.values, held_out):.2f} dB", flush=True)  # fmt: skip
            torch.save(average.values, out)
    if rank == 0:
        print(f"vae done: {step} steps, held out {psnr(average.values, held_out):.2f} dB", flush=True)
        torch.save(average.values, out)
