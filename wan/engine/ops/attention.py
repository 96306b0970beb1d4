"""Attention over [B, L, N, D] tensors: the plain path, the backends a card may offer, and who may be chosen.

Letters: B batch, L query tokens, S key tokens, N heads, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.errors import IncompatibleOptions, MissingPackage, UnsupportedHardware, WanError
from wan.engine.hardware import Hardware
from wan.engine.types import Layout

__all__ = ["BACKENDS", "Attend", "Backend", "choose", "masked", "sdpa"]

Attend = Callable[..., Tensor]
"""`(q, k, v, layout=None) -> out`: q [B, L, N, D], k and v [B, S, N, D], out [B, L, N, D], never padded."""

HALF = (torch.bfloat16, torch.float16)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """PyTorch's scaled dot product attention; the definition that every backend is compared with."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | None = None,
    *,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Plain attention with true lengths of queries and keys, each [B], and windows; key heads may be fewer and shared.

    A query sees (left, right) = `window_size` keys beside its own place, -1 is no limit. As in FlashAttention the last
    query stands at the last key, and a query that sees no key gives zeros; so do queries beyond their length.
    """
    q_lens, k_lens = lengths
    mask = visible(q, k, q_lens, k_lens, window_size)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=shared)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
    if q_lens is not None:
        outside = torch.arange(q.shape[2], device=q.device) >= q_lens.to(q.device)[:, None]
        out = out.masked_fill(outside[:, None, :, None], 0)
    return out.transpose(1, 2)


def visible(
    q: Tensor, k: Tensor, q_lens: Tensor | None, k_lens: Tensor | None, window_size: tuple[int, int]
) -> Tensor | None:
    """Bool mask that broadcasts to [B, N, L, S], True where a query may look; None where it may look everywhere."""
    left, right = window_size
    keys = torch.arange(k.shape[1], device=q.device)
    ends = None if k_lens is None else k_lens.to(q.device)[:, None, None, None]
    mask = None if ends is None else keys < ends
    if left < 0 and right < 0:
        return mask
    queries = torch.arange(q.shape[1], device=q.device)[:, None]
    last_query = q.shape[1] if q_lens is None else q_lens.to(q.device)[:, None, None, None]
    offset = keys - queries - ((k.shape[1] if ends is None else ends) - last_query)
    for limit, inside in ((left, offset >= -left), (right, offset <= right)):
        if limit >= 0:
            mask = inside if mask is None else mask & inside
    return mask


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention and what it needs. `load` imports the package and returns an `attend`."""

    name: str
    load: Callable[[], Attend]
    package: str | None = None
    install: str = ""
    min_sm: tuple[int, int] = (0, 0)
    max_sm: tuple[int, int] = (99, 9)
    dtypes: tuple[torch.dtype, ...] = HALF
    max_head_dim: int = 256
    multiple_of: int = 8
    grade: Literal["bitwise", "rounding", "lossy"] = "rounding"

    def refusal(self, hardware: Hardware, dtype: torch.dtype, head_dim: int) -> WanError | None:
        """Why this backend cannot serve, as the error to raise; None when it can."""
        cure = "use --attention auto or sdpa"
        if self.min_sm > (0, 0) and not self.min_sm <= hardware.sm <= self.max_sm:
            exact = f"of sm_{_sm(self.min_sm)}" + ("" if self.max_sm == self.min_sm else " or newer")
            card = f"{hardware.name} (sm_{_sm(hardware.sm)})" if hardware.sm > (0, 0) else hardware.name
            return UnsupportedHardware(f"--attention {self.name} needs a CUDA card {exact}; this is {card}; {cure}")
        if dtype not in self.dtypes and self.min_sm > (0, 0):
            allowed = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            given = str(dtype).removeprefix("torch.")
            return IncompatibleOptions(f"--attention {self.name} needs {allowed} weights, these are {given}; {cure}")
        if self.min_sm > (0, 0) and (head_dim > self.max_head_dim or head_dim % self.multiple_of):
            allowed = f"a multiple of {self.multiple_of} up to {self.max_head_dim}"
            return IncompatibleOptions(
                f"--attention {self.name} needs a head width that is {allowed}, this model has {head_dim!r}; {cure}"
            )
        if self.package is not None and not installed(self.package):
            return MissingPackage(
                f"--attention {self.name} needs the package {self.package!r}, which is not installed; "
                f"run pip install {self.install}, or {cure}"
            )
        return None


def _sm(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


def installed(package: str) -> bool:
    """Whether a package could be imported; nothing is imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec is in sys.modules
        return True


def _cudnn() -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return attend


def _first(result: Any) -> Tensor:
    """The output of a kernel that, by version, returns it alone or with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _flash2() -> Attend:
    from flash_attn import flash_attn_func

    return lambda q, k, v, layout=None: _first(flash_attn_func(q, k, v))


def _flash3() -> Attend:
    from flash_attn_interface import flash_attn_func

    return lambda q, k, v, layout=None: _first(flash_attn_func(q, k, v))


def _sage() -> Attend:
    from sageattention import sageattn

    return lambda q, k, v, layout=None: _first(sageattn(q, k, v, tensor_layout="NHD", is_causal=False))


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="sdpa", load=lambda: sdpa, dtypes=(*HALF, torch.float32), grade="bitwise"),
        Backend(name="cudnn", load=_cudnn, min_sm=(8, 0), max_head_dim=128),
        Backend(name="flash2", load=_flash2, package="flash_attn", install="'wan-engine[flash]'", min_sm=(8, 0)),
        Backend(
            name="flash3", load=_flash3, package="flash_attn_interface", min_sm=(9, 0), max_sm=(9, 0),
            install="'wan-engine[flash]' and FlashAttention's hopper/ folder from source",
        ),
        Backend(
            name="sage", load=_sage, package="sageattention", install="sageattention", min_sm=(8, 0), max_head_dim=128,
            multiple_of=32, grade="lossy",
        ),
    )
}  # fmt: skip

AUTO_HOPPER = ("flash3", "cudnn", "flash2", "sdpa")
"""Best first, from sm_90 on: there cuDNN is nearly twice as fast as FlashAttention 2 (650 against 370 TFLOP/s)."""
AUTO = ("flash2", "sdpa")
"""Best first on older cards, where PyTorch's own flash kernel is FlashAttention 2. Lossy ones are never automatic."""


def choose(name: str, hardware: Hardware, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend, str]:
    """The backend's name, its `attend`, and one sentence on why.

    "auto" takes the best exact backend that works here. A named one that cannot serve raises UnsupportedHardware,
    IncompatibleOptions or MissingPackage; one that fails its first call is replaced by SDPA with a warning.
    """
    if name == "auto":
        candidates = AUTO_HOPPER if hardware.sm >= (9, 0) else AUTO
        usable = [c for c in candidates if BACKENDS[c].refusal(hardware, dtype, head_dim) is None]
        return _first_working(usable, hardware, dtype, head_dim, f"the fastest exact backend on {hardware.name}")
    if name not in BACKENDS:
        raise IncompatibleOptions(f"--attention {name!r} is unknown; choose one of {', '.join(('auto', *BACKENDS))}")
    refusal = BACKENDS[name].refusal(hardware, dtype, head_dim)
    if refusal is not None:
        raise refusal
    return _first_working((name, "sdpa"), hardware, dtype, head_dim, "as asked")


def _first_working(
    names: Sequence[str], hardware: Hardware, dtype: torch.dtype, head_dim: int, why: str
) -> tuple[str, Attend, str]:
    for name in names:
        if name == "sdpa":
            break
        found = fault(BACKENDS[name], hardware.device, dtype, head_dim)
        if not found:
            return name, BACKENDS[name].load(), why
        why = f"{name} {found}"
        warnings.warn(f"attention backend {why}; the next best is used", RuntimeWarning, stacklevel=3)
    return "sdpa", sdpa, why


def fault(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with a backend, by its first call; "" for one that works."""
    try:
        works = self_test(backend.load(), device, dtype, head_dim)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return "" if works else "gives wrong values"


@torch.no_grad()
def self_test(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend gives the values of SDPA on a small input; its first call, so it also shows a broken build."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 96, 2, head_dim, generator=generator).to(device, dtype).unbind(0)
    expected = sdpa(q, k, v).float()
    error = (attend(q, k, v).float() - expected).norm() / expected.norm()
    return bool(error < 0.2)
