"""The transformer that looks at images: the numbers of an independent implementation, upstream's call and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.types import Condition, Step
from wan.engine.weights.keymap import DIFFUSERS_DIT
from wan.layouts.library import transformer_config
from wan.modules.building import build_dit
from wan.modules.image_embedding import ImageCondition
from wan.modules.model import WanModel

SIZES = {"dim": 96, "ffn_dim": 160, "num_heads": 3, "num_layers": 2, "text_dim": 48, "freq_dim": 64, "in_dim": 36}
TOKENS = {"i2v": 5, "flf2v": 10}
FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs


def tiny(kind: str, **changes: Any) -> WanModel:
    sizes: dict[str, Any] = {"image_dim": 40, "image_positions": 10 if kind == "flf2v" else 0, **SIZES, **changes}
    model = WanModel(model_type=kind, **sizes).eval()
    for parameter in model.parameters():  # zeros and ones would hide a key in the wrong place
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def inputs(kind: str, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents with mask and image, text, hidden states of CLIP."""
    return torch.randn(batch, 36, 3, 4, 6), torch.randn(batch, 512, 48), torch.randn(batch, TOKENS[kind], 40)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_equals_diffusers(kind: str) -> None:
    from diffusers import WanTransformer3DModel

    model = tiny(kind)
    other = WanTransformer3DModel(**transformer_config(model.config)).eval()
    renamed = {DIFFUSERS_DIT.to_theirs(key): value for key, value in model.state_dict().items()}
    assert {DIFFUSERS_DIT.to_ours(key) for key in renamed} == model.state_dict().keys()
    other.load_state_dict(renamed, strict=True)
    latents, text, image = inputs(kind, batch=2)
    timestep = torch.tensor([700.0, 12.0])
    # diffusers takes several images of a sample one after the other in the batch.
    pictures = image.reshape(-1, 5, 40)
    with torch.no_grad():
        expected = other(latents, timestep, text, pictures, return_dict=False)[0]
    condition = ImageCondition(context=text, channels=latents[:, 16:], image=image)
    made = model.velocity(latents[:, :16], timestep, condition)
    assert relative_error(made, expected) < FLOAT32
    without = ImageCondition(context=text, channels=latents[:, 16:], image=torch.zeros_like(image))
    assert relative_error(model.velocity(latents[:, :16], timestep, without), expected) > 0.01


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_upstreams_call_equals_the_engines(kind: str) -> None:
    model = tiny(kind)
    latents, text, image = inputs(kind, batch=2)
    condition = ImageCondition(context=text, image=image)
    expected = model.velocity(latents, torch.tensor([500.0, 500.0]), condition)
    noise, channels = list(latents[:, :16]), list(latents[:, 16:])
    # flf2v: the two images of each sample stand one after the other, as [2B, I, D].
    made = model(noise, torch.tensor([500.0]), list(text), 18, clip_fea=image.reshape(-1, 5, 40), y=channels)
    assert torch.equal(torch.stack(made), expected)


def test_image_tokens_are_embedded_once_a_run_and_kept_apart_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("i2v")
    calls: list[int] = []
    model.img_emb.register_forward_hook(lambda *_: calls.append(1))
    latents, text, image = inputs("i2v")
    condition = ImageCondition(context=text, image=image)
    for index in range(3):
        model.velocity(latents, torch.tensor([500.0]), condition, Step(index, 3, 500.0, 0.5, 0.4))
    assert len(calls) == 1
    model.velocity(latents, torch.tensor([500.0]), condition, Step(0, 3, 500.0, 0.5, 0.4, expert="low"))
    assert len(calls) == 2


def test_several_requests_in_one_batch_equal_each_alone() -> None:
    model = tiny("i2v")
    latents, text, image = inputs("i2v", batch=2)
    each = [ImageCondition(context=text[i : i + 1], image=image[i : i + 1]) for i in range(2)]
    alone = [model.velocity(latents[i : i + 1], torch.tensor([300.0]), each[i]) for i in range(2)]
    both = model.velocity(latents, torch.tensor([300.0, 300.0]), ImageCondition.cat(each))
    assert relative_error(both, torch.cat(alone)) < FLOAT32


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_weights_alone_tell_whether_there_is_an_image_branch(kind: str) -> None:
    model = tiny(kind)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    config = {"model_type": kind, "num_heads": 3}
    assert build_dit(config, shapes).state_dict().keys() == model.state_dict().keys()
    plain = tiny("i2v", image_dim=0)
    assert not any("img" in key for key in plain.state_dict())
    shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    assert build_dit({"model_type": "i2v", "num_heads": 3}, shapes).state_dict().keys() == plain.state_dict().keys()


def test_saved_model_comes_back(tmp_path: Any) -> None:
    model = tiny("flf2v")
    model.save_pretrained(tmp_path)
    again = WanModel.from_pretrained(tmp_path)
    assert dict(again.config) == dict(model.config)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_half_precision_keeps_norms_in_float32() -> None:
    kept = {key for key in tiny("flf2v").state_dict() if WanModel.float32_keys(key) and "img" in key}
    assert {key for key in kept if key.startswith("img_emb")} == {
        "img_emb.emb_pos", "img_emb.proj.0.weight", "img_emb.proj.0.bias", "img_emb.proj.4.weight",
        "img_emb.proj.4.bias",
    }  # fmt: skip
    assert "blocks.1.cross_attn.norm_k_img.weight" in kept and "blocks.1.cross_attn.k_img.weight" not in kept
    model = tiny("flf2v")
    latents, text, image = inputs("flf2v")
    condition = ImageCondition(context=text, image=image)
    exact = model.velocity(latents, torch.tensor([500.0]), condition)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data if WanModel.float32_keys(key) else parameter.data.bfloat16()
    made = model.velocity(latents, torch.tensor([500.0]), ImageCondition(context=text, image=image.half()))
    assert made.dtype == torch.float32 and relative_error(made, exact) < 0.05


def test_missing_image_and_wrong_count_are_refused() -> None:
    model = tiny("flf2v")
    latents, text, image = inputs("flf2v")
    time = torch.tensor([500.0])
    with pytest.raises(BadRequest, match=r"looks at an image through CLIP; pass its hidden states \(clip_fea\)"):
        model.velocity(latents, time, Condition(context=text))
    with pytest.raises(BadRequest, match=r"looks at an image"):
        model(list(latents), time, list(text), 18)
    with pytest.raises(BadRequest, match=r"5 image tokens; this model takes 10: two images"):
        model.velocity(latents, time, ImageCondition(context=text, image=image[:, :5]))


@pytest.mark.parametrize("chosen", ["flash2", "sage"])
def test_attention_backend_replaces_all_attention_but_in_8_bits_only_that_of_tokens_among_themselves(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    from types import SimpleNamespace

    from wan.engine.ops import attention as backends
    from wan.engine.optimizations.attention import Attention

    def other(q: Tensor, k: Tensor, v: Tensor, layout: Any = None) -> Tensor:
        return q

    exact = {"auto": ("cudnn", lambda q, *_: q, "fastest")}
    monkeypatch.setattr(backends, "choose", lambda name, *_: exact.get(name, (chosen, other, "as asked")))
    model = tiny("i2v")
    engine: Any = SimpleNamespace(expert_names=("dit",), kernels={}, hardware=None)
    Attention(attention=chosen).finish(model, "dit", engine)  # type: ignore[arg-type]
    block = model.blocks[0]
    cross = other if chosen == "flash2" else exact["auto"][1]
    assert block.self_attn.attend is other and engine.kernels == {"dit": chosen}
    assert block.cross_attn.attend is block.cross_attn.attend_image is cross
