"""On a GPU: LoRAs beside weights, in 8 bits too and of blocks that come and go, make the video they make on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan
from wan.configs import WAN_CONFIGS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
DIM = WAN_CONFIGS["t2v-demo"].dim


@pytest.fixture
def lora(tmp_path: Path) -> str:
    """Pairs in every block of the demo model, a norm and a bias, strong enough to change the picture."""
    made = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"head.head.diff_b": torch.randn(64, generator=made) * 0.01}
    for block in range(5):
        state[f"blocks.{block}.norm3.diff"] = torch.randn(DIM, generator=made) * 0.05
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v"):
            for side, shape in {"down": (8, DIM), "up": (DIM, 8)}.items():
                state[f"blocks.{block}.{layer}.lora_{side}.weight"] = torch.randn(*shape, generator=made) * 0.05
    save_file(state, str(tmp_path / "x.safetensors"))
    return str(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-2), ({"fp8": "weight", "block_swap": 3}, 1e-2), ({"fp8": "scaled", "compile": True}, 0.05)],
    ids=str,
)
def test_every_mode_makes_the_video_that_it_makes_on_the_cpu(
    lora: str, root: Path, options: dict[str, Any], tolerance: float
) -> None:
    """Over two steps, one of each expert. Products of float32 may be TF32's, and what enters `scaled` layers may round
    to other codes then."""
    if options.get("fp8") == "scaled" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89")

    def video(device: str, **more: Any) -> Tensor:
        pipe = wan.WanT2V(WAN_CONFIGS["t2v-demo"], root / "demo", device=device, **more)
        made: Tensor = pipe.generate(
            "a red circle moves to the right", (96, 96), 1, sampling_steps=2, seed=1, guide_scale=1.0,
            offload_model=None, noise_device="cpu",
        )  # fmt: skip
        return made.float().cpu()

    plain = video("cpu")
    for mode in ("merge", "onthefly", "stream"):
        expected = video("cpu", lora=lora, lora_mode=mode, fp8=options.get("fp8", "off"))
        made = video(DEVICE, lora=lora, lora_mode=mode, **options)
        assert (made - expected).norm() < tolerance * expected.norm(), mode
        assert (plain - expected).norm() > 2 * tolerance * expected.norm(), "the LoRA changes the video"
