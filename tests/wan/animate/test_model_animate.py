"""Animate's transformer: the published keys, the numbers of an independent implementation, the face encoded once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.weights.dialects import DIT, identify, open_network
from wan.engine.weights.stream import check_fit
from wan.modules.animate import WanAnimateModel
from wan.modules.animate.model_animate import AnimateCondition, led_by_reference
from wan.modules.building import build_dit
from wan.modules.model import WanModel

KEYS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "dit_keys.json").read_text())["animate-14B"]
TINY: dict[str, Any] = {
    "dim": 96, "ffn_dim": 64, "num_heads": 3, "num_layers": 4, "text_dim": 48, "freq_dim": 64, "image_dim": 40,
    "motion_encoder_dim": 24, "motion_widths": (8, 12, 20), "motion_dim": 6, "face_dim": 16, "face_every": 2,
}  # fmt: skip
FACE_SIZE = 16
FRAMES = 9  # of the video: 3 latent frames, and the reference's before them
FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def tiny(**changes: Any) -> WanAnimateModel:
    model = WanAnimateModel(**(TINY | changes)).eval()
    for name, parameter in model.named_parameters():  # nothing may be born as zeros or ones and hide what it does
        if not name.endswith("modulation"):
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 4 else 1.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("blocks.0.ffn.2.weight", "to_q.weight")):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@dataclasses.dataclass
class Given:
    """What upstream's call takes, for two samples."""

    latents: Tensor
    y: Tensor
    text: Tensor
    image: Tensor
    pose: Tensor
    face: Tensor
    t: Tensor

    @classmethod
    def random(cls, batch: int = 2) -> Given:
        return cls(
            latents=torch.randn(batch, 16, 4, 4, 6), y=torch.randn(batch, 20, 4, 4, 6),
            text=torch.randn(batch, 512, TINY["text_dim"]), image=torch.randn(batch, 257, TINY["image_dim"]),
            pose=torch.randn(batch, 16, 3, 4, 6), face=torch.rand(batch, 3, FRAMES, FACE_SIZE, FACE_SIZE) * 2 - 1,
            t=torch.tensor([987.0, 412.0])[:batch],
        )  # fmt: skip

    def condition(self) -> AnimateCondition:
        return AnimateCondition(
            context=self.text, channels=self.y, image=self.image, **led_by_reference(self.pose, self.face)
        )


def diffusers_state(model: WanAnimateModel) -> dict[str, Tensor]:
    """The weights of `model` as diffusers names and cuts them, written out here a second time."""
    renamed = {}
    for key, value in model.state_dict().items():
        for ours, theirs in NAMES:
            key = key.replace(ours, theirs)
        if "kernel" in key:
            continue
        if "linear1_kv" in key:
            for part, half in zip(("to_k", "to_v"), value.chunk(2), strict=True):
                renamed[key.replace("linear1_kv", part)] = half
            continue
        renamed[key] = value.flatten() if "act_fn" in key else value
    return renamed


NAMES = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2"),
    ("self_attn.", "attn1.to_"), ("cross_attn.", "attn2.to_"), ("to_norm_k_img", "norm_added_k"),
    ("to_norm", "norm"), ("to_k_img", "add_k_proj"), ("to_v_img", "add_v_proj"), ("to_o.", "to_out.0."),
    ("fuser_blocks.", ""), ("linear1_q", "to_q"), ("linear2", "to_out"), ("q_norm", "norm_q"), ("k_norm", "norm_k"),
    ("_local.conv", "_local"), ("conv2.conv", "conv2"), ("conv3.conv", "conv3"),
    ("net_app.convs.0.0", "conv_in"), ("net_app.convs.0.1", "conv_in.act_fn"), ("net_app.convs.3.", "conv_out."),
    ("net_app.convs.1.", "res_blocks.0."), ("net_app.convs.2.", "res_blocks.1."),
    ("conv1.0", "conv1"), ("conv1.1", "conv1.act_fn"), ("conv2.1", "conv2"), ("conv2.2", "conv2.act_fn"),
    ("skip.1", "conv_skip"), ("enc.fc", "motion_network"), ("dec.direction.weight", "motion_synthesis_weight"),
    ("motion_encoder.enc.", "motion_encoder."), ("motion_encoder.dec.", "motion_encoder."),
)  # fmt: skip


def theirs(model: WanAnimateModel) -> Any:
    """diffusers' transformer with the weights of `model`."""
    from diffusers import WanAnimateTransformer3DModel

    widths = dict(zip(("16", "8", "4"), TINY["motion_widths"], strict=True))
    other = WanAnimateTransformer3DModel(
        num_attention_heads=3, attention_head_dim=32, text_dim=48, freq_dim=64, ffn_dim=64, num_layers=4,
        image_dim=40, added_kv_proj_dim=96, motion_encoder_channel_sizes=widths, motion_encoder_size=FACE_SIZE,
        motion_style_dim=20, motion_dim=6, motion_encoder_dim=24, face_encoder_hidden_dim=16,
        inject_face_latents_blocks=2,
    ).eval()  # fmt: skip
    other.load_state_dict(diffusers_state(model), strict=True)
    return other


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_published_sizes_have_exactly_the_published_keys_and_shapes() -> None:
    model = build_dit({"motion_encoder_dim": 512})
    assert isinstance(model, WanAnimateModel) and model.face_size == 512
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(model.state_dict().items()))
    assert len(model.state_dict()) == KEYS["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == KEYS["sha256"]


def test_shapes_alone_make_the_model() -> None:
    model = tiny()
    built = build_dit({"num_heads": 3}, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert isinstance(built, WanAnimateModel)
    own = {name: built.config[name] for name in TINY if name not in ("motion_widths",)}
    assert own == {name: TINY[name] for name in own} and tuple(built.config.motion_widths) == TINY["motion_widths"]
    assert built.face_size == FACE_SIZE and built.all_blocks()[1] is built.face_adapter.fuser_blocks[0]
    with pytest.raises(BadCheckpoint, match="face_dim = 99 but the weights have 16"):
        build_dit({"face_dim": 99, "num_heads": 3}, {k: tuple(v.shape) for k, v in model.state_dict().items()})
    with pytest.raises(BadCheckpoint, match="4 layers cannot have one face block for every 3"):
        tiny(face_every=3)


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = WanModel.from_pretrained(tmp_path)
    assert isinstance(again, WanAnimateModel)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_diffusers_file_becomes_the_same_model(tmp_path: Path) -> None:
    """Layers it splits are joined, dims of 1 put back, and the blur it does not store is the one it uses."""
    model = tiny()
    state = diffusers_state(model)
    save_file({key: value.contiguous() for key, value in state.items()}, str(tmp_path / "animate.safetensors"))
    weights = open_network(tmp_path / "animate.safetensors", DIT)
    built = build_dit({"num_heads": 3}, weights.shapes())
    check_fit(built, weights)
    read = dict(weights.stream())
    assert read.keys() == model.state_dict().keys() == weights.dtypes().keys()
    assert all(torch.equal(value, read[key]) for key, value in model.state_dict().items())
    name, dialect = identify(state) or ("", None)
    assert name == DIT and dialect is not None
    stored = {dialect.theirs(key) for key in read if "kernel" not in key and "linear1_kv" not in key}
    assert stored <= state.keys()


# ---- numbers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_equals_diffusers() -> None:
    model, given = tiny(), Given.random()
    expected = theirs(model)(
        torch.cat((given.latents, given.y), 1), given.t, given.text, given.image, given.pose, given.face
    )[0]
    assert relative_error(model.velocity(given.latents, given.t, given.condition()), expected) < FLOAT32


@torch.inference_mode()
def test_pose_and_face_reach_every_frame_but_the_references() -> None:
    """With one layer what is given for a frame enters at its tokens: seen in what the first face block is given."""
    model, given = tiny(), Given.random(1)
    seen: list[Tensor] = []

    def watch(block: nn.Module, tokens: Tensor, inputs: Any) -> Any:
        out = block(tokens, inputs)
        if block in set(model.face_adapter.fuser_blocks):
            seen.append(out.unflatten(1, (4, -1)))
        return out

    model.run_block = watch
    model.velocity(given.latents, given.t, given.condition())
    given.face = given.face.clone()
    given.face[:, :, 5:] = 0.5  # the last latent frame's, and no earlier one's
    model.velocity(given.latents, given.t, given.condition())
    same = [torch.equal(a, b) for a, b in zip(seen[0].unbind(1), seen[2].unbind(1), strict=True)]
    assert same == [True, True, True, False]


@torch.inference_mode()
def test_upstreams_list_call_equals_velocity() -> None:
    model, given = tiny(), Given.random()
    out = model(
        list(given.latents), given.t, given.image, list(given.text), 24, y=list(given.y), pose_latents=given.pose,
        face_pixel_values=given.face,
    )  # fmt: skip
    expected = model.velocity(given.latents, given.t, given.condition())
    assert relative_error(torch.stack(out), expected) < FLOAT32
    with pytest.raises(BadRequest, match="needs y, pose_latents and face_pixel_values"):
        model(list(given.latents), given.t, given.image, list(given.text), 24)


@torch.inference_mode()
def test_bfloat16_weights_are_close_to_float32() -> None:
    model, given = tiny(), Given.random(1)
    exact = model.velocity(given.latents, given.t, given.condition())
    for key, parameter in model.named_parameters():
        if not WanModel.float32_keys(key):
            parameter.data = parameter.data.bfloat16()
    assert relative_error(model.velocity(given.latents, given.t, given.condition()), exact) < 0.05


# ---- bad input and cost ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_parts_that_do_not_fit_are_refused() -> None:
    model, given = tiny(), Given.random(1)
    for change, said in (
        ({"pose": given.pose[:, :, :2]}, "must be of one size and length"),
        ({"face": given.face[:, :, :5]}, "5 frames of the face make 2 latent frames and the video has 3"),
        ({"face": given.face[..., :8]}, "faces of 8x16 pixels: this model takes 16x16"),
    ):
        wrong = dataclasses.replace(given, **change)
        with pytest.raises(BadRequest, match=said):
            model.velocity(wrong.latents, wrong.t, wrong.condition())


@torch.inference_mode()
def test_the_face_is_encoded_once_for_all_steps() -> None:
    model, given = tiny(), Given.random(1)
    calls: list[int] = []
    model.motion_encoder.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    condition = given.condition()
    for t in (900.0, 500.0, 100.0):
        model.velocity(given.latents, torch.tensor([t]), condition)
    assert calls == [FRAMES]


@torch.inference_mode()
def test_a_window_of_latent_frames_takes_its_part_of_pose_and_face() -> None:
    given = Given.random(1)
    part = given.condition().window((0, 2, 3))
    assert torch.equal(part.pose[:, :, 1:], given.pose[:, :, 1:])
    assert torch.equal(part.face[:, :, 4:], given.face[:, :, 4:])  # frame 2's last picture, then frame 3's four
    assert part.image is given.condition().image or torch.equal(part.image, given.image)  # type: ignore[arg-type]


@pytest.mark.slow
@torch.inference_mode()
def test_blocks_compile_whole_and_agree() -> None:
    model, given = tiny(num_layers=2), Given.random(1)
    plain = model.velocity(given.latents, given.t, given.condition())
    for block in model.all_blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(model.velocity(given.latents, given.t, given.condition()), plain) < FLOAT32
