"""The CUDA kernels without a GPU: they compile for every card without spills and with 16-byte accesses, and their
arithmetic, compiled for the host, is that of float64.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "csrc"
BF16, FP16 = torch.bfloat16, torch.float16
ULP = {BF16: 2**-8, FP16: 2**-11}
"""Half a unit in the last place: what one rounding costs."""


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not on this machine")
    return found


@pytest.fixture(scope="module")
def ptx(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ptx") / "fused_ops.ptx"
    run(nvcc, "-O3", "-std=c++17", "-arch=compute_80", "-ptx", "-o", target, SOURCES / "fused_ops.cu")
    return target


@pytest.fixture(scope="module")
def host(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on this machine")
    planned = run(nvcc, "--dryrun", "-c", SOURCES / "fused_ops.cu")
    headers = re.search(r'INCLUDES="?-I([^"\s]+)', planned)
    assert headers is not None, planned
    library = tmp_path_factory.mktemp("host") / "host_fused_ops.so"
    flags = ["-x", "c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-pthread"]
    source = Path(__file__).with_name("host_fused_ops.cu")
    run(compiler, *flags, f"-I{headers[1]}", f"-I{SOURCES}", source, "-o", library)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_120"])
def test_no_kernel_spills(nvcc: str, ptx: Path, card: str, tmp_path: Path) -> None:
    told = run(nvcc, f"-arch={card}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "fused_ops.cubin", ptx)
    kernels = ptx.read_text().count(".entry")
    assert kernels == 20
    assert told.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels
    # A row of one block must never exceed the register file: 1024 threads of 64.
    assert max(map(int, re.findall(r"Used (\d+) registers", told))) <= 64


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(ptx: Path) -> None:
    bodies = re.split(r"\.entry ", ptx.read_text())[1:]
    aligned = [body for body in bodies if re.match(r"\w*_kernelI(Li\dE)?Lb1E", body)]
    assert len(aligned) == 10
    for body in aligned:
        accesses = re.findall(r"(?:ld|st)\.global\S*", body)
        assert accesses and all(".v4." in access and access.endswith("32") for access in accesses), body[:80]


class Buffer:
    """Values between NaN: what is read or written beside them shows. The margin of 8 keeps them on 16 bytes."""

    def __init__(self, values: Tensor, is_aligned: bool) -> None:
        self.margin = 8 if is_aligned else 3
        self.held = torch.full((values.numel() + 2 * self.margin,), torch.nan, dtype=values.dtype)
        self.inside = self.held[self.margin : -self.margin].view_as(values)
        self.inside.copy_(values)
        self.pointer = ctypes.c_void_p(self.inside.data_ptr())


def check(out: Buffer, expected: Tensor) -> None:
    margins = torch.cat([out.held[: out.margin], out.held[-out.margin :]])
    assert margins.isnan().all(), "values beside the output were written"
    # Half a unit in the last place, and a little for float32 before it; 1e-7 where float16 is subnormal.
    allowed = 1.02 * ULP[out.held.dtype] * expected.abs() + 1e-7
    assert ((out.inside.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("width", "kept", "threads", "is_aligned"),
    [(1, 1, 2, False), (63, 2, 5, False), (130, 4, 6, False), (64, 1, 8, True), (72, 4, 3, True)],
)
def test_rms_norm_is_that_of_float64_to_one_rounding(
    host: ctypes.CDLL, dtype: torch.dtype, width: int, kept: int, threads: int, is_aligned: bool
) -> None:
    x, eps = torch.randn(3, width).to(dtype), 1e-6
    weight = torch.randn(width).to(dtype)
    source, factors = Buffer(x, is_aligned), Buffer(weight, is_aligned)
    out = Buffer(torch.full_like(x, torch.nan), is_aligned)
    host.host_rms_norm(
        source.pointer, factors.pointer, out.pointer, 3, width, ctypes.c_float(eps), dtype == FP16,
        kept, is_aligned, threads,
    )  # fmt: skip
    wide = x.double()
    check(out, wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize(("length", "is_aligned"), [(4096, True), (8 * 511 + 5, False)])
def test_gated_activations_are_those_of_float64_to_one_rounding(
    host: ctypes.CDLL, dtype: torch.dtype, activation: str, length: int, is_aligned: bool
) -> None:
    """From where the activation is zero to where it is the identity, also where exp overflows."""
    gate = torch.linspace(-200, 200, length).to(dtype)
    up = torch.randn(length).to(dtype)
    gates, ups = Buffer(gate, is_aligned), Buffer(up, is_aligned)
    out = Buffer(torch.full_like(gate, torch.nan), is_aligned)
    host.host_gated(
        gates.pointer, ups.pointer, out.pointer, ctypes.c_int64(length), dtype == FP16, activation == "silu", is_aligned
    )
    wide = gate.double()
    z = wide if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    check(out, wide * z.sigmoid() * up.double())
