"""The CUDA kernels of csrc/fused_ops.cu, called through their C interface: RMS norm and gated activations.

`setup.py` builds them beside this file where nvcc and a torch with CUDA are there. They are bfloat16 or float16 in
memory and float32 in registers, rounded once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libfused_ops.so")
MAX_WIDTH = 32768
"""Values of a row that fit into the registers of one block."""
HALF = (torch.bfloat16, torch.float16)

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "wan_rms_norm": (_POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _INT, _INT, _POINTER),
    "wan_gated": (_POINTER, _POINTER, _POINTER, ctypes.c_int64, _INT, _INT, _POINTER),
}


def is_built() -> bool:
    """Whether `setup.py` could compile the kernels here."""
    return LIBRARY.exists()


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.wan_error.restype = ctypes.c_char_p
    return library


def _call(name: str, like: Tensor, *arguments: object) -> None:
    """Launches on the current stream of the device of `like`; RuntimeError where CUDA refuses."""
    library = _library(LIBRARY)
    with torch.cuda.device_of(like):
        code = getattr(library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    if code:
        raise RuntimeError(f"{name} over {tuple(like.shape)} {like.dtype}: {library.wan_error(code).decode()}")


def serves_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these."""
    return x.dtype in HALF and weight.dtype in (x.dtype, torch.float32) and x.shape[-1] <= MAX_WIDTH


@torch.library.custom_op("wan::cuda_rms_norm", mutates_args=(), device_types="cuda")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in the dtype of x; weight [D] in that dtype or float32."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    rows, is_half, weight_is_float = x.numel() // x.shape[-1], x.dtype == torch.float16, weight.dtype == torch.float32
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    _call("wan_rms_norm", x, *pointers, rows, x.shape[-1], eps, is_half, weight_is_float)
    return out


@torch.library.custom_op("wan::cuda_gated", mutates_args=(), device_types="cuda")
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of equal shapes and dtypes; activation "gelu" (the tanh form) or "silu"."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    _call("wan_gated", gate, *pointers, gate.numel(), gate.dtype == torch.float16, activation == "silu")
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x.contiguous())


@gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate.contiguous())
