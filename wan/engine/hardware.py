"""What this machine is, asked once. With `wan.cli.env` the only reader of the process environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device a process runs on. `sm` is the compute capability, (0, 0) on a CPU; memory is in bytes."""

    device: torch.device
    name: str
    sm: tuple[int, int] = (0, 0)
    total_memory: int = 0
    free_memory: int = 0
    rank: int = 0
    world_size: int = 1
    here: bool = True
    """False for a card that is only looked at: what is installed on its machine is not known."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def __str__(self) -> str:
        if not self.is_cuda or not self.here:
            return self.name if self.here else f"{self.name}, which is not here"
        free, total = self.free_memory / 2**30, self.total_memory / 2**30
        return f"{self.name} (sm_{self.sm[0]}{self.sm[1]}, {free:.1f} of {total:.1f} GiB free)"


def world() -> tuple[int, int, int]:
    """Rank, world size and local rank as torchrun sets them; (0, 1, 0) in a single process."""
    return tuple(
        int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )  # type: ignore[return-value]


REPEATABLE_CUBLAS = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same bits every time."""


def fix_cublas_workspaces() -> str:
    """CUBLAS_WORKSPACE_CONFIG, set to the first of `REPEATABLE_CUBLAS` where it is not. Read with the first product."""
    return os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", REPEATABLE_CUBLAS[0])


def probe(device: str | torch.device | None = None, device_id: int = 0) -> Hardware:
    """The hardware behind `device`; None picks `cuda:{device_id}` where CUDA works and the CPU elsewhere."""
    rank, world_size, _ = world()
    if device is None:
        device = f"cuda:{device_id}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        name = f"{device.type.upper()} ({torch.get_num_threads()} threads)"
        return Hardware(device=device, name=name, rank=rank, world_size=world_size)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Hardware(
        device=device,
        name=properties.name,
        sm=(properties.major, properties.minor),
        total_memory=total,
        free_memory=free,
        rank=rank,
        world_size=world_size,
    )
