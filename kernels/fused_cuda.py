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
    "wan_rms_norm": (_POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _INT, _POINTER),
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in their dtype; NotImplemented elsewhere."""
    if not (x.is_cuda and x.dtype in HALF and weight.dtype == x.dtype and 0 < x.shape[-1] <= MAX_WIDTH):
        return NotImplemented
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    pointers, width = (x.data_ptr(), weight.data_ptr(), out.data_ptr()), x.shape[-1]
    _call("wan_rms_norm", x, *pointers, x.numel() // width, width, eps, x.dtype == torch.float16)
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, "gelu" (the tanh form) or "silu"; NotImplemented elsewhere."""
    if not (gate.is_cuda and gate.dtype in HALF and up.dtype == gate.dtype and up.shape == gate.shape):
        return NotImplemented
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    _call("wan_gated", gate, *pointers, gate.numel(), gate.dtype == torch.float16, activation == "silu")
    return out
