"""Speech-to-video's transformer: the published keys, the numbers of a plain account of it, its call and its faults."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.engine.adapting import Adapted
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.weights.lora import open_lora
from wan.modules.blocks import BlockInputs
from wan.modules.building import build_dit
from wan.modules.s2v.model_s2v import AUDIO_LAYERS, INJECT_LAYERS, SpeechCondition, WanModel_S2V

KEYS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "dit_keys.json").read_text())
LAYERS = (0, 2, 3)
TINY = {
    "dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 4, "text_dim": 24, "freq_dim": 32, "text_len": 12,
    "audio_dim": 20, "audio_inject_layers": LAYERS,
}  # fmt: skip
T, H, W = 3, 8, 16
FLOAT32 = 1e-5  # float32 against float64: only rounding differs


def load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("s2v_oracle", Path(__file__).parent / "s2v_oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def tiny(**changes: Any) -> WanModel_S2V:
    model = WanModel_S2V(**(TINY | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # nothing stays as it is born: zeros and ones would hide errors
        nn.init.normal_(parameter, 1 if "norm" in name else 0, 0.2)
    return model


def given(**changes: Any) -> dict[str, Tensor]:
    return {
        "x": torch.randn(16, T, H, W), "text": torch.randn(7, 24), "ref": torch.randn(16, 1, H, W),
        "motion": torch.randn(16, 19, H, W), "pose": torch.randn(16, T, H, W),
        "audio": torch.randn(AUDIO_LAYERS, 20, 4 * T),
    } | changes  # fmt: skip


def expected(model: WanModel_S2V, values: dict[str, Tensor], t: float, *, drop: bool = False) -> Tensor:
    return oracle.velocity(
        model.state_dict(), heads=model.num_heads, inject=model.audio_inject_layers, text_len=12, t=t, **values,
        motion_frames=(73, 19), drop_motion=drop,
    )  # fmt: skip


def call(model: WanModel_S2V, values: dict[str, Tensor], t: float, **more: Any) -> Tensor:
    [out] = model(
        [values["x"]], torch.tensor([t]), [values["text"]], seq_len=0, ref_latents=values["ref"][None],
        motion_latents=values["motion"][None], cond_states=values["pose"][None], audio_input=values["audio"][None],
        motion_frames=[73, 19], **more,
    )  # fmt: skip
    return out


def condition(values: dict[str, Tensor]) -> SpeechCondition:
    names = {"context": "text", "audio": "audio", "reference": "ref", "motion": "motion", "pose": "pose"}
    return SpeechCondition(**{name: values[mine][None] for name, mine in names.items()})


# ---- keys ------------------------------------------------------------------------------------------------------------

PUBLISHED = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}


def test_published_sizes_have_exactly_the_published_keys_and_shapes() -> None:
    state = build_dit(PUBLISHED | {"audio_inject_layers": INJECT_LAYERS}).state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    assert len(state) == KEYS["s2v-14B"]["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == KEYS["s2v-14B"]["sha256"]


def test_a_file_without_a_config_makes_the_published_model() -> None:
    model = build_dit(PUBLISHED | {"audio_inject_layers": INJECT_LAYERS})
    built = build_dit({}, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert isinstance(built, WanModel_S2V)
    assert dict(built.config) == dict(model.config)


def test_weights_of_another_form_are_refused() -> None:
    shapes = {key: tuple(value.shape) for key, value in tiny().state_dict().items()}
    assert build_dit({"audio_inject_layers": [0, 2, 3], "num_heads": 2}, shapes).config.audio_dim == 20
    with pytest.raises(BadCheckpoint, match=r"audio_inject_layers = \[0, 2\] but the weights have 3"):
        build_dit({"audio_inject_layers": [0, 2]}, shapes)
    with pytest.raises(BadCheckpoint, match="where its 3 listening blocks act"):
        build_dit({"num_heads": 2}, shapes)
    with pytest.raises(BadCheckpoint, match=r"'enable_motioner': True.*with.*'enable_motioner': False"):
        WanModel_S2V(**TINY, enable_motioner=True)
    for layers in ((), (2, 1), (0, 4)):
        with pytest.raises(BadCheckpoint, match="they must rise and stay below the 4"):
            WanModel_S2V(**(TINY | {"audio_inject_layers": layers}))


def test_a_saved_model_comes_back_with_all_its_fields(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanModel_S2V"
    back = WanModel_S2V.from_pretrained(tmp_path)
    assert isinstance(back, WanModel_S2V) and dict(back.config) == dict(model.config)
    values = given()
    assert torch.equal(call(back, values, 500.0), call(model, values, 500.0))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [999.0, 37.0, 0.0])
def test_equals_the_plain_account(t: float) -> None:
    model, values = tiny(), given()
    assert relative_error(call(model, values, t), expected(model, values, t)) < FLOAT32


def test_equals_the_plain_account_where_nothing_came_before() -> None:
    model, values = tiny(), given()
    first = call(model, values, 500.0, drop_motion_frames=True)
    assert relative_error(first, expected(model, values, 500.0, drop=True)) < FLOAT32
    assert relative_error(first, call(model, values, 500.0)) > 1e-3


@pytest.mark.parametrize("frames", [4, 25])
def test_motion_is_filled_with_zeros_in_front_or_cut_there(frames: int) -> None:
    model, values = tiny(), given(motion=torch.randn(16, frames, H, W))
    assert relative_error(call(model, values, 500.0), expected(model, values, 500.0)) < FLOAT32


def test_no_pose_is_a_pose_of_zeros() -> None:
    model, values = tiny(), given(pose=torch.zeros(16, T, H, W))
    without = dataclasses.replace(condition(values), pose=None)
    out = model.velocity(values["x"][None], torch.tensor([500.0]), without)[0]
    assert relative_error(out, expected(model, values, 500.0)) < FLOAT32


def test_rows_and_columns_of_coarse_grids_are_rounded_down() -> None:
    """A size where places between two tokens occur: 10 columns spread over 20."""
    values = given(**{name: torch.randn(16, frames, 24, 40) for name, frames in (("x", T), ("ref", 1), ("pose", T))})
    values["motion"] = torch.randn(16, 19, 24, 40)
    model = tiny()
    assert relative_error(call(model, values, 500.0), expected(model, values, 500.0)) < FLOAT32


@torch.no_grad()
def test_a_batch_gives_what_each_sample_gives_alone() -> None:
    model, both = tiny(), [given(), given()]
    x = torch.stack([values["x"] for values in both])
    stacked = SpeechCondition.cat([condition(values) for values in both])
    out = model.velocity(x, torch.tensor([500.0, 500.0]), stacked)
    for value, values in zip(out, both, strict=True):
        assert relative_error(value, call(model, values, 500.0)) < FLOAT32


@torch.no_grad()
def test_what_does_not_change_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = tiny(), given()
    once = condition(values)
    first = model.velocity(values["x"][None], torch.tensor([900.0]), once)
    for part in (model.casual_audio_encoder, model.frame_packer):
        monkeypatch.setattr(part, "forward", None)
    later = model.velocity(values["x"][None], torch.tensor([900.0]), once)
    assert torch.equal(first, later)


@pytest.mark.slow
@torch.no_grad()
def test_listening_blocks_run_where_they_act_and_can_be_compiled() -> None:
    model, values = tiny(), given()
    plain = call(model, values, 500.0)
    ran: list[nn.Module] = []

    def watch(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Any:
        ran.append(block)
        return block(tokens, inputs)

    model.run_block = watch
    for block in model.all_blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(call(model, values, 500.0), plain) < FLOAT32
    assert ran == model.all_blocks()
    listening = model.adapters["s2v"].blocks
    assert [ran.index(block) for block in listening] == [1, 4, 6]


@torch.no_grad()
def test_a_lora_for_what_it_looks_back_at_asks_nothing_else_of_the_video(tmp_path: Path) -> None:
    """Queries of reference and motion change what these tokens become, and no token of the video."""
    model, values, seen = tiny(), given(), list[Tensor]()

    def watch(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Any:
        out = block(tokens, inputs)
        seen.extend([out.clone()] if block is model.blocks[0] else [])
        return out

    model.run_block = watch
    key = "blocks.0.self_attn.q_loras.{}.weight"
    save_file({key.format("down"): torch.randn(2, 48), key.format("up"): torch.randn(48, 2)}, tmp_path / "x.sft")
    adapted = Adapted(model, torch.device("cpu"), dense=False)
    adapted.load([open_lora(tmp_path / "x.sft")])
    for strength in (0.0, 1.0):
        with adapted.at((strength,)):
            call(model, values, 500.0)
    moved = (seen[1] - seen[0]).abs().amax((0, 2)) > FLOAT32
    video = T * H * W // 4
    assert not moved[:video].any() and moved[video:].all()


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model, values = tiny(), given()
    plain = call(model, values, 500.0)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if model.float32_keys(name) else torch.bfloat16)
    assert relative_error(call(model, values, 500.0), plain) < 5e-2


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused() -> None:
    model = tiny()
    for name, value, message in (
        ("audio", torch.randn(AUDIO_LAYERS, 20, 8), "8 feature entries were given, 12 are needed"),
        ("pose", torch.randn(16, T + 1, H, W), "one size and length"),
        ("ref", torch.randn(16, 1, H, 2 * W), "not one frame of the video's size"),
    ):
        with pytest.raises(BadRequest, match=message):
            call(model, given(**{name: value}), 500.0)
    odd = {name: torch.randn(16, n, 4, 4) for name, n in (("x", T), ("ref", 1), ("motion", 19), ("pose", T))}
    with pytest.raises(BadRequest, match=r"multiples of 8 latent pixels, 64 of the video"):
        call(model, given(**odd), 500.0)
    with pytest.raises(BadRequest, match="add_last_motion=0"):
        call(model, given(), 500.0, add_last_motion=0)
