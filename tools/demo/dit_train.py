"""Trains the demo's DiT: first one network on all noise levels together with the text encoder, then the two experts,
then an adapter of each that continues a given frame.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wan.configs import WAN_CONFIGS

from . import dit, scenes, text
from .adapter import adapted, init_adapter
from .parallel import Average, Clock, Muon, average_gradients
from .vae import compute_copy, normalized_latents

SHIFT = 3.0  # of training and sampling: sigma = 3 u / (1 + 2 u), u uniform
BOUNDARY = WAN_CONFIGS["t2v-demo"].boundary  # sigma from which the high-noise expert works


@dataclass(frozen=True, kw_only=True)
class DitTraining:
    seconds: float = 3300.0
    batch: int = 16  # per process
    first_clips: int = 500  # encoded before the first step, per process
    clips_per_step: float = 1.0  # encoded along the way
    matrix_rate: float = 1e-3  # Muon; at 3e-3 the high-noise expert unlearned what it knew
    other_rate: float = 5e-4  # AdamW
    decay_from: float = 1.0  # share of the time after which the rates fall linearly to zero
    average: float = 0.998
    no_caption: float = 0.1
    seed: int = 5
    compiled: bool = True
    low: float = 0.0  # range of sigma trained on
    high: float = 1.0
    freeze_text: bool = False
    varied: float = 0.0  # share of clips with colours between the palette's, and of captions that name less
    rank: int = 0  # of an adapter to train in place of the whole network
    given: Callable[[dit.Params, Tensor, random.Random], Tensor] | None = None  # channels shown beside the latents
    caption: Callable[[scenes.Scene, random.Random], str] = scenes.caption
    model: dit.DitConfig = field(default_factory=dit.DitConfig)
    words: text.TextConfig = field(default_factory=text.TextConfig)


class LatentPool:
    """Encoded training clips with their scenes. It grows while training runs, so that data never holds it up."""

    def __init__(
        self, vae: dict[str, Tensor], combos: list[scenes.Combo], rng: random.Random, config: DitTraining
    ) -> None:
        self._vae = compute_copy({name: v for name, v in vae.items() if not name.startswith("decoder")})
        self._combos, self._rng, self._given, self._varied = combos, rng, config.given, config.varied
        self._weights = scenes.balanced(combos)
        self._latents: list[Tensor] = []
        self._channels: list[Tensor] = []
        self._scenes: list[scenes.Scene] = []

    def add(self, count: int) -> None:
        for _ in range(count):
            scene = scenes.random_scene(self._rng, self._rng.choices(self._combos, self._weights)[0])
            if self._rng.random() < self._varied:
                scene = scenes.varied(scene, self._rng)
            video = scenes.render([scene])
            latents = normalized_latents(self._vae, video)[0]
            shown = latents[:0] if self._given is None else self._given(self._vae, video[0], self._rng)
            self._latents.append(latents.bfloat16())
            self._channels.append(shown.bfloat16())
            self._scenes.append(scene)

    def batch(self, size: int) -> tuple[Tensor, Tensor, list[scenes.Scene]]:
        """Latents, what is shown beside them (no channels, or those of given frames), and scenes."""
        chosen = [self._rng.randrange(len(self._latents)) for _ in range(size)]
        latents, shown = (torch.stack([kept[i] for i in chosen]).float() for kept in (self._latents, self._channels))
        return latents, shown, [self._scenes[i] for i in chosen]

    def __len__(self) -> int:
        return len(self._latents)


def draw_sigma(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One noise level per sample, stratified, distributed as the sampler's steps are, within [low, high)."""
    ends = torch.tensor([low, high])
    first, last = (ends / (SHIFT - (SHIFT - 1) * ends)).tolist()  # inverse of the shift
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    u = first + (last - first) * u
    return (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(1e-4, 1.0)


def split_params(params: dict[str, Tensor], encoder: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices for Muon and everything else (gains, biases, embeddings, head, text encoder) for AdamW."""
    matrices = [v for name, v in params.items() if v.ndim == 2 and not name.startswith("head")]
    held = {id(v) for v in matrices}
    return matrices, [v for v in params.values() if id(v) not in held] + [
        v for v in encoder.parameters() if v.requires_grad
    ]


def train_dit(rank: int, world: int, config: DitTraining, vae_file: Path, out: Path, start: Path | None = None) -> None:
    """Trains for `config.seconds` and writes {"dit", "base", "text", "steps"} with averaged weights to `out`.

    With `start` it continues from that file.
    """
    rng = random.Random(config.seed * 1000 + rank)
    generator = torch.Generator().manual_seed(config.seed * 1000 + rank)
    params, base, encoder = _begin(config, start)
    pool = LatentPool(torch.load(vae_file, weights_only=True), scenes.split_combos()["train"], rng, config)
    clock = Clock(config.seconds, world)
    pool.add(config.first_clips)
    tokenizer = text.WordTokenizer()
    block = torch.compile(dit.block_forward, dynamic=False) if config.compiled else dit.block_forward
    matrices, others = split_params(params, encoder)
    optimizers = [
        Muon(matrices, lr=config.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.other_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    averaged = {f"dit.{n}": v for n, v in params.items()} | {f"text.{n}": v for n, v in encoder.named_parameters()}
    average = Average(averaged, config.average)
    step, reported, losses = 0, time.monotonic(), []
    for done in clock.shares():
        latents, shown, drawn = pool.batch(config.batch)
        tokens = [
            [text.EOS] if rng.random() < config.no_caption else tokenizer(config.caption(scene, rng), rng)
            for scene in drawn
        ]
        noise = torch.randn(latents.shape, generator=generator)
        sigma = draw_sigma(config.batch, config.low, config.high, generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        context = text.embed(encoder, tokens, config.model.text_len)
        inputs = torch.cat([(1 - level) * latents + level * noise, shown], 1)
        weights = dit.compute_copy(adapted(base, params))
        predicted = dit.velocity(weights, config.model, inputs, sigma, context, block)
        loss = (predicted - (noise - latents)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        average_gradients([*matrices, *others], world)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = min(1.0, (step + 1) / 100) * min(
            1.0, (1 - done) / max(1e-9, 1 - config.decay_from) if config.decay_from < 1 else 1.0
        )
        for rate, group in zip(rates, (g for o in optimizers for g in o.param_groups), strict=True):
            group["lr"] = rate * scale
        for optimizer in optimizers:
            optimizer.step()
        average.update(averaged)
        step += 1
        losses.append(float(loss.detach()))
        pool.add(int(config.clips_per_step * (step + 1)) - int(config.clips_per_step * step))
        if rank == 0 and time.monotonic() - reported > 30:
            reported = time.monotonic()
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"dit {done:.3f} step {step} clips {world * len(pool)} loss {recent:.4f}", flush=True)
            _save(average, base, step, out)
    if rank == 0:
        recent = sum(losses[-200:]) / len(losses[-200:])
        print(f"dit done: {step} steps, {step * config.batch * world} samples, loss {recent:.4f}", flush=True)
        _save(average, base, step, out)


def _begin(config: DitTraining, start: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor], text.T5Encoder]:
    """What is trained of the DiT, what stays as it is, and the text encoder."""
    encoder, base = text.build_encoder(config.words, config.seed), {}
    if start is None:
        params = dit.init_params(config.model, config.seed)
    else:
        saved = torch.load(start, weights_only=True)
        params, base = saved["dit"], saved["base"]
        encoder.load_state_dict(saved["text"])
    if config.rank and not base:
        base, params = params, init_adapter(params, config.rank, config.model.in_dim, config.seed)
    encoder.requires_grad_(not config.freeze_text)
    for value in params.values():
        value.requires_grad_()
    return params, base, encoder


def _save(average: Average, base: dict[str, Tensor], steps: int, out: Path) -> None:
    parts: dict[str, dict[str, Tensor]] = {"dit": {}, "text": {}}
    for name, value in average.values.items():
        part, key = name.split(".", 1)
        parts[part][key] = value
    temporary = out.with_suffix(".part")
    torch.save({**parts, "base": base, "steps": steps}, temporary)
    temporary.replace(out)
