"""tools/convert.py on models that look at pictures: other libraries load the result, and it converts back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.configs import WAN_CONFIGS
from wan.engine.weights.dialects import CLIP, DIT, open_network
from wan.engine.weights.stream import load_into
from wan.modules.animate import WanAnimateModel
from wan.modules.animate.model_animate import AnimateCondition, led_by_reference
from wan.modules.building import build_dit
from wan.modules.clip import ImageTower, build_clip, look
from wan.modules.image_embedding import ImageCondition
from wan.modules.model import WanModel
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAEConfig

SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 32, "text_len": 32}
CLIP_SIZES = {"image_size": 28, "patch_size": 7, "dim": 80, "mlp_dim": 64, "out_dim": 8, "num_heads": 1}
TOKENS, FACE = 17, 16
DIT_FILE, VAE_FILE = "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"
FLOAT32 = 2e-5
"""Relative bound: two implementations in float32."""

Make = Callable[[str], Path]


def transformer(task: str) -> Any:
    if task == "animate-14B":
        own = {"motion_encoder_dim": 24, "motion_widths": (8, 12, 20), "motion_dim": 6, "face_dim": 16}
        return WanAnimateModel(image_dim=80, face_every=1, **own, **SIZES)  # type: ignore[arg-type]
    kind = task.partition("-")[0]
    return WanModel(kind, in_dim=36, image_dim=80, image_positions=2 * TOKENS if kind == "flf2v" else 0, **SIZES)  # type: ignore[arg-type]


@pytest.fixture
def published(
    tmp_path: Path, write_checkpoint: Any, small_config: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Task -> a folder of random weights in the original layout."""

    def make(task: str) -> Path:
        config = small_config(task)
        monkeypatch.setitem(WAN_CONFIGS, task, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dit, tower = transformer(task), ImageTower(**CLIP_SIZES, num_layers=3)
            for key, value in (*dit.named_parameters(), *tower.named_parameters()):
                if "norm" not in key and ".proj.0" not in key and ".proj.4" not in key:
                    nn.init.normal_(value, std=1.0 if "motion_encoder" in key else 0.1)
            vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
            folder: Path = write_checkpoint(tmp_path / task, dit, vae, VAE_FILE)
            text = {"textual.head.0.weight": torch.zeros(2, 2)}
            torch.save(tower.state_dict() | text, folder / config.clip_checkpoint)
        return folder

    return make


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def built(path: Path, network: str) -> Any:
    weights = open_network(path, network)
    module = build_clip(weights.shapes()) if network == CLIP else build_dit({"num_heads": 2}, weights.shapes())
    load_into(module, weights.stream(), dtype=lambda key: None, place=lambda key, value: torch.device("cpu"))
    return module.eval()


@torch.inference_mode()
def velocities(task: str, folder: Path, ours: Any) -> tuple[Tensor, Tensor]:
    """What our transformer and diffusers' make of the same input."""
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["transformer"][1]
    kind = getattr(diffusers, name)
    other = kind.from_config(kind.load_config(str(folder / "transformer"))).eval()
    other.load_state_dict(load_file(folder / "transformer" / DIT_FILE), strict=True)
    latents, channels = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 20, 3, 4, 6)
    text, t = torch.randn(1, 512, 32), torch.tensor([900.0])  # diffusers takes 512 tokens for granted
    image = torch.randn(2 if task == "flf2v-14B" else 1, TOKENS, 80)
    seen = image.flatten(0, 1)[None]  # diffusers joins the two pictures of a video itself
    whole = torch.cat((latents, channels), 1)
    extra: tuple[Tensor, ...] = ()
    condition: ImageCondition = ImageCondition(context=text, channels=channels, image=seen)
    if task == "animate-14B":
        pose, face = torch.randn(1, 16, 2, 4, 6), torch.rand(1, 3, 5, FACE, FACE)
        extra = (pose, face)
        condition = AnimateCondition(context=text, channels=channels, image=seen, **led_by_reference(pose, face))
    return ours.velocity(latents, t, condition), other(whole, t, text, image, *extra, return_dict=False)[0]


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "animate-14B"])
def test_diffusers_runs_the_converted_model_and_it_converts_back(
    task: str, published: Make, tool: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    folder, there, back = published(task), tmp_path / "diffusers", tmp_path / "upstream"
    argv = ["--task", task]
    assert tool.main(["--ckpt_dir", str(folder), "--to", "diffusers", "--out", str(there), *argv]) == 0
    assert "visual.head of" in capsys.readouterr().out
    mine, theirs = velocities(task, there, built(folder / DIT_FILE, DIT))
    assert relative(mine, theirs) < FLOAT32

    assert tool.main(["--ckpt_dir", str(there), "--to", "upstream", "--out", str(back), *argv]) == 0
    clip_file = WAN_CONFIGS[task].clip_checkpoint
    before, after = (load_file(each / DIT_FILE) for each in (folder, back))
    tower, again = (torch.load(each / clip_file, weights_only=True) for each in (folder, back))
    left_out = {"visual.head", "textual.head.0.weight"}
    for old, new in ((before, after), ({k: v for k, v in tower.items() if k not in left_out}, again)):
        assert old.keys() == new.keys() and all(torch.equal(value, new[key]) for key, value in old.items())


def test_transformers_shows_a_picture_to_the_converted_encoder(
    published: Make, tool: ModuleType, tmp_path: Path
) -> None:
    """As diffusers' pipelines do it. A picture that needs no resizing, as the two libraries' filters differ."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    folder, there = published("i2v-14B"), tmp_path / "there"
    assert tool.main(["--ckpt_dir", str(folder), "--to", "diffusers", "--out", str(there), "--task", "i2v-14B"]) == 0
    encoder, said = CLIPVisionModel.from_pretrained(str(there / "image_encoder"), output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    show = CLIPImageProcessor.from_pretrained(str(there / "image_processor"))
    picture = Image.effect_noise((28, 28), 80).convert("RGB")
    pixels = torch.tensor(list(picture.tobytes())).view(28, 28, 3).permute(2, 0, 1).float() / 127.5 - 1
    tower = built(folder / WAN_CONFIGS["i2v-14B"].clip_checkpoint, CLIP).visual
    with torch.inference_mode():
        seen = encoder(**show(images=picture, return_tensors="pt"), output_hidden_states=True).hidden_states[-2]
        assert relative(look(tower, [pixels[:, None]]), seen) < FLOAT32
    wide = Image.new("RGB", (56, 28))
    wide.paste((255, 255, 255), (0, 0, 10, 28))
    squeezed = show(images=wide, return_tensors="pt")["pixel_values"]
    assert squeezed.shape == (1, 3, 28, 28) and squeezed[..., 0].min() > squeezed[..., -1].max()  # nothing is cut off
    index = json.loads((there / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline" and index["boundary_ratio"] is None
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]


def test_what_diffusers_cannot_hold_is_refused_in_a_line(
    published: Make, tool: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    folder, out = published("animate-14B"), tmp_path / "out"
    argv = ["--ckpt_dir", str(folder), "--to", "diffusers", "--out", str(out), "--task", "animate-14B"]
    state = load_file(folder / DIT_FILE)
    state["motion_encoder.enc.net_app.convs.1.skip.0.kernel"] *= 2
    save_file(state, folder / DIT_FILE)
    assert tool.main(argv) == 2
    said = capsys.readouterr().err
    assert "skip.0.kernel' of its own" in said and said.count("\n") == 1 and not out.exists()
    monkeypatch.setattr(tool, "check_folder", lambda *given: None)
    assert tool.main([*argv[:-1], "s2v-14B"]) == 2
    said = capsys.readouterr().err
    assert "diffusers has no class for the transformer of s2v-14B" in said and said.count("\n") == 1
