"""Attention backends: one table says who may serve, refusals are clear, and a broken kernel never stops a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wan.engine.errors import IncompatibleOptions, MissingPackage, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.ops import attention
from wan.engine.ops.attention_kernels import merge

H100 = Hardware(device=torch.device("cpu"), name="NVIDIA H100", sm=(9, 0))
RTX3090 = Hardware(device=torch.device("cpu"), name="NVIDIA RTX 3090", sm=(8, 6))
TURING = Hardware(device=torch.device("cpu"), name="NVIDIA T4", sm=(7, 5))
CPU = Hardware(device=torch.device("cpu"), name="CPU")
BF16 = torch.bfloat16


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a package with one kernel where an import finds it."""

    def put(package: str, **functions: Callable[..., object]) -> None:
        module = ModuleType(package)
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, package, module)

    return put


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._tried.cache_clear()
    for package in ("flash_attn", "fa3_fwd_interface", "flash_attn_interface", "sageattention"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    real = attention.find_spec
    monkeypatch.setattr(attention, "find_spec", lambda name: None if name not in sys.modules else real(name))


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("blnd,bsnd->bnls", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1).nan_to_num(), v)


def qkv(b: int = 2, l: int = 7, s: int = 9, n: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, l, n, d), torch.randn(b, s, n, d), torch.randn(b, s, n, d)


def test_sdpa_is_attention() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attention.sdpa(q, k, v), reference(q, k, v), rtol=1e-5, atol=1e-6)


def test_lengths_hide_padding_keys_and_silence_padding_queries() -> None:
    q, k, v = qkv()
    lengths = torch.tensor([5, 7]), torch.tensor([4, 9])
    out = attention.masked(q, k, v, lengths=lengths)
    torch.testing.assert_close(out[:1, :5], reference(q[:1, :5], k[:1, :4], v[:1, :4]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1:], reference(q[1:], k[1:], v[1:]), rtol=1e-5, atol=1e-6)
    assert not out[0, 5:].any()


@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (1, 2), (3, -1)])
def test_window_is_aligned_to_the_last_key(window: tuple[int, int]) -> None:
    q, k, v = qkv(l=9, s=6)
    offset = torch.arange(6) - torch.arange(9)[:, None] - (6 - 9)
    left, right = (limit if limit >= 0 else 99 for limit in window)
    mask = (offset >= -left) & (offset <= right)
    out = attention.masked(q, k, v, window_size=window)
    torch.testing.assert_close(out, reference(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_heads_of_keys_may_be_shared() -> None:
    q, k, v = qkv(n=4)
    out = attention.masked(q, k[:, :, :2], v[:, :, :2])
    expected = reference(q, k[:, :, :2].repeat_interleave(2, 2), v[:, :, :2].repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_auto_on_a_cpu_is_sdpa() -> None:
    name, attend, _ = attention.choose("auto", CPU, BF16, 128)
    assert (name, attend) == ("sdpa", attention.sdpa)


def test_auto_takes_the_best_exact_backend_that_is_installed(install: Callable[..., None]) -> None:
    install("sageattention", sageattn=lambda q, k, v, **_: attention.sdpa(q, k, v))
    install("flash_attn", flash_attn_func=attention.sdpa)
    assert attention.choose("auto", RTX3090, BF16, 128)[0] == "flash2"
    install("fa3_fwd_interface", flash_attn_func=attention.sdpa)
    assert attention.choose("auto", H100, BF16, 128)[0] == "flash3"
    assert attention.choose("auto", RTX3090, torch.float32, 128)[0] == "sdpa"
    assert attention.choose("auto", TURING, BF16, 128)[0] == "sdpa"


def test_flash3_may_return_a_tensor_or_a_tuple(install: Callable[..., None]) -> None:
    q, k, v = qkv()
    for kernel in (attention.sdpa, lambda q, k, v: (attention.sdpa(q, k, v), None)):
        install("flash_attn_interface", flash_attn_func=kernel)
        name, attend, _ = attention.choose("flash3", H100, BF16, 128)
        assert name == "flash3"
        torch.testing.assert_close(attend(q, k, v), attention.sdpa(q, k, v))


@pytest.mark.parametrize(
    ("name", "hardware", "dtype", "head_dim", "error", "words"),
    [
        ("flash3", RTX3090, BF16, 128, UnsupportedHardware, "sm_90.*RTX 3090 .sm_86"),
        ("cudnn", CPU, BF16, 128, UnsupportedHardware, "sm_80.*CPU.*--attention auto"),
        ("flash2", TURING, BF16, 128, UnsupportedHardware, "sm_80.*T4"),
        ("flash2", H100, torch.float32, 128, IncompatibleOptions, "bfloat16 or float16.*float32"),
        ("sage", H100, BF16, 80, IncompatibleOptions, "multiple of 32.*80"),
        ("flash2", H100, BF16, 128, MissingPackage, r"flash_attn.*\[flash\]"),
        ("sage", H100, BF16, 128, MissingPackage, "pip install sageattention"),
        ("flash3_fp8", H100, BF16, 128, MissingPackage, "fa3_fwd_interface.*pip install fa3-fwd"),
        ("warp", H100, BF16, 128, IncompatibleOptions, "'warp'.*auto, sdpa, cudnn"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_the_cure(
    name: str, hardware: Hardware, dtype: torch.dtype, head_dim: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attention.choose(name, hardware, dtype, head_dim)


@pytest.mark.parametrize(
    ("fault", "name", "tried"),
    [
        ("raises", "flash3", ["flash3", "cudnn"]),
        ("wrong values", "flash3_fp8", ["flash3_fp8", "flash3", "cudnn"]),
    ],
)
def test_a_kernel_that_fails_its_first_call_gives_way_to_the_next_best_with_one_warning(
    install: Callable[..., None], fault: str, name: str, tried: list[str]
) -> None:
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
        calls.append(q.shape)
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return torch.zeros_like(q)

    install("fa3_fwd_interface", flash_attn_func=kernel)
    install("flash_attn", flash_attn_func=attention.sdpa)
    with pytest.warns(RuntimeWarning) as caught:
        # cuDNN does not run on a CPU: it is tried on the way to flash2, and says so.
        chosen = [attention.choose(name, H100, BF16, 128)[0] for _ in range(2)]
    assert chosen == ["flash2", "flash2"]
    assert [str(warning.message).split()[2] for warning in caught] == tried
    assert len(calls) == len(tried) - 1


def test_eight_bits_are_never_automatic(install: Callable[..., None]) -> None:
    assert all(attention.is_exact(name) for name in (*attention.AUTO, *attention.AUTO_HOPPER))
    assert not attention.is_exact("flash3_fp8") and not attention.is_exact("sage")


FLASH = {"flash_attn": "flash2", "fa3_fwd_interface": "flash3", "flash_attn_interface": "flash3"}


@pytest.mark.parametrize("package", [None, *FLASH])
def test_attention_to_halves_of_the_keys_is_merged_exactly(install: Callable[..., None], package: str | None) -> None:
    """With the sums a backend tells, whatever else it returns; the kernel of the fakes is PyTorch's own."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> tuple[Tensor, ...]:
        assert return_attn_probs
        return *attention.BACKENDS["sdpa"].load_lse()(q, k, v), torch.empty(0)  # type: ignore[misc]

    if package is not None:
        install(package, flash_attn_func=kernel)
    load = attention.BACKENDS[FLASH.get(package or "", "sdpa")].load_lse
    assert load is not None
    attend = load()
    q, k, v = qkv(s=21)
    # One half holds a key that outweighs all others.
    k[:, 3] *= 30
    out, lse = merge([attend(q, k[:, :8], v[:, :8]), attend(q, k[:, 8:], v[:, 8:])])
    torch.testing.assert_close(out, reference(q, k, v), rtol=1e-5, atol=1e-6)
    scores = torch.einsum("blnd,bsnd->bnls", q, k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
