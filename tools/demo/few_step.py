"""Distils the demo's two experts into LoRAs that draw in four steps without guidance what they draw in twenty with it.

The way from noise to a clip is deterministic, so a student step has one right answer: from where the teacher is at a
noise level of the student, the straight way to where it is at the next. The first round learns that on the teacher's
own way. There the student drifts off in use, so the second round asks the teacher to go on from where the student is.
Clips need no data but captions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan.engine.sampling.solvers import UniPC
from wan.engine.types import Step

from . import dit, scenes, text
from .adapter import adapted
from .dit_train import BOUNDARY, SHIFT
from .export import EXPERTS, stored
from .parallel import Average, Clock, Muon

LEVELS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
"""Noise levels between the student's steps; the first two steps are the high-noise expert's."""
PIECES = (4, 4, 5, 7)
"""Teacher steps in each student step: 20, spread over the noise levels as its own schedule spreads them."""
OWN = {"high": (0, 1), "low": (2, 3)}
GUIDANCE = 4.0
SHAPE = (16, 9, 12, 12)  # of a clip's latents
FIRST = 0.999  # UniPC's noise level for pure noise

Velocity = Callable[[Tensor, float, Tensor], Tensor]
"""(latents, noise level, texts) -> velocity."""


@dataclass(frozen=True, kw_only=True)
class FewStepTraining:
    """One round. `collecting` and `training` are seconds, `batch` is that of each process."""

    collecting: float = 300.0
    training: float = 480.0
    batch: int = 16
    rank: int = 16
    matrix_rate: float = 5e-3  # Muon
    other_rate: float = 2e-3  # AdamW
    decay_from: float = 0.4
    average: float = 0.99
    seed: int = 201
    compiled: bool = True
    model: dit.DitConfig = dit.DitConfig()


def teacher_levels(number: int) -> list[float]:
    """The noise levels the teacher visits in a student step, both ends included, even before the shift."""
    first, last = (sigma / (SHIFT - (SHIFT - 1) * sigma) for sigma in LEVELS[number : number + 2])
    pieces = PIECES[number]
    even = [first + (last - first) * i / pieces for i in range(pieces + 1)]
    levels = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in even]
    return [min(levels[0], FIRST), *levels[1:-1], LEVELS[number + 1]]


def travel(velocity: Velocity, latents: Tensor, context: Tensor, number: int) -> Tensor:
    """Where the teacher gets from `latents` in the time of the student's step `number`."""
    levels = teacher_levels(number)
    steps = tuple(Step(i, len(levels) - 1, 1000 * a, a, b) for i, (a, b) in enumerate(pairwise(levels)))
    solver = UniPC(steps)
    for step in steps:
        latents = solver.step(velocity(latents, step.sigma, context), step, latents)
    return latents


class Networks:
    """Teacher and, once there is one, student of a run."""

    def __init__(self, config: FewStepTraining, work: Path, block: Callable[..., Tensor]) -> None:
        self._config, self._block = config, block
        saved = {name: torch.load(work / f"{name}.pt", weights_only=True) for name in EXPERTS}
        self._teacher = {name: dit.compute_copy(saved[name]["dit"]) for name in EXPERTS}
        self._student: dict[str, dit.Params] = {}
        for name in EXPERTS:
            if (file := student_file(work, name)).exists():
                trained = torch.load(file, weights_only=True)
                self._student[name] = dit.compute_copy(adapted(saved[name]["dit"], trained))
        self.encoder = text.build_encoder(text.TextConfig(), config.seed)
        self.encoder.load_state_dict(saved["high"]["text"])
        self._nothing = text.embed(self.encoder, [[text.EOS]], config.model.text_len)

    def guided(self, latents: Tensor, sigma: float, context: Tensor) -> Tensor:
        """The teacher's velocity: both branches as one batch."""
        params = self._teacher["high" if sigma >= BOUNDARY else "low"]
        texts = torch.cat([self._nothing.expand_as(context), context])
        levels = torch.full((len(texts),), sigma)
        twice = torch.cat([latents, latents])
        without, given = dit.velocity(params, self._config.model, twice, levels, texts, self._block).chunk(2)
        return without + GUIDANCE * (given - without)

    def stepped(self, latents: Tensor, number: int, context: Tensor) -> Tensor:
        """Where the student gets in its step `number`."""
        params = self._student[next(name for name in EXPERTS if number in OWN[name])]
        levels = torch.full((len(latents),), LEVELS[number])
        velocity = dit.velocity(params, self._config.model, latents, levels, context, self._block)
        return latents + (LEVELS[number + 1] - LEVELS[number]) * velocity

    @property
    def has_student(self) -> bool:
        return bool(self._student)


def student_file(work: Path, name: str) -> Path:
    """Where an expert's LoRA is kept between stages."""
    return work / f"few_step_{name}.pt"


@torch.no_grad()
def collect(rank: int, world: int, config: FewStepTraining, work: Path, out: Path) -> None:
    """Ways of the teacher for `config.collecting` seconds, in {"latents", "velocity", "context"} to `out`_RANK.pt.

    `latents` [N, 4, ...] are where each student step begins, `velocity` leads from there to where the teacher gets.
    Steps begin where the student's last one ended once there is a student, else where the teacher's did.
    """
    rng = random.Random(config.seed * 1000 + rank)
    generator = torch.Generator().manual_seed(config.seed * 1000 + rank)
    networks = Networks(config, work, dit.block_forward)
    combos, tokenizer = scenes.split_combos()["train"], text.WordTokenizer()
    kept: dict[str, list[Tensor]] = {"latents": [], "velocity": [], "context": []}
    for _ in Clock(config.collecting, 1).shares():
        captions = [_caption(rng, combos) for _ in range(config.batch)]
        context = text.embed(networks.encoder, [tokenizer(each) for each in captions], config.model.text_len)
        latents = torch.randn(config.batch, *SHAPE, generator=generator)
        begun, velocities = [], []
        for number, (now, after) in enumerate(pairwise(LEVELS)):
            reached = travel(networks.guided, latents, context, number)
            begun.append(latents)
            velocities.append((reached - latents) / (after - now))
            latents = networks.stepped(latents, number, context) if networks.has_student else reached
        for name, value in (("latents", torch.stack(begun, 1)), ("velocity", torch.stack(velocities, 1))):
            kept[name].append(value.half())
        kept["context"].append(context.half())
    torch.save({name: torch.cat(values) for name, values in kept.items()}, out.with_name(f"{out.name}_{rank}.pt"))
    print(f"few_step: {sum(map(len, kept['context']))} ways collected", flush=True)


def _caption(rng: random.Random, combos: list[scenes.Combo]) -> str:
    return scenes.caption(scenes.random_scene(rng, rng.choice(combos)), rng, complete=rng.random() < 0.5)


def init_lora(base: dit.Params, rank: int, seed: int) -> dit.Params:
    """Pairs for every matrix of the DiT; they change nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    trained = {}
    for key in (key for key, value in base.items() if value.ndim == 2 and key.endswith(".weight")):
        rows, columns = base[key].shape
        layer = key.removesuffix(".weight")
        trained[f"{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        trained[f"{layer}.lora_B.weight"] = torch.zeros(rows, rank)
    return trained


def distil(rank: int, world: int, config: FewStepTraining, work: Path, files: list[Path]) -> None:
    """Trains the LoRA of one expert, EXPERTS[rank], for `config.training` seconds on the ways in `files`."""
    name = EXPERTS[rank]
    base = torch.load(work / f"{name}.pt", weights_only=True)["dit"]
    out = student_file(work, name)
    params = torch.load(out, weights_only=True) if out.exists() else init_lora(base, config.rank, config.seed)
    for value in params.values():
        value.requires_grad_()
    begun, velocities, contexts = _ways(files, OWN[name])
    heads = [value for key, value in params.items() if key.startswith("head")]
    matrices = [value for key, value in params.items() if not key.startswith("head")]
    optimizers = [
        Muon(matrices, lr=config.matrix_rate),
        torch.optim.AdamW(heads, lr=config.other_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    block = torch.compile(dit.block_forward, dynamic=False) if config.compiled else dit.block_forward
    average = Average(params, config.average)
    generator = torch.Generator().manual_seed(config.seed + rank)
    step, reported, losses = 0, time.monotonic(), []
    for done in Clock(config.training, 1).shares():
        clips = torch.randint(len(contexts), (config.batch,), generator=generator)
        which = torch.arange(config.batch) % len(OWN[name])
        levels = torch.tensor([LEVELS[OWN[name][i]] for i in which.tolist()])
        weights = dit.compute_copy(adapted(base, params))
        latents, wanted = begun[clips, which].float(), velocities[clips, which].float()
        predicted = dit.velocity(weights, config.model, latents, levels, contexts[clips].float(), block)
        loss = (predicted - wanted).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        falling = 1.0 if config.decay_from >= 1 else min(1.0, (1 - done) / (1 - config.decay_from))
        for rate, group in zip(rates, (g for o in optimizers for g in o.param_groups), strict=True):
            group["lr"] = rate * falling * min(1.0, (step + 1) / 20)
        for optimizer in optimizers:
            optimizer.step()
        average.update(params)
        step += 1
        losses.append(float(loss.detach()))
        if time.monotonic() - reported > 30 or done == 0:
            reported = time.monotonic()
            print(f"few_step {name} {done:.3f} step {step} loss {_recent(losses):.4f}", flush=True)
    torch.save(average.values, out)
    print(f"few_step {name} done: {step} steps on {len(contexts)} ways, loss {_recent(losses):.4f}", flush=True)


def _recent(losses: list[float]) -> float:
    return sum(losses[-50:]) / len(losses[-50:])


def _ways(files: list[Path], own: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What `collect` left, of some of the student's steps: latents, velocity and context."""
    read = [torch.load(file, weights_only=True, mmap=True) for file in files]
    cut = {name: torch.cat([each[name][:, list(own)] for each in read]) for name in ("latents", "velocity")}
    return cut["latents"], cut["velocity"], torch.cat([each["context"] for each in read])


def export_loras(work: Path, folder: Path) -> None:
    """The LoRAs as `--lora_high` and `--lora_low` read them, in `folder`/few_step."""
    place = folder / "few_step"
    place.mkdir(parents=True, exist_ok=True)
    for name in EXPERTS:
        trained = stored(torch.load(student_file(work, name), weights_only=True))
        named = {f"diffusion_model.{key}": value for key, value in trained.items()}
        save_file(named, place / f"{name}.safetensors", metadata={"format": "pt"})
