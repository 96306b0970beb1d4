"""tools/convert.py --fp8: each program's files hold the numbers that were quantised, and are read back as they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import wan
from wan.configs import WAN_CONFIGS
from wan.engine.ops.float8 import E4M3, Float8Linear

FILE = "low_noise_model/diffusion_pytorch_model.safetensors"
Q, KEPT = "blocks.0.self_attn.q", "blocks.1.ffn.2"
BESIDE = {
    "kijai": {"scale_weight": ((), torch.float32)},
    "comfyui": {"weight_scale": ((), torch.float32), "comfy_quant": ((27,), torch.uint8)},
    "lightx2v": {"weight_scale": ((48, 1), torch.float32)},
}


@pytest.fixture
def convert(tool: ModuleType, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    return lambda source, *flags: tool.main(["--ckpt_dir", str(source), "--task", "t2v-A14B", *map(str, flags)])


@pytest.mark.parametrize("program", BESIDE)
def test_what_is_written_is_read_back_code_by_code(
    program: str, convert: Any, tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    flags = ("--to", "upstream", "--fp8", program, "--fp8_keep", "*.ffn.2", "--dtype", "bfloat16")
    first, again = tmp_path / "first", tmp_path / "again"
    assert convert(tiny_checkpoint, *flags, "--out", first) == 0
    plain, written = load_file(tiny_checkpoint / FILE), load_file(first / FILE)
    beside = {key.removeprefix(f"{Q}."): value for key, value in written.items() if key.startswith(f"{Q}.")}
    assert beside.pop("weight").dtype == E4M3 and beside.pop("bias").dtype == torch.bfloat16
    assert {key: (tuple(value.shape), value.dtype) for key, value in beside.items()} == BESIDE[program]
    if program == "comfyui":
        assert json.loads(bytes(beside["comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    assert ("scaled_fp8" in written) == (program == "kijai")
    assert written[f"{KEPT}.weight"].dtype == torch.bfloat16 and written["head.head.weight"].dtype == torch.bfloat16
    [scale] = (value for key, value in beside.items() if value.dtype == torch.float32)
    numbers, weight = written[f"{Q}.weight"].double() * scale.double(), plain[f"{Q}.weight"].double()
    largest = weight.abs().amax(1, keepdim=True) if scale.numel() > 1 else weight.abs().max()
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-6, atol=0)
    # Four bits of each number remain, and the smallest step is 2^-9 of a scale.
    assert ((numbers - weight).abs() <= (weight.abs() / 16).maximum(scale.double() * 2.0**-10) * (1 + 1e-6)).all()

    caplog.set_level("INFO")
    pipe = wan.WanT2V(tiny_config, first, device="cpu", fp8="weight", fp8_keep="*.ffn.2")
    count = "a row's own" if program == "lightx2v" else "one"
    assert f"low: {Path(FILE).name} has 18 weights in 8 bits (e4m3fn, {count} scale); --fp8 keeps" in caplog.text
    held = {name: layer for name, layer in pipe.low_noise_model.named_modules() if isinstance(layer, Float8Linear)}
    assert set(held) == {key.removesuffix(".weight") for key, value in written.items() if value.dtype == E4M3} - {
        "scaled_fp8"
    }
    for name, layer in held.items():
        assert torch.equal(layer.weight.view(torch.uint8), written[f"{name}.weight"].view(torch.uint8))
    assert torch.equal(held[Q].weight_scale, scale.expand(48, 1))

    assert convert(first, *flags, "--out", again) == 0
    assert (again / FILE).read_bytes() == (first / FILE).read_bytes(), "codes are not quantised a second time"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--to", "diffusers", "--fp8", "kijai"), "--fp8 kijai and --to diffusers: diffusers reads no such files"),
        (("--to", "upstream", "--fp8_keep", "*.ffn.2"), "--fp8_keep '*.ffn.2': without --fp8"),
        (("--to", "upstream", "--fp8", "comfyui", "--fp8_keep", "head.*"), "'head.*' names no linear layer"),
    ],
)
def test_what_cannot_be_written_is_said_and_writes_nothing(
    flags: tuple[str, ...], says: str, convert: Any, tiny_checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    assert convert(tiny_checkpoint, *flags, "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
