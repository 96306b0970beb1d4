"""How much memory this process has needed at most: on the GPU what torch allocated, else what was resident in RAM."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak(device: torch.device) -> None:
    """Let the peaks begin at what is in use now. Of RAM only Linux can forget its peak."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a locked-down container: the peak is then one since the start
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Bytes since `reset_peak`, or since the process began; None on a system that does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return host_peak_bytes()


def host_peak_bytes() -> int | None:
    """The same of RAM, whatever the device."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().split()
        if "VmHWM:" in status:  # unlike what getrusage tells, `reset_peak` resets it
            return int(status[status.index("VmHWM:") + 1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(device: torch.device) -> dict[str, int]:
    """Every peak that is known here by name: `host` resident; on a GPU `allocated` and `reserved` too."""
    found = {} if (host := host_peak_bytes()) is None else {"host": host}
    if device.type == "cuda":
        import torch

        found["allocated"] = int(torch.cuda.max_memory_allocated(device))
        found["reserved"] = int(torch.cuda.max_memory_reserved(device))
    return found


def available_ram() -> int | None:
    """Bytes of RAM that processes can still get; None on a system that does not tell."""
    if sys.platform != "linux":
        return None
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)
