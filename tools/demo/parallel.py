"""What every training here needs: one process per core, gradients averaged as one flat vector, wall-clock schedules,
averaged weights, and the optimizer of the hidden matrices.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def launch(worker: Callable[..., None], world: int, *arguments: Any) -> None:
    """Runs `worker(rank, world, *arguments)` in `world` single-threaded processes that share a gloo group."""
    rendezvous = Path(tempfile.mkdtemp(prefix="train_demo_")) / "rendezvous"
    if world == 1:
        worker(0, 1, *arguments)
        return
    mp.spawn(_enter, (world, str(rendezvous), worker, arguments), nprocs=world)


def _enter(rank: int, world: int, rendezvous: str, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    worker(rank, world, *arguments)
    dist.destroy_process_group()


def average_gradients(params: Iterable[Tensor], world: int) -> None:
    """Replaces every gradient by its mean over the processes."""
    if world == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()


class Clock:
    """How much of the time allowed has passed. All processes follow rank 0's, so that they stop at the same step."""

    def __init__(self, seconds: float, world: int) -> None:
        self._start, self._seconds, self._world = time.monotonic(), seconds, world

    def done(self) -> float:
        """The share 0..1 of the time that has passed."""
        share = torch.tensor([(time.monotonic() - self._start) / self._seconds])
        if self._world > 1:
            dist.broadcast(share, 0)
        return min(1.0, float(share))

    def shares(self, until: float = 1.0) -> Iterator[float]:
        """`done()` before every step while it is below `until`; there is a first step even where no time is left."""
        share = min(self.done(), math.nextafter(until, 0.0))
        while share < until:
            yield share
            share = self.done()


def cosine(done: float, floor: float = 0.02) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """An exponential moving average of parameters."""

    def __init__(self, params: dict[str, Tensor], decay: float) -> None:
        self.values = {name: value.detach().clone() for name, value in params.items()}
        self._decay, self._count = decay, 0

    @torch.no_grad()
    def update(self, params: dict[str, Tensor]) -> None:
        self._count += 1
        decay = min(self._decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(list(self.values.values()), [params[name].detach() for name in self.values], 1 - decay)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, matrices of one shape together.

    The update is scaled to AdamW's usual size, 0.2 sqrt(max(rows, columns)). Source: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(param.shape, []).append(param)
        groups = [{"params": alike} for alike in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike, state = group["params"], self.state[group["params"][0]]
            grads = torch.stack([p.grad for p in alike])
            buffer = state.setdefault("momentum", torch.zeros_like(grads))
            buffer.lerp_(grads, 1 - group["momentum"])
            update = orthogonalized(grads.lerp_(buffer, group["momentum"]))
            rows, columns = grads.shape[1:]
            step = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for param, direction in zip(alike, update, strict=True):
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=step)


def orthogonalized(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[K, M, N] -> about the nearest matrices with all singular values equal to one, float32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    x = x.transpose(1, 2) if tall else x
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return (x.transpose(1, 2) if tall else x).float()
