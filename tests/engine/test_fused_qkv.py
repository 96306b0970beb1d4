"""Queries, keys and values by one product: the same video, the same weights once, whoever else changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan
from wan.engine.ops import linear as ops
from wan.engine.ops.linear import Joined, project
from wan.engine.placement import DeviceMover, tensors_of

SIZE: dict[str, Any] = {"size": (32, 32), "frame_num": 1, "sampling_steps": 2, "seed": 1, "guide_scale": 4.0}


def three(**kind: Any) -> list[nn.Linear]:
    return [nn.Linear(48, width, **kind).requires_grad_(False) for width in (48, 48, 96)]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of each product that is made through the seam for linear layers."""
    found: list[int] = []

    def kernel(x: Tensor, layer: nn.Module) -> Tensor:
        if isinstance(layer, nn.Linear):
            found.append(layer.out_features)
        made: Tensor = layer(x)
        return made

    monkeypatch.setattr(ops.linear, "kernel", kernel)
    return found


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "tolerance"), [({}, 1e-6), ({"dtype": torch.bfloat16}, 4e-3)], ids=["fp32", "bf16"])
def test_one_product_gives_what_three_give(kind: dict[str, Any], tolerance: float, products: list[int]) -> None:
    with torch.inference_mode(False):
        layers = three(**kind)
    before = {place: tensor.clone() for place, tensor in enumerate(tensors_of(nn.ModuleList(layers)))}
    x = torch.randn(2, 7, 48, **kind)
    expected, joined = project(x, *layers), Joined(layers)
    products.clear()
    for made, wanted in zip(joined(x, *layers), expected, strict=True):
        assert made.shape == wanted.shape
        assert (made - wanted).norm() <= tolerance * wanted.norm()
    assert products == [192]
    assert all(torch.equal(tensor, before[place]) for place, tensor in enumerate(tensors_of(nn.ModuleList(layers))))


@torch.inference_mode()
def test_the_weights_are_there_once_and_joining_again_copies_nothing() -> None:
    with torch.inference_mode(False):
        layers = three()
    Joined(layers)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1 and layers[0].weight.untyped_storage().nbytes() == 192 * 48 * 4
    Joined(layers)
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == storages


@torch.inference_mode()
def test_where_other_weights_or_layers_are_they_are_what_counts(products: list[int]) -> None:
    with torch.inference_mode(False):
        layers = three()
    joined, x = Joined(layers), torch.randn(1, 5, 48)
    kept, layers[1].weight.data = layers[1].weight.data, torch.zeros(48, 48)
    assert torch.equal(joined(x, *layers)[1], layers[1].bias.expand(1, 5, 48))
    layers[1].weight.data = kept
    products.clear()
    joined(x, *layers)
    joined(x, *layers[1:])
    assert products == [192, 48, 96]
    assert not Joined.can_join([*layers[:2], nn.Sequential(layers[2])])
    assert not Joined.can_join([*layers[:2], three(dtype=torch.bfloat16)[2]])
    mover = DeviceMover(lambda home, device: home.clone())
    mover.to_device("dit", [layer.weight for layer in layers], torch.device("meta"))  # each to a place of its own
    products.clear()
    joined(x, *layers)
    Joined(layers)(x, *layers)
    assert products == [48, 48, 96, 192]


def test_a_run_joins_all_self_attentions_and_a_lora_beside_gives_way(
    tiny_checkpoint: Path, tiny_config: Any, products: list[int]
) -> None:
    made = {}
    lora = str(Path(__file__).parents[1] / "data" / "lora-tiny.safetensors")
    for options in ({}, {"lora": lora, "lora_mode": "onthefly"}):
        for fused in (False, True):
            pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", fuse_qkv=fused, **options)
            network = pipe.low_noise_model
            state = {key: value.clone() for key, value in network.state_dict().items()}
            products.clear()
            made[fused] = pipe.generate("a red bird", **SIZE)
            together = products.count(3 * network.dim)
            assert together == (2 * 2 * len(network.blocks) if fused and not options else 0)
            after = {key.replace("base.", ""): value for key, value in network.state_dict().items()}  # behind a LoRA
            assert all(torch.equal(value, state[key]) for key, value in after.items())
            assert {layer.project for layer in network.modules() if hasattr(layer, "project")} == {project}
        assert (made[True] - made[False]).norm() <= 1e-5 * made[False].norm()
