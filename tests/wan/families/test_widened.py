"""A LoRA that gives the first layer more input channels makes another model of a checkpoint, whatever the mode."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import wan
from wan.cli.checkpoint import detect_task
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint
from wan.layouts import CheckpointFiles

EXPERTS = {"high_noise_model": "lora_high", "low_noise_model": "lora_low"}
Q, PATCH = "blocks.1.self_attn.q", "patch_embedding"


def lora(seed: int) -> dict[str, Tensor]:
    """From the 16 channels of text-to-video to the 36 of image-to-video, and a change inside the blocks."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        f"{PATCH}.lora_A": (2, 36, 1, 2, 2), f"{PATCH}.lora_B": (48, 2),
        f"{Q}.lora_A": (2, 48), f"{Q}.lora_B": (48, 2),
    }  # fmt: skip
    return {f"{key}.weight": torch.randn(*shape, generator=made) * 0.1 for key, shape in shapes.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for seed, flag in enumerate(EXPERTS.values()):
        save_file(lora(seed), str(tmp_path / f"{flag}.safetensors"))
    return {flag: str(tmp_path / f"{flag}.safetensors") for flag in EXPERTS.values()}


@pytest.fixture
def image_task(tiny_config: Any) -> Any:
    """Image-to-video of 2.2 in the sizes of the tiny text-to-video model."""
    config = type(tiny_config)(WAN_CONFIGS["i2v-A14B"])
    config.update({key: tiny_config[key] for key in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")})
    config.update(text_len=32, param_dtype=torch.float32, t5_dtype=torch.float32)
    return config


def test_every_mode_makes_the_video_of_the_adapter_folder(
    tiny_checkpoint: Path, image_task: Any, files: dict[str, str], tmp_path: Path
) -> None:
    """Merged bit for bit: it is the same sum, new channels at half the strength too."""

    def video(folder: Path, **options: Any) -> Tensor:
        pipe = wan.WanI2V(image_task, folder, device="cpu", **options)
        picture = Image.new("RGB", (16, 16), (200, 40, 10))
        made: Tensor = pipe.generate("a cat", picture, max_area=256, frame_num=1, sampling_steps=2, seed=3)
        return made

    folder = tmp_path / "adapted"
    for seed, name in enumerate(EXPERTS):
        (folder / name).mkdir(parents=True)
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": str(tiny_checkpoint / name)}
        (folder / name / "adapter_config.json").write_text(json.dumps(about))
        (folder / name / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 512}))
        save_file(lora(seed), str(folder / name / "adapter_model.safetensors"))
    for path in tiny_checkpoint.iterdir():
        if path.name not in EXPERTS:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    half = {flag: f"{path}:0.5" for flag, path in files.items()}
    expected = video(folder)
    assert torch.equal(video(tiny_checkpoint, **half), expected)
    for mode in ("onthefly", "stream"):
        assert (video(tiny_checkpoint, **half, lora_mode=mode) - expected).abs().max() < 1e-4 < expected.std()


def test_the_model_that_comes_out_is_told_and_others_are_refused_before_weights_are_read(
    tiny_checkpoint: Path, tiny_config: Any, image_task: Any, files: dict[str, str]
) -> None:
    widened = CheckpointFiles(loras=tuple((flag, Path(path)) for flag, path in files.items()))
    assert detect_task(tiny_checkpoint, WAN_CONFIGS, widened) == "i2v-A14B"
    assert detect_task(tiny_checkpoint, WAN_CONFIGS) == "t2v-A14B"
    with pytest.raises(BadCheckpoint, match=r"with LoRA '.*lora_high.safetensors' is a transformer for i2v"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **files)
    with pytest.raises(BadCheckpoint, match=r"low_noise_model.*' is a transformer for t2v; .* needs one for i2v"):
        wan.WanI2V(image_task, tiny_checkpoint, device="cpu", lora_high=files["lora_high"])
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode="onthefly")
    with pytest.raises(BadCheckpoint, match=r"'patch_embedding.weight' 36 input channels, this model was loaded with"):
        pipe.generate("a", (32, 32), 1, sampling_steps=1, seed=0, lora=files["lora_high"])
