"""LoRA files of every dialect, merged to the numbers of W + strength * alpha / rank * up @ down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.hardware import Hardware
from wan.engine.optimizations import LoRA
from wan.engine.weights.lora import merged, open_lora

RANK = 3
LAYERS = ("blocks.0.self_attn.q", "blocks.11.cross_attn.k_img", "blocks.1.ffn.2")
CPU = Hardware(device=torch.device("cpu"), name="CPU")

# Dialect -> name of the down and of the up matrix of a layer.
DIALECTS = {
    "PEFT": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "PEFT, adapter named": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "PEFT, bare": ("{}.lora_A", "{}.lora_B"),
    "original names": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "of a pipeline": ("pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight"),
    "older": ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight"),
    "older still": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "kohya, two dashes": ("lora_unet__{}.lora_down.weight", "lora_unet__{}.lora_up.weight"),
}
DIFFUSERS = {"self_attn.q": "attn1.to_q", "cross_attn.k_img": "attn2.add_k_proj", "ffn.2": "ffn.net.2"}


def spelled(layer: str, dialect: str) -> str:
    if dialect == "diffusers":
        for ours, theirs in DIFFUSERS.items():
            layer = layer.replace(ours, theirs)
    return layer.replace(".", "_") if dialect.startswith("kohya") else layer


def pairs(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    return {layer: (torch.randn(RANK, 10).to(dtype), torch.randn(8, RANK).to(dtype)) for layer in LAYERS}


def write(path: Path, dialect: str, matrices: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> Path:
    state: dict[str, Tensor] = {}
    for layer, (down, up) in matrices.items():
        name = spelled(layer, dialect)
        first, second = (each.format(name) for each in DIALECTS[dialect])
        state |= {first: down, second: up}
        if alpha is not None:
            stem = first.partition(".lora")[0].removesuffix("_lora.down.weight")
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(state, str(path))
    return path


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(5)
    layers = {f"{layer}.weight": torch.randn(8, 10).to(dtype) for layer in LAYERS}
    return layers | {f"{LAYERS[0]}.bias": torch.randn(8).to(dtype), "head.head.weight": torch.randn(8, 10).to(dtype)}


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_merges_to_the_same_numbers(tmp_path: Path, dialect: str, alpha: float | None) -> None:
    matrices, base = pairs(), weights()
    lora = open_lora(write(tmp_path / "x.safetensors", dialect, matrices, alpha))
    assert set(lora.layers) == set(LAYERS)
    lora.check({key: tuple(value.shape) for key, value in base.items()})
    out = dict(merged(base.items(), [(lora, 0.5)]))
    for key, value in base.items():
        layer = key.removesuffix(".weight")
        if layer not in matrices:
            assert out[key] is value
            continue
        down, up = matrices[layer]
        expected = value + 0.5 * (1.0 if alpha is None else alpha / RANK) * up @ down
        torch.testing.assert_close(out[key], expected, rtol=1e-6, atol=1e-6)


def test_a_pickled_adapter_under_state_dict_is_read_like_the_relighting_lora(tmp_path: Path) -> None:
    matrices, base = pairs(torch.bfloat16), weights(torch.bfloat16)
    state = {}
    for layer, (down, up) in matrices.items():
        state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    torch.save({"state_dict": state}, tmp_path / "relighting_lora.ckpt")
    out = dict(merged(base.items(), [(open_lora(tmp_path / "relighting_lora.ckpt"), 1.0)]))
    down, up = matrices[LAYERS[1]]
    expected = base[f"{LAYERS[1]}.weight"].float() + up.float() @ down.float()
    merged_weight = out[f"{LAYERS[1]}.weight"]
    assert merged_weight.dtype is torch.float32  # rounded once, by who stores it
    torch.testing.assert_close(merged_weight, expected, rtol=1e-6, atol=1e-6)


def test_loras_add_up_and_one_weight_is_held_at_a_time(tmp_path: Path) -> None:
    base, first, second = weights(), pairs(), pairs()
    files = [write(tmp_path / f"{n}.safetensors", "PEFT", each) for n, each in enumerate((first, second))]
    asked: list[str] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for key, value in base.items():
            asked.append(key)
            yield key, value

    stream = merged(source(), [(open_lora(files[0]), 1.0), (open_lora(files[1]), -2.0)])
    key, value = next(stream)
    assert asked == [key]
    layer = key.removesuffix(".weight")
    expected = base[key] + first[layer][1] @ first[layer][0] - 2 * second[layer][1] @ second[layer][0]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_of_more_dims_takes_the_delta_in_its_shape(tmp_path: Path) -> None:
    down, up = torch.randn(RANK, 2, 1, 2, 2), torch.randn(8, RANK, 1, 1, 1)
    save_file({"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}, str(tmp_path / "p.sft"))
    lora, weight = open_lora(tmp_path / "p.sft"), torch.randn(8, 2, 1, 2, 2)
    lora.check({"patch_embedding.weight": (8, 2, 1, 2, 2)})
    [(_, out)] = merged([("patch_embedding.weight", weight)], [(lora, 1.0)])
    expected = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4)}, "no 'up' matrix for 'blocks.0.ffn.0'"),
        ({"blocks.0.ffn.0.hada_w1_a": torch.zeros(2, 4)}, "'blocks.0.ffn.0.hada_w1_a', which this version cannot"),
        ({"blocks.0.ffn.0.diff": torch.zeros(2, 4)}, "cannot merge"),
        ({"blocks.0.ffn.0.weight": torch.zeros(2, 4)}, "cannot merge"),
        ({}, "is empty"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(tmp_path: Path, state: dict[str, Tensor], said: str) -> None:
    save_file(state, str(tmp_path / "x.safetensors"))
    with pytest.raises(BadCheckpoint, match=said) as caught:
        open_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_a_lora_of_another_model_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    lora = open_lora(write(tmp_path / "x.safetensors", "PEFT", pairs()))
    shapes = {key: tuple(value.shape) for key, value in weights().items()}
    with pytest.raises(BadCheckpoint, match=r"8, 3\] x \[3, 10\] for 'blocks.1.ffn.2', whose weight is \[8, 12\]"):
        lora.check(shapes | {"blocks.1.ffn.2.weight": (8, 12)})
    del shapes["blocks.1.ffn.2.weight"]
    with pytest.raises(BadCheckpoint, match=r"changes 'blocks.1.ffn.2', which this transformer lacks"):
        lora.check(shapes)
    with pytest.raises(BadCheckpoint, match="which this transformer lacks"):
        list(merged([], [(lora, 1.0)]))


def test_the_flag_takes_files_and_strengths(tmp_path: Path) -> None:
    path = write(tmp_path / "a@0.5.safetensors", "PEFT", pairs())
    for text, strength in ((f"{path}", 1.0), (f"{path}@0.25, ", 0.25), (f"{path}@-1", -1.0)):
        [(key, out)] = LoRA(lora=text).transform([(f"{LAYERS[0]}.weight", torch.zeros(8, 10))], "vae")
        assert not out.any(), "only transformers are changed"
        [(_, found)] = LoRA(lora=text)._files()
        assert found == strength and key
    with pytest.raises(BadRequest, match="'strong' is no number"):
        LoRA(lora=f"{path}@strong").check(CPU)
    with pytest.raises(BadCheckpoint, match=r"LoRA '.*none' does not exist"):
        LoRA(lora=str(tmp_path / "none")).check(CPU)


def test_the_pipeline_merges_into_every_expert_and_refuses_what_does_not_fit(
    tiny_checkpoint: Path, tiny_config: object, root: Path, tmp_path: Path
) -> None:
    path = root / "tests" / "data" / "lora-tiny.safetensors"
    plain = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")
    changed = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=f"{path}@2")
    lora = open_lora(path)
    for name in ("high_noise_model", "low_noise_model"):
        before, after = (getattr(pipe, name).state_dict() for pipe in (plain, changed))
        assert before.keys() == after.keys()
        for key, value in before.items():
            layer = key.removesuffix(".weight")
            delta = 2 * lora.delta(layer) if layer in lora.layers else torch.zeros(())
            torch.testing.assert_close(after[key], value + delta, rtol=1e-6, atol=1e-7)
    other = write(tmp_path / "other.safetensors", "PEFT", pairs())
    with pytest.raises(BadCheckpoint, match="whose weight is|which this transformer lacks"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=str(other))
