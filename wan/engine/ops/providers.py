"""Who may compute the operations instead of PyTorch, what they need, and which kernels a run gets.

A kernel is tried once per process on small inputs: one that raises or gives other values than the operation's
definition is left out, with a warning that says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import IncompatibleOptions, MissingPackage, UnsupportedHardware, WanError
from wan.engine.hardware import Hardware
from wan.engine.ops import cpu, encoder, float8, linear, modulate, norms, video
from wan.engine.ops.attention import installed
from wan.engine.ops.op import Kernel, Op

__all__ = ["PROVIDERS", "Provider", "choose", "refusal"]

Table = Mapping[Op[..., Any], Kernel]

FAULTS: tuple[type[Exception], ...] = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What a kernel that cannot run here may raise when it is tried."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One source of kernels and what it needs. `load` imports the kernels and says which operation each computes."""

    name: str
    load: Callable[[], Table]
    min_sm: tuple[int, int] | None
    """The oldest card it serves; None: it is for CPUs."""
    package: str | None = None
    install: str = ""
    errors: Callable[[], tuple[type[Exception], ...]] = lambda: ()
    """What else its kernels may raise."""
    unbuilt: Callable[[], str] = lambda: ""
    """What was to be made while installing and is not there, and how to make it."""

    def refusal(self, hardware: Hardware) -> WanError | None:
        """Why it cannot serve here, as the error to raise; None where it can."""
        if self.min_sm is None and hardware.device.type != "cpu":
            return UnsupportedHardware(
                f"--kernels {self.name} is for CPUs, this is {hardware}; use --kernels auto or torch"
            )
        if self.min_sm is not None and (not hardware.is_cuda or hardware.sm < self.min_sm):
            needed = f"sm_{self.min_sm[0]}{self.min_sm[1]}"
            return UnsupportedHardware(
                f"--kernels {self.name} needs a CUDA card of {needed} or newer, this is {hardware}; "
                "use --kernels auto or torch"
            )
        if self.package is not None and not installed(self.package):
            return MissingPackage(
                f"--kernels {self.name} needs the package {self.package!r}, which is not installed; "
                f"run pip install {self.install or self.package}, or use --kernels auto or torch"
            )
        if unbuilt := self.unbuilt():
            return MissingPackage(f"--kernels {self.name} needs {unbuilt}, or use --kernels auto or torch")
        return None


def _triton() -> Table:
    import wan.kernels.modulate as modulating
    import wan.kernels.quantize as quantizing
    import wan.kernels.rope as turning
    import wan.kernels.video as frames

    return {
        modulate.layer_norm: modulating.layer_norm,
        modulate.layer_norm_quantize: modulating.layer_norm_quantize,
        modulate.gated_add: modulating.gated_add,
        modulate.gated_add_norm: modulating.gated_add_norm,
        modulate.gated_add_norm_quantize: modulating.gated_add_norm_quantize,
        norms.norm_rotate: turning.norm_rotate,
        norms.norm_rotate_quantize: turning.norm_rotate_quantize,
        float8.quantize_rows: quantizing.quantize_rows,
        float8.quantize_gelu: quantizing.quantize_gelu,
        linear.linear_gelu: linear.linear_gelu_cublas,
        video.norm_silu: frames.norm_silu,
        video.convolve_add: frames.convolve_add,
    }


def _triton_errors() -> tuple[type[Exception], ...]:
    from triton.errors import TritonError

    return (TritonError,)


def _cuda() -> Table:
    import wan.kernels.fused_cuda as kernels

    return {encoder.rms_norm: kernels.rms_norm, encoder.gated: kernels.gated}


def _cpu() -> Table:
    return {norms.norm_rotate: cpu.norm_rotate, linear.linear: linear.linear_onednn}


def _cuda_unbuilt() -> str:
    from wan.kernels.fused_cuda import LIBRARY, is_built

    made = "made while installing where nvcc is; run pip install --no-build-isolation -e . in the repository"
    return "" if is_built() else f"{LIBRARY}, {made}"


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(name="triton", load=_triton, min_sm=(8, 0), package="triton", errors=_triton_errors),
        Provider(name="cuda", load=_cuda, min_sm=(8, 0), unbuilt=_cuda_unbuilt),
        Provider(name="cpu", load=_cpu, min_sm=None),
    )
}

AUTO: tuple[str, ...] = tuple(PROVIDERS)
"""Whom "auto" asks for each operation, the first one first."""


def refusal(name: str, hardware: Hardware) -> WanError | None:
    """Why `--kernels name` cannot be had here; None where it can. "auto" always can."""
    return PROVIDERS[name].refusal(hardware) if name in PROVIDERS else None


def choose(name: str, hardware: Hardware) -> dict[Op[..., Any], tuple[str, Kernel]]:
    """Operation -> provider's name and kernel, of all that works here; what is not in it PyTorch computes.

    `name` is a provider, or "auto" for the first of AUTO that has a working kernel for an operation. Raises what
    `refusal` gives for a provider that cannot serve.
    """
    if name not in (*PROVIDERS, "auto"):
        raise IncompatibleOptions(f"--kernels {name!r} is unknown; choose one of torch, auto, {', '.join(PROVIDERS)}")
    if (refused := refusal(name, hardware)) is not None:
        raise refused
    names = [each for each in AUTO if refusal(each, hardware) is None] if name == "auto" else [name]
    found: dict[Op[..., Any], tuple[str, Kernel]] = {}
    for each in names:
        for operation, kernel in working(PROVIDERS[each], hardware.device).items():
            found.setdefault(operation, (each, kernel))
    return found


@cache
def working(provider: Provider, device: torch.device) -> Table:
    """Those of its kernels that give what their operations' definitions give, tried on `device` once a process."""
    errors = FAULTS
    try:
        errors += provider.errors()
        kernels = provider.load()
    except errors as error:
        _warn(f"kernels of {provider.name} cannot be loaded: {_said(error)}")
        return {}
    found: dict[Op[..., Any], Kernel] = {}
    for operation, kernel in kernels.items():
        try:
            served, distance = tried(operation, kernel, device)
        except errors as failure:
            _warn(f"the {provider.name} kernel of {operation.name} fails: {_said(failure)}")
            continue
        if distance > operation.tolerance:
            _warn(f"the {provider.name} kernel of {operation.name} gives wrong values (relative error {distance:.1e})")
        elif served:
            found[operation] = kernel
    return found


@torch.no_grad()
def tried(operation: Op[..., Any], kernel: Kernel, device: torch.device) -> tuple[bool, float]:
    """Whether a kernel serves the operation's examples, and the largest relative L2 distance to the definition."""
    worst = 0.0
    for args, same in zip(operation.calls(device), operation.calls(device), strict=True):
        made = kernel(*args)
        if made is NotImplemented:  # not written for this card
            return False, 0.0
        for found, expected in zip(_tensors(made), _tensors(operation.definition(*same)), strict=True):
            distance = (found.double() - expected.double()).norm() / expected.double().norm()
            worst = max(worst, float(distance.nan_to_num(float("inf"))))
    return True, worst


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _warn(what: str) -> None:
    warnings.warn(f"{what}; PyTorch computes instead", RuntimeWarning, stacklevel=4)
