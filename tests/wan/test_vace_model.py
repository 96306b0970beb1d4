"""VACE's transformer: the published keys, the numbers of an independent implementation, one hint at a time."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Condition
from wan.engine.weights.keymap import DIFFUSERS_DIT
from wan.modules.blocks import BlockInputs
from wan.modules.building import build_dit
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceCondition, VaceWanModel

KEYS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "dit_keys.json").read_text())
TINY = {"dim": 96, "ffn_dim": 160, "num_heads": 3, "num_layers": 4, "text_dim": 48, "freq_dim": 64, "text_len": 12}
LAYERS = (0, 1, 3)
CONTROL = 10  # channels; 96 in the published models
FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def tiny(**changes: Any) -> VaceWanModel:
    model = VaceWanModel(**({"vace_layers": LAYERS, "vace_in_dim": CONTROL} | TINY | changes)).eval()
    for layer in (model.head.head, model.vace_blocks[0].before_proj, *(b.after_proj for b in model.vace_blocks)):
        nn.init.normal_(layer.weight, std=0.1)  # born as zeros: nothing would reach the output
        nn.init.normal_(layer.bias, std=0.1)
    return model.requires_grad_(False)


def condition(batch: int = 1, scale: float = 1.0) -> VaceCondition:
    return VaceCondition(
        context=torch.randn(batch, 7, TINY["text_dim"]), control=torch.randn(batch, CONTROL, 3, 4, 6),
        control_scale=torch.full((batch,), scale),
    )  # fmt: skip


def latents(batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 3, 4, 6)


def theirs(model: VaceWanModel) -> Any:
    """diffusers' transformer with the weights of `model`."""
    from diffusers import WanVACETransformer3DModel

    config = model.config
    other = WanVACETransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, vace_layers=list(model.vace_layers),
        vace_in_channels=model.vace_in_dim,
    ).eval()  # fmt: skip
    state = {DIFFUSERS_DIT.to_theirs(key): value for key, value in model.state_dict().items()}
    other.load_state_dict(state, strict=True)
    assert {DIFFUSERS_DIT.to_ours(key) for key in state} == set(model.state_dict())
    return other


# ---- keys ------------------------------------------------------------------------------------------------------------

SIZES = {
    "vace-1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "vace-14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}
PUBLISHED_LAYERS = {"vace-1.3B": tuple(range(0, 30, 2)), "vace-14B": tuple(range(0, 40, 5))}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_published_sizes_have_exactly_the_published_keys_and_shapes(name: str) -> None:
    model = build_dit(SIZES[name] | {"vace_layers": PUBLISHED_LAYERS[name], "vace_in_dim": 96})
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(model.state_dict().items()))
    assert len(model.state_dict()) == KEYS[name]["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == KEYS[name]["sha256"]


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_file_without_a_config_makes_the_published_model(name: str) -> None:
    model = build_dit(SIZES[name] | {"vace_layers": PUBLISHED_LAYERS[name], "vace_in_dim": 96})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    built = build_dit({}, shapes)
    assert isinstance(built, VaceWanModel)
    assert built.vace_layers == PUBLISHED_LAYERS[name] and built.vace_in_dim == 96
    assert built.num_heads == SIZES[name]["num_heads"]


def test_a_config_that_contradicts_the_weights_is_refused() -> None:
    shapes = {key: tuple(value.shape) for key, value in tiny().state_dict().items()}
    assert build_dit({"vace_layers": [0, 1, 3], "num_heads": 3}, shapes).config.vace_layers == [0, 1, 3]
    with pytest.raises(BadCheckpoint, match=r"vace_layers = \[0, 2\] but the weights have 3"):
        build_dit({"vace_layers": [0, 2]}, shapes)
    with pytest.raises(BadCheckpoint, match="vace_in_dim = 96 but the weights have 10"):
        build_dit({"vace_in_dim": 96}, shapes)
    for layers in ((1, 2), (0, 4), (0, 2, 1), ()):
        with pytest.raises(BadCheckpoint, match=r"they must rise from 0 and stay below the 4"):
            VaceWanModel(vace_layers=layers, **TINY)


def test_every_second_layer_is_the_default() -> None:
    with torch.device("meta"):
        model = VaceWanModel(**TINY)
    assert model.vace_layers == (0, 2) and model.vace_in_dim == 16


def test_a_saved_model_comes_back_with_all_its_fields(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "VaceWanModel"
    for cls in (WanModel, VaceWanModel):
        again = cls.from_pretrained(tmp_path)
        assert isinstance(again, VaceWanModel) and again.config == model.config
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


# ---- numbers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_equals_diffusers(scale: float) -> None:
    model, x, cond, t = tiny(), latents(2), condition(2, scale), torch.tensor([987.0, 412.0])
    other = theirs(model)
    text = torch.cat((cond.context, torch.zeros(2, 5, TINY["text_dim"])), 1)
    scales = torch.full((len(LAYERS),), scale)
    expected = other(x, t, text, control_hidden_states=cond.control, control_hidden_states_scale=scales)[0]
    assert relative_error(model.velocity(x, t, cond), expected) < FLOAT32


@torch.inference_mode()
def test_upstreams_list_call_equals_velocity_sample_by_sample() -> None:
    model, cond, t = tiny(), condition(2, 0.7), torch.tensor([900.0, 300.0])
    x, other = latents(2), torch.randn(16, 1, 2, 4)
    control = [*cond.control, torch.randn(CONTROL, 1, 2, 4)]
    texts = [*cond.context, torch.randn(3, TINY["text_dim"])]
    out = model([*x, other], torch.tensor([900.0, 300.0, 5.0]), control, texts, 32, vace_context_scale=0.7)
    expected = model.velocity(x, t, cond)
    assert relative_error(torch.stack(out[:2]), expected) < FLOAT32
    assert out[2].shape == other.shape
    with pytest.raises(BadRequest, match="leave clip_fea and y out"):
        model([other], t[:1], control[2:], texts[2:], 32, clip_fea=torch.zeros(1))


@torch.inference_mode()
def test_scale_0_is_the_plain_model_and_the_scale_is_linear_in_the_hint() -> None:
    model, x, t = tiny(vace_layers=(0,), num_layers=1), latents(), torch.tensor([500.0])
    cond = condition()
    plain = WanModel(**(TINY | {"num_layers": 1})).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("vace_")})
    zero = dataclasses.replace(cond, control_scale=torch.zeros(1), memo={})
    assert torch.equal(model.velocity(x, t, zero), plain.velocity(x, t, Condition(context=cond.context)))
    assert relative_error(model.velocity(x, t, cond), model.velocity(x, t, zero)) > 1e-3


@torch.inference_mode()
def test_branches_of_different_scale_can_be_stacked() -> None:
    model, x, t = tiny(), latents(), torch.tensor([500.0])
    one, other = condition(), condition(1, 0.2)
    stacked = model.velocity(x.expand(2, -1, -1, -1, -1), t.expand(2), VaceCondition.cat([one, other]))
    assert relative_error(stacked[:1], model.velocity(x, t, one)) < FLOAT32
    assert relative_error(stacked[1:], model.velocity(x, t, other)) < FLOAT32


def test_a_control_of_another_size_is_refused() -> None:
    model, x = tiny(), latents()
    cond = dataclasses.replace(condition(), control=torch.zeros(1, CONTROL, 3, 6, 4))
    with pytest.raises(BadRequest, match=r"\(3, 3, 2\) tokens .* latents \(3, 2, 3\): they must be of one size"):
        model.velocity(x, torch.tensor([500.0]), cond)


# ---- cost ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_blocks_run_in_turn_and_one_hint_lives_at_a_time() -> None:
    model, x, cond = tiny(), latents(), condition()
    main, side = model.blocks, model.vace_blocks
    order = [main[0], side[0], main[1], side[1], main[2], main[3], side[2]]
    assert model.all_blocks() == order
    ran: list[nn.Module] = []
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(hint() is not None for hint in alive))
        ran.append(block)
        out = block(tokens, inputs)
        if isinstance(out, tuple):
            alive.append(weakref.ref(out[1]))
        return out

    gc.collect()
    model.run_block = watch
    model.velocity(x, torch.tensor([500.0]), cond)
    assert ran == order and len(alive) == 3
    assert most == 0, "a hint outlived the block it was added after"


@pytest.mark.slow
@torch.inference_mode()
def test_blocks_compile_whole_and_agree() -> None:
    model, x, cond, t = tiny(), latents(), condition(), torch.tensor([500.0])
    plain = model.velocity(x, t, cond)
    for block in model.all_blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(model.velocity(x, t, cond), plain) < FLOAT32
