"""The DiT: upstream's keys and numbers, with every form of timestep and of call."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Condition
from wan.modules.building import build_dit
from wan.modules.model import WanModel

KEYS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "dit_keys.json").read_text())
TINY = {"dim": 96, "ffn_dim": 160, "num_heads": 3, "num_layers": 3, "text_dim": 48, "freq_dim": 64, "text_len": 12}

# float32 against float32: only the order of sums differs.
FLOAT32 = 1e-5
# What the recorded values allow.
GOLDEN = 2e-5


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def tiny(**changes: Any) -> WanModel:
    model = WanModel(**(TINY | changes)).eval()
    nn.init.normal_(model.head.head.weight, std=0.1)  # born as zeros: nothing would reach the output
    return model.requires_grad_(False)


def condition(batch: int = 1) -> Condition:
    return Condition(context=torch.randn(batch, 7, TINY["text_dim"]))


def latents(batch: int = 1, channels: int = 16) -> Tensor:
    return torch.randn(batch, channels, 3, 4, 6)


# ---- keys ------------------------------------------------------------------------------------------------------------

SIZES = {
    "t2v-1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "t2v-14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "t2v-A14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "i2v-14B": {"model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "flf2v-14B": {
        "model_type": "flf2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40,
    },
    "i2v-A14B": {
        "model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40,
        "image_dim": 0,
    },
    "ti2v-5B": {
        "model_type": "ti2v", "in_dim": 48, "out_dim": 48, "dim": 3072, "ffn_dim": 14336, "num_heads": 24,
        "num_layers": 30,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SIZES))
def test_published_sizes_have_exactly_the_published_keys_and_shapes(name: str) -> None:
    state = build_dit(SIZES[name]).state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    assert len(state) == KEYS[name]["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == KEYS[name]["sha256"]


def test_sizes_come_from_the_weights_where_the_config_is_silent() -> None:
    model = tiny(in_dim=20, out_dim=8)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    built = build_dit({"num_heads": 3, "text_len": 12}, shapes)
    assert dict(built.config) == dict(model.config)
    assert all(value.is_meta for value in built.state_dict().values())
    with pytest.raises(BadCheckpoint, match="num_layers = 7 but the weights have 3"):
        build_dit({"num_layers": 7}, shapes)


def test_what_stays_float32_is_norms_modulation_time_and_head() -> None:
    kept = {re.sub(r"\d+", "n", key) for key in tiny().state_dict() if WanModel.float32_keys(key)}
    block = "blocks.n."
    norms = {f"{block}{part}.norm_{x}.weight" for part in ("self_attn", "cross_attn") for x in "qk"}
    layers = {"time_embedding.n", "time_projection.n", "head.head", f"{block}norm3".replace("norm3", "normn")}
    assert kept == norms | {f"{x}.{y}" for x in layers for y in ("weight", "bias")} | {
        f"{block}modulation",
        "head.modulation",
    }


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_equals_upstream_2_1_with_two_sizes_in_one_padded_call(golden: Path) -> None:
    model, g = WanModel.from_pretrained(golden / "t2v-1.3B"), load_file(golden / "dit_t2v_2.1.safetensors")
    texts = [g["context.0"], g["context.1"]]
    with torch.inference_mode():
        out = model([g["x.0"], g["x.1"]], t=g["t"], context=texts, seq_len=64)
    assert relative_error(out[0], g["out.0"]) < GOLDEN
    assert relative_error(out[1], g["out.1"]) < GOLDEN


def test_equals_upstream_2_2_with_timesteps_per_token(golden: Path) -> None:
    model = WanModel.from_pretrained(golden / "t2v-A14B", subfolder="high_noise_model")
    g = load_file(golden / "dit_t2v_2.2.safetensors")
    with torch.inference_mode():
        one = model([g["x.0"]], t=g["t_one"], context=[g["context.0"]], seq_len=64)
        per_token = g["t_two"][:, None].expand(2, 64)
        two = model([g["x.0"], g["x.1"]], t=per_token, context=[g["context.0"], g["context.1"]], seq_len=64)
    assert relative_error(one[0], g["out.one.0"]) < GOLDEN
    assert relative_error(two[0], g["out.two.0"]) < GOLDEN
    assert relative_error(two[1], g["out.two.1"]) < GOLDEN


TO_OURS = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),
)


def theirs(model: WanModel) -> Any:
    """diffusers' transformer with the weights of `model`, mapped one to one."""
    from diffusers import WanTransformer3DModel

    config = model.config
    other = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    ).eval()  # fmt: skip
    state, mapped = model.state_dict(), {}
    for key in other.state_dict():
        ours = key
        for pattern, replacement in TO_OURS:
            ours = re.sub(pattern, replacement, ours)
        mapped[key] = state.pop(ours)
    assert not state, "a key of ours has no counterpart"
    other.load_state_dict(mapped, strict=True)
    return other


@pytest.mark.parametrize("head_dim", [32, 128])
def test_equals_diffusers(head_dim: int) -> None:
    model = tiny(dim=2 * head_dim, num_heads=2)
    x, text = latents(2), torch.randn(2, 12, TINY["text_dim"])
    t = torch.tensor([987.0, 412.0])
    with torch.inference_mode():
        expected = theirs(model)(x, t, text, return_dict=False)[0]
        assert relative_error(model.velocity(x, t, Condition(context=text)), expected) < FLOAT32


def test_equals_diffusers_with_image_channels() -> None:
    model = tiny(in_dim=36)
    x, channels, text = latents(), latents(channels=20), torch.randn(1, 12, TINY["text_dim"])
    t = torch.tensor([650.0])
    with torch.inference_mode():
        expected = theirs(model)(torch.cat((x, channels), 1), t, text, return_dict=False)[0]
        assert relative_error(model.velocity(x, t, Condition(context=text, channels=channels)), expected) < FLOAT32


def test_equals_diffusers_with_a_timestep_per_frame() -> None:
    model = tiny(in_dim=24, out_dim=24)
    x, text = latents(2, 24), torch.randn(2, 12, TINY["text_dim"])
    frame_t = torch.tensor([[0.0, 700.0, 700.0], [0.0, 300.0, 450.0]])
    with torch.inference_mode():
        expected = theirs(model)(x, frame_t.repeat_interleave(6, 1), text, return_dict=False)[0]
        value = model.velocity(x, frame_t, Condition(context=text))
        assert relative_error(value, expected) < FLOAT32
        per_token = model.velocity(x, frame_t.repeat_interleave(6, 1), Condition(context=text))
    assert relative_error(per_token, expected) < FLOAT32


@torch.inference_mode()
def test_one_timestep_equals_the_same_timestep_on_every_frame() -> None:
    model, x, cond = tiny(), latents(), condition()
    one = model.velocity(x, torch.tensor([500.0]), cond)
    assert relative_error(model.velocity(x, torch.full((1, 3), 500.0), cond), one) < FLOAT32


@torch.inference_mode()
def test_a_batch_equals_its_samples_one_by_one() -> None:
    model, x, cond, t = tiny(), latents(3), condition(3), torch.tensor([900.0, 500.0, 20.0])
    batch = model.velocity(x, t, cond)
    for i in range(3):
        one = model.velocity(x[i : i + 1], t[i : i + 1], Condition(context=cond.context[i : i + 1]))
        assert relative_error(batch[i : i + 1], one) < FLOAT32


@torch.inference_mode()
def test_bfloat16_stays_near_float32() -> None:
    model, x, t = tiny(), latents(), torch.tensor([500.0])
    text = torch.randn(1, 12, TINY["text_dim"])
    exact = model.velocity(x, t, Condition(context=text))
    for keep_float32 in (True, False):
        low = tiny()
        low.load_state_dict(model.state_dict())
        for key, parameter in low.named_parameters():
            if not (keep_float32 and WanModel.float32_keys(key)):
                parameter.data = parameter.data.bfloat16()
        value = low.velocity(x, t, Condition(context=text))
        assert value.dtype == torch.float32
        # bfloat16 has 8 bits: 2^-9 a rounding, some ten roundings on the way of a value.
        assert relative_error(value, exact) < 2e-2


def test_gradients_are_finite_and_reach_every_parameter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype).requires_grad_(True).train()
        model.velocity(latents(2), torch.tensor([[0.0, 500.0, 900.0]] * 2), condition(2)).square().mean().backward()
        missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing


def test_inference_equals_training_mode() -> None:
    model, x, cond, t = tiny().requires_grad_(True), latents(), condition(), torch.tensor([500.0])
    trained = model.velocity(x, t, dataclasses.replace(cond, memo={})).detach()
    with torch.inference_mode():
        assert relative_error(model.velocity(x, t, cond), trained) < FLOAT32


def test_a_new_model_predicts_zero_as_upstream_initialises_it() -> None:
    with torch.no_grad():
        assert not WanModel(**TINY).velocity(latents(), torch.tensor([1.0]), condition()).any()


# ---- upstream's call -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_forward_takes_the_condition_latents_of_both_versions() -> None:
    model, x, y = tiny(in_dim=36), latents()[0], latents(channels=20)[0]
    call = {"t": torch.tensor([500]), "context": [torch.randn(5, TINY["text_dim"])], "seq_len": 18}
    fifth_of_2_2 = model([x], call["t"], call["context"], 18, [y])[0]
    assert torch.equal(model([x], **call, y=[y])[0], fifth_of_2_2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_len": 17}, "18 tokens; seq_len is 17"),
        ({"context": [torch.zeros(13, 48)]}, "13 tokens.*at most 12"),
        ({"x": [torch.zeros(15, 3, 4, 6)]}, "15 channels; this model takes 16"),
        ({"x": [torch.zeros(16, 3, 5, 6)]}, "cannot be cut into patches"),
        ({"t": torch.zeros(3)}, r"t of shape \(3,\)"),
        ({"clip_fea": torch.zeros(1, 257, 1280)}, "no image branch"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    call = {"x": [latents()[0]], "t": torch.tensor([500]), "context": [torch.randn(5, 48)], "seq_len": 18}
    with pytest.raises(BadRequest, match=words):
        tiny()(**(call | changes))


def test_a_saved_model_is_read_back_exactly(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "expert")
    loaded = WanModel.from_pretrained(tmp_path, subfolder="expert")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert dict(loaded.config) == dict(model.config)
    half = WanModel.from_pretrained(tmp_path / "expert", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_importing_the_modules_loads_nothing_heavy(root: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, wan.modules; from wan.modules import WanModel, flash_attention; "
        "heavy = {'transformers', 'diffusers', 'flash_attn'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
