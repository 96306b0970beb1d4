"""Environment variables that must stand before torch is imported. The user's own settings always win."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that set up torch's allocator of GPU memory; the first is the one torch 2.11 and newer ask for."""


TOLD = (
    *ALLOCATOR, "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "LOCAL_RANK", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RANK", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR", "TORCH_LOGS",
    "TRITON_CACHE_DIR", "WORLD_SIZE", "XDG_CACHE_HOME",
)  # fmt: skip
"""Variables a report may show: each changes how torch runs, none is a secret."""


def told() -> dict[str, str]:
    """Those of `TOLD` that are set."""
    return {name: os.environ[name] for name in sorted(TOLD) if name in os.environ}


def keep_compiled_in(folder: Path) -> None:
    """Let torch keep compiled code in `folder`, unless the user has named a place.

    Importing torch's compiler, which torch does where networks are described, writes torch's own place there.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    compiler = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    if named is None or (compiler is not None and named == compiler.default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def prepare() -> None:
    """Set allocator and OpenMP defaults. Call it before anything imports torch; later it has no effect."""
    # Threads that spin between parallel regions take the other cores from data transfers and from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Networks of very different sizes enter and leave the card: without growing segments the freed blocks fragment and
    # a run that fits dies out of memory. Where the process may use a part of the card only, blocks long unused are
    # given back before all are. Torch reads any of the names; Windows, also under WSL, and Tegra lack such segments.
    lacking = sys.platform != "linux" or any(kind in platform.release().lower() for kind in ("microsoft", "tegra"))
    if not lacking and not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True,garbage_collection_threshold:0.8"


def environment() -> Mapping[str, str]:
    """The variables as they are, for `wan.cli.variables`."""
    return os.environ


def rank() -> int:
    """This process's number as torchrun sets it; 0 in a single process. Only rank 0 talks to the user."""
    return int(os.environ.get("RANK", "0"))


def cache_folder() -> Path | None:
    """The user's folder for what can be made again, where the system wants it; None for a user without a home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    place = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": str(home / "Library" / "Caches")}
    base = place.get(sys.platform, os.environ.get("XDG_CACHE_HOME"))
    return Path(base or home / ".cache") / "wan-engine"
