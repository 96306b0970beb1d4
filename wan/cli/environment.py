"""What this machine and installation are, for records and for `tools/save_env.py`: the first thing a report needs.

Nothing private: of the environment only the variables in `env.TOLD`, and no folder of the user's home by name.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import env

if TYPE_CHECKING:
    from wan.engine.hardware import Hardware

# By the names of their distributions: what may change a bit of the frames, and the ffmpeg that encodes them.
_PACKAGES = ("transformers", "tokenizers", "triton", "flash-attn", "flash-attn-3", "sageattention", "imageio-ffmpeg")

# What else a fault may come from.
_FURTHER_PACKAGES = ("torch", "diffusers", "safetensors", "huggingface-hub", "numpy", "pillow", "easydict", "ftfy")

WAN_HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """Versions that go badly together. `cudnn_below` is as `torch.backends.cudnn.version()` counts."""

    torch: str
    cudnn_below: int
    effect: str
    cure: str
    source: str

    def met(self, torch_version: str, cudnn: int | None) -> bool:
        return cudnn is not None and torch_version.startswith(f"{self.torch}.") and cudnn < self.cudnn_below

    def __str__(self) -> str:
        return f"torch {self.torch} with cuDNN below {self.cudnn_below}: {self.effect}; {self.cure} ({self.source})"


KNOWN_BAD = (
    KnownBad(
        torch="2.9",
        cudnn_below=91500,
        effect="bfloat16 conv3d leaves cuDNN, so the VAE is several times slower and larger",
        cure="install another torch, or nvidia-cudnn 9.15 or newer",
        source="pytorch/pytorch#166122, #166643",
    ),
)


def versions() -> dict[str, str]:
    """What may change a bit of the frames, by name."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found["cudnn"] = None if cudnn is None else str(cudnn)
    return {name: str(version) for name, version in found.items() if version is not None} | _installed(_PACKAGES)


def device(hardware: Hardware) -> dict[str, Any]:
    """The device of a run, as far as it matters for its bits."""
    import torch

    found: dict[str, Any] = {"type": hardware.device.type, "name": hardware.name}
    if hardware.is_cuda:
        found |= {"sm": list(hardware.sm), "memory_bytes": hardware.total_memory}
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found | {"processes": hardware.world_size, "system": f"{platform.system()} {platform.machine()}"}


def collect() -> dict[str, Any]:
    """Everything about this machine. A torch that cannot be imported is told, not raised."""
    import wan

    home = str(Path.home()) if env.cache_folder() is not None else None
    found: dict[str, Any] = {
        "wan": wan.__version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "variables": {k: v.replace(home, "~") if home else v for k, v in env.told().items()},
        "packages": _installed((*_FURTHER_PACKAGES, *_PACKAGES)),
        "driver": _driver(),
    }
    try:
        return found | _of_torch()
    except (ImportError, OSError) as error:
        return found | {"torch": f"cannot be imported: {error}"}


def known_bad(found: Mapping[str, str]) -> list[str]:
    """What is told of the pairs in `versions()` that are known to be bad."""
    cudnn = int(found["cudnn"]) if "cudnn" in found else None
    return [str(pair) for pair in KNOWN_BAD if pair.met(found["torch"], cudnn)]


def text(found: Mapping[str, Any]) -> str:
    """`collect()` to be read: a line each, tables indented."""
    lines = []
    for name, value in found.items():
        table = dict(enumerate(value, 1)) if isinstance(value, list) else value if isinstance(value, Mapping) else {}
        lines.append(f"{name}:" if table else f"{name}: {'none' if value in (None, {}, []) else value}")
        lines += [f"  {key}: {_cell(row)}" for key, row in table.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_torch() -> dict[str, Any]:
    import torch

    from wan.engine.hardware import probe

    told, here = versions(), probe()
    cards = [device(probe(f"cuda:{index}")) for index in range(torch.cuda.device_count())]
    return {
        "torch": told,
        "devices": cards or [device(here)],
        "allocator": torch.cuda.get_allocator_backend() if torch.cuda.is_available() else None,
        "attention": _attention(here),
        "known_bad": known_bad(told),
    }


def _attention(hardware: Hardware) -> dict[str, str]:
    """Each backend -> "works" or why not, by its first call compared with SDPA's."""
    import torch

    from wan.engine.ops.attention import BACKENDS, fault

    outcome = {}
    for name, backend in BACKENDS.items():
        refusal = backend.refusal(hardware, torch.bfloat16, WAN_HEAD_DIM)
        why = str(refusal) if refusal is not None else fault(backend, hardware.device, torch.bfloat16, WAN_HEAD_DIM)
        outcome[name] = why or "works"
    return outcome


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    """Version of NVIDIA's driver, where its tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi fails: {error}"
    return ", ".join(dict.fromkeys(done.stdout.split()))
