"""CLIP's image tower: the published keys, the numbers of transformers, upstream's class, files of other libraries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.dialects import CLIP, open_network
from wan.engine.weights.keymap import TRANSFORMERS_CLIP
from wan.engine.weights.stream import check_fit
from wan.modules.clip import MEAN, STD, CLIPModel, ImageTower, build_clip, look

KEYS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "dit_keys.json").read_text())["clip"]
SIZES = {"image_size": 28, "patch_size": 7, "dim": 160, "mlp_dim": 96, "out_dim": 24, "num_heads": 2, "num_layers": 3}
FLOAT32 = 1e-5


def tiny() -> ImageTower:
    tower = ImageTower(**SIZES).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower.requires_grad_(False)


def transformers_state(tower: ImageTower) -> dict[str, Tensor]:
    """The tower's weights as `CLIPVisionModel` stores them."""
    state: dict[str, Tensor] = {}
    for key, value in tower.state_dict().items():
        if ".to_qkv." in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                state[TRANSFORMERS_CLIP.to_theirs(key.replace("to_qkv", part))] = piece.clone()
        elif key != "visual.head":
            flat = value[0, 0] if key.endswith("cls_embedding") else value[0] if "pos_embedding" in key else value
            state[TRANSFORMERS_CLIP.to_theirs(key)] = flat.clone()
    return state


def theirs(tower: ImageTower) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=160, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
        hidden_act="gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    # Newer versions of transformers leave the first part of the names away.
    begins = "" if any(key.startswith("embeddings.") for key in model.state_dict()) else "vision_model."
    state = {begins + key.removeprefix("vision_model."): value for key, value in transformers_state(tower).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("position_ids") for key in missing)
    return model


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def test_published_tower_has_exactly_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        state = ImageTower().state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    assert len(state) == KEYS["count"] and hashlib.sha256(lines.encode()).hexdigest() == KEYS["sha256"]


def test_equals_transformers_before_the_last_block() -> None:
    tower, pixels = tiny(), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(tower)(pixels, output_hidden_states=True).hidden_states
    assert relative_error(tower.visual(pixels, use_31_block=True), expected[-2]) < FLOAT32
    assert relative_error(tower.visual(pixels), expected[-1]) < FLOAT32
    assert relative_error(expected[-1], expected[-2]) > 0.01


def test_images_of_any_shape_are_squeezed_to_the_square_and_normalised() -> None:
    tower = tiny()
    wide, tall = torch.rand(3, 1, 30, 60) * 2 - 1, torch.rand(3, 2, 56, 28) * 2 - 1
    pixels = []
    for frame in (wide[:, 0], tall[:, 0], tall[:, 1]):
        small = nn.functional.interpolate(frame[None], size=(28, 28), mode="bicubic", align_corners=False)[0]
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        pixels.append(((small + 1) / 2 - mean) / std)
    expected = tower.visual(torch.stack(pixels), use_31_block=True)
    assert relative_error(look(tower.visual, [wide, tall]), expected) < FLOAT32


def test_upstreams_class_reads_upstreams_file(tmp_path: Path) -> None:
    tower, path = tiny(), tmp_path / "models_clip.pth"
    text = {"textual.blocks.0.attn.q.weight": torch.zeros(2, 2), "log_scale": torch.zeros(())}
    torch.save(tower.state_dict() | text, path)
    model = CLIPModel(torch.float16, "cpu", str(path), str(tmp_path / "xlm-roberta-large"))
    assert all(torch.equal(model.model.state_dict()[key], value.half()) for key, value in tower.state_dict().items())
    videos = [torch.rand(3, 1, 40, 30) * 2 - 1]
    hidden = model.visual(videos)
    assert hidden.shape == (1, 17, 160) and hidden.dtype == torch.float16
    assert relative_error(hidden.float(), look(tower.visual, videos)) < 0.02
    picture = Image.new("RGB", (9, 5), (255, 128, 0))
    expected = [(value / 255 - mean) / std for value, mean, std in zip((255, 128, 0), MEAN, STD, strict=True)]
    made = model.transforms(picture)
    assert made.shape == (3, 28, 28) and torch.allclose(made.mean((1, 2)), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("extra", ["visual_projection.weight", "vision_model.embeddings.position_ids"])
def test_files_of_transformers_and_comfyui_are_read(tmp_path: Path, extra: str) -> None:
    tower, path = tiny(), tmp_path / "clip_vision_h.safetensors"
    state = transformers_state(tower) | {extra: torch.zeros(2, 2)}
    save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    weights = open_network(path, CLIP)
    check_fit(build_clip(weights.shapes()), weights)
    model = CLIPModel(torch.float32, "cpu", path)
    for key, value in tower.state_dict().items():
        assert key == "visual.head" or torch.equal(model.model.state_dict()[key], value)
    assert next(iter(weights.dtypes().values())) == torch.float32
    assert [key for key, _ in weights.stream(["visual.cls_embedding"])] == ["visual.cls_embedding"]


def test_file_of_another_network_and_damaged_one_are_refused(tmp_path: Path) -> None:
    torch.save({"blocks.0.attn.q.weight": torch.zeros(2, 2)}, tmp_path / "t5.pth")
    with pytest.raises(BadCheckpoint, match=r"t5\.pth' is a umT5 text encoder, not a CLIP image encoder"):
        CLIPModel(torch.float32, "cpu", tmp_path / "t5.pth")
    state = tiny().state_dict()
    del state["visual.pos_embedding"]
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(BadCheckpoint, match="not CLIP's image tower: 'visual.pos_embedding' is not among"):
        CLIPModel(torch.float32, "cpu", tmp_path / "clip.pth")
    with pytest.raises(BadCheckpoint, match="without tokenizer_path"):
        CLIPModel.of(tiny()).tokenizer  # noqa: B018
