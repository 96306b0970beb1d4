"""Attention over [B, L, N, D] tensors: the plain path, the backends a card may offer, and who may be chosen.

Letters: B batch, L query tokens, S key tokens, N heads, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.errors import IncompatibleOptions, MissingPackage, UnsupportedHardware, WanError
from wan.engine.hardware import Hardware
from wan.engine.ops import attention_kernels as kernels
from wan.engine.ops.attention_kernels import Attend, AttendLse, InCodes, sdpa
from wan.engine.ops.float8 import Quantized
from wan.engine.ops.float8_attention import quantize_heads
from wan.engine.types import Layout

__all__ = ["BACKENDS", "Attend", "Backend", "InCodes", "choose", "is_exact", "masked", "sdpa"]

HALF = (torch.bfloat16, torch.float16)


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
    """One way to compute attention and what it needs: one of `packages`, a card, a dtype, a head width.

    `load` imports the package and returns an `attend`, `load_lse` one that tells the log-sum-exp of scores too.
    One that takes `codes` reads queries in 8 bits, so that whoever norms them may round them at once.
    """

    name: str
    load: Callable[[], Attend]
    load_lse: Callable[[], AttendLse] | None = None
    packages: tuple[str, ...] = ()
    install: str = ""
    min_sm: tuple[int, int] = (0, 0)
    max_sm: tuple[int, int] = (99, 9)
    dtypes: tuple[torch.dtype, ...] = HALF
    max_head_dim: int = 256
    multiple_of: int = 8
    grade: Literal["bitwise", "rounding", "lossy"] = "rounding"
    codes: bool = False

    def attend(self) -> Attend:
        """What computes it, and whether its queries may be in codes."""
        return InCodes(self.load()) if self.codes else self.load()

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
        if self.packages and not any(installed(package) for package in self.packages):
            wanted = " or ".join(map(repr, self.packages))
            return MissingPackage(
                f"--attention {self.name} needs the package {wanted}, which is not installed; "
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


FLASH3 = ("fa3_fwd_interface", "flash_attn_interface")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="sdpa", load=lambda: sdpa, load_lse=kernels.sdpa_lse, dtypes=(*HALF, torch.float32), grade="bitwise",
        ),
        Backend(
            name="cudnn", load=kernels.cudnn, load_lse=kernels.cudnn_lse, min_sm=(8, 0), max_head_dim=128,
        ),
        Backend(
            name="flash2", load=kernels.flash2, load_lse=kernels.flash2_lse, packages=("flash_attn",),
            install="'wan-engine[flash]'", min_sm=(8, 0),
        ),
        Backend(
            name="flash3", load=kernels.flash3, load_lse=kernels.flash3_lse, packages=FLASH3, install="fa3-fwd",
            min_sm=(9, 0), max_sm=(9, 0),
        ),
        Backend(
            name="flash3_fp8", load=kernels.flash3_fp8, packages=FLASH3, install="fa3-fwd", min_sm=(9, 0),
            max_sm=(9, 0), multiple_of=16, grade="lossy", codes=True,
        ),
        Backend(
            name="sage", load=kernels.sage, load_lse=kernels.sage_lse, packages=("sageattention",),
            install="sageattention", min_sm=(8, 0), max_head_dim=128, multiple_of=32, grade="lossy",
        ),
    )
}  # fmt: skip

AUTO_HOPPER = ("flash3", "cudnn", "flash2", "sdpa")
"""Best first, from sm_90 on: there cuDNN is nearly twice as fast as FlashAttention 2 (650 against 370 TFLOP/s)."""
AUTO = ("flash2", "sdpa")
"""Best first on older cards, where PyTorch's own flash kernel is FlashAttention 2. Lossy ones are never automatic."""


def is_exact(name: str) -> bool:
    """Whether a backend keeps the precision of its inputs."""
    return BACKENDS[name].grade != "lossy"


def choose(name: str, hardware: Hardware, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend, str]:
    """The backend's name, its `attend`, and one sentence on why.

    "auto" takes the best exact backend that works here. A named one that cannot serve raises UnsupportedHardware,
    IncompatibleOptions or MissingPackage. Each is tried once a process; one whose first call fails, or gives other
    values than SDPA, is replaced by the next best with one warning.
    """
    if name not in ("auto", *BACKENDS):
        raise IncompatibleOptions(f"--attention {name!r} is unknown; choose one of {', '.join(('auto', *BACKENDS))}")
    automatic = AUTO_HOPPER if hardware.sm >= (9, 0) else AUTO
    usable = [c for c in automatic if BACKENDS[c].refusal(hardware, dtype, head_dim) is None]
    if name == "auto":
        return _first_working(usable, hardware, dtype, head_dim, f"the fastest exact backend on {hardware.name}")
    refusal = BACKENDS[name].refusal(hardware, dtype, head_dim)
    if refusal is not None:
        raise refusal
    others = [candidate for candidate in usable if candidate != name]
    return _first_working((name, *others), hardware, dtype, head_dim, "as asked")


def _first_working(
    names: Sequence[str], hardware: Hardware, dtype: torch.dtype, head_dim: int, why: str
) -> tuple[str, Attend, str]:
    for name in names:
        if name == "sdpa":
            break
        found = _tried(BACKENDS[name], hardware.device, dtype, head_dim)
        if not found:
            return name, BACKENDS[name].attend(), why
        why = f"{name} {found}"
    return "sdpa", sdpa, why


@cache
def _tried(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`fault`, found and warned of once a process: every expert asks."""
    found = fault(backend, device, dtype, head_dim)
    if found:
        warnings.warn(
            f"attention backend {backend.name} {found}; the next best is used", RuntimeWarning, stacklevel=4
        )  # fmt: skip
    return found


def fault(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with a backend, by its first call; "" for one that works."""
    try:
        attend, tolerance = backend.attend(), 0.02 if is_exact(backend.name) else 0.2
        works = self_test(attend, device, dtype, head_dim, tolerance)
        if isinstance(attend, InCodes):
            works = works and self_test(_asked_in_codes(attend), device, dtype, head_dim, tolerance)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return "" if works else "gives wrong values"


def _asked_in_codes(attend: InCodes) -> Attend:
    return lambda q, k, v: attend(Quantized(*quantize_heads(q), q.dtype), k, v)


@torch.no_grad()
def self_test(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, tolerance: float) -> bool:
    """Whether a backend gives the values of SDPA on a small input; its first call, so it also shows a broken build."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 96, 2, head_dim, generator=generator).to(device, dtype).unbind(0)
    expected = sdpa(q, k, v).float()
    error = (attend(q, k, v).float() - expected).norm() / expected.norm()
    return bool(error < tolerance)
