"""Files in every public 8-bit dialect read as the numbers they stand for, and are held so; faults are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wan
from wan.engine.errors import BadCheckpoint, BadRequest, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.live_bytes import LiveBytes
from wan.engine.ops.float8 import E4M3, Float8Linear
from wan.engine.optimizations import FP8, LoRA
from wan.engine.weights.dialects import DIT, open_network
from wan.engine.weights.quantised import QuantisedFile
from wan.engine.weights.quantising import SPELLINGS, QuantisingFile
from wan.engine.weights.stream import load_into
from wan.modules.model import WanModel

LAYER, PLAIN = "blocks.0.self_attn.q", "blocks.0.self_attn.norm_q.weight"
CODES = (torch.arange(60).reshape(6, 10).float() - 30).to(E4M3)
ROWS = torch.linspace(0.1, 2, 6)[:, None]
NOTE = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
ONE = torch.tensor(0.25)
DIALECTS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "Kijai": ({"scaled_fp8": torch.zeros(2).to(E4M3), f"{LAYER}.scale_weight": ONE.bfloat16()[None]}, ONE),
    "ComfyUI": ({f"{LAYER}.weight_scale": ONE, f"{LAYER}.input_scale": ONE.clone(), f"{LAYER}.comfy_quant": NOTE}, ONE),
    "LightX2V": ({f"{LAYER}.weight_scale": ROWS}, ROWS),
    "rows without a second dim": ({f"{LAYER}.weight_scale": ROWS[:, 0].clone()}, ROWS),
    "cast": ({}, torch.tensor(1.0)),
    "a scale of 1 beside a plain weight": ({"blocks.0.ffn.2.scale_weight": torch.ones(1)}, torch.tensor(1.0)),
}


def saved(path: Path, more: dict[str, Tensor], prefix: str = "") -> Path:
    plain = {PLAIN: torch.ones(10), "blocks.0.ffn.2.weight": torch.ones(2, 3).bfloat16()}
    state = {f"{LAYER}.weight": CODES, **plain, **more}
    save_file({prefix + key: value for key, value in state.items()}, str(path))
    return path


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_reads_as_codes_times_scales_and_is_held_as_it_is(tmp_path: Path, name: str, prefix: str) -> None:
    more, scale = DIALECTS[name]
    weights = open_network(saved(tmp_path / "dit.safetensors", more, prefix), DIT)
    assert set(weights.shapes()) == {f"{LAYER}.weight", PLAIN, "blocks.0.ffn.2.weight"}
    read = dict(weights.stream())
    torch.testing.assert_close(read[f"{LAYER}.weight"] + 0, (CODES.double() * scale.double()).float())
    assert {key: value.dtype for key, value in read.items()} == weights.dtypes()
    with torch.device("meta"):
        block = Block(Float8Linear(nn.Linear(10, 6, bias=False)))
    load_into(
        block, [("layer.weight", read[f"{LAYER}.weight"])], dtype=lambda key: None,
        place=lambda key, tensor: torch.device("cpu"),
    )  # fmt: skip
    assert torch.equal(block.layer.weight.float(), CODES.float())
    assert torch.equal(block.layer.weight_scale, scale.expand(6, 1))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{LAYER}.weight_scale": torch.ones(5, 1)}, r"q\.weight_scale' is \[5, 1\], neither one number nor one for"),
        ({f"{LAYER}.weight_scale": torch.ones(6, 2)}, r"is \[6, 2\], neither"),
        ({f"{LAYER}.weight_scale": ONE, f"{LAYER}.scale_weight": ONE.clone()}, "second scale beside"),
        ({"blocks.9.ffn.0.scale_weight": ONE}, r"scale of 'blocks\.9\.ffn\.0\.weight', which the file lacks"),
        ({f"{LAYER}.scale_weight": torch.zeros(1)}, "zero, negative or not finite"),
        ({f"{LAYER}.scale_weight": torch.tensor(float("nan"))}, "zero, negative or not finite"),
        ({"blocks.0.ffn.2.scale_weight": ONE}, "is not 1, and its weight is torch.bfloat16"),
        ({f"{LAYER}.weight_scale_2": ONE}, "quantised float32 file"),
    ],
)
def test_scales_that_fit_no_weight_are_refused_by_name(tmp_path: Path, more: dict[str, Tensor], says: str) -> None:
    path = saved(tmp_path / "dit.safetensors", more)
    with pytest.raises(BadCheckpoint, match=says):
        list(open_network(path, DIT).stream())


@pytest.mark.parametrize(
    ("note", "says"),
    [
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, None),
        ({"format": "convrot_w4a4"}, "has format 'convrot_w4a4', of which this version reads"),
        (b"{", "has format None"),
        (b"[1]", "has format None"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "metadata"])
def test_a_note_of_another_format_is_refused_before_weights_are_read(
    tmp_path: Path, place: str, note: dict[str, Any] | bytes, says: str | None
) -> None:
    text = note if isinstance(note, bytes) else json.dumps(note).encode()
    more = {f"{LAYER}.weight_scale": ONE}
    path, metadata = tmp_path / "dit.safetensors", {}
    if place == "beside":
        more[f"{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    elif isinstance(note, dict):
        metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: note}})}
    else:
        metadata = {"_quantization_metadata": text.decode()}
    save_file({f"{LAYER}.weight": CODES, **more}, str(path), metadata=metadata)
    weights = open_network(path, DIT)
    assert isinstance(weights, QuantisedFile)
    if says is None:
        weights.check_scales()
        return
    with pytest.raises(BadCheckpoint, match=rf"dit\.safetensors'.*{says}.*pass the bf16 or fp16 file"):
        weights.check_scales()


def test_layers_of_the_blocks_are_held_in_8_bits_but_those_to_keep(tiny_checkpoint: Path, tiny_config: Any) -> None:
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", fp8="scaled", fp8_keep="blocks.0.*,*.ffn.2")
    plain = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu").low_noise_model.state_dict()
    network = pipe.low_noise_model
    held = {name for name, layer in network.named_modules() if isinstance(layer, Float8Linear)}
    attention = {f"blocks.1.{part}_attn.{each}" for part in ("self", "cross") for each in "qkvo"}
    assert held == attention | {"blocks.1.ffn.0"}
    assert {network.get_submodule(name).weight.dtype for name in held} == {E4M3}
    for key, value in network.state_dict().items():
        if key in plain and key.removesuffix(".weight") not in held:
            assert torch.equal(value, plain[key])


def test_no_weight_but_the_one_at_hand_stands_in_16_bits_while_loading(tmp_path: Path) -> None:
    """What is alive beside what stays while each weight is read and stored, counted operation by operation.

    bfloat16 is quantised weight by weight, with a LoRA merged too; what comes in 8 bits is held as it was read, and
    never made into floats.
    """

    def path(name: str) -> Path:
        return tmp_path / f"{name}.safetensors"

    def network() -> WanModel:
        return WanModel(dim=64, ffn_dim=96, freq_dim=32, text_dim=32, num_heads=2, num_layers=1).bfloat16()

    def extra(name: str, *loras: str) -> int:
        """The most bytes that one weight of the blocks took, read, made and stored."""
        with torch.device("meta"):
            module = network()
        FP8(fp8="weight").convert(module, "dit")
        dtypes = {key: value.dtype for key, value in module.state_dict().items()}
        taken: dict[str, int] = {}

        def each() -> Iterator[tuple[str, Tensor]]:
            before = live.peak = live.now
            for item in LoRA(lora=loras).transform(open_network(path(name), DIT).stream(), "dit"):
                key = item[0]
                yield item
                del item  # as the reader does: what is left is what stays
                taken[key] = live.peak - before
                before = live.peak = live.now

        with torch.no_grad(), LiveBytes() as live:
            load_into(module, each(), dtype=dtypes.get, place=lambda key, tensor: torch.device("cpu"))
            assert live.now == sum(value.nbytes for value in module.state_dict().values())
        return max(taken[f"{layer}.weight"] for layer in in_8_bits)

    plain = network()
    save_file(plain.state_dict(), path("plain"))
    save_file({"blocks.0.ffn.0.diff": torch.ones(96, 64)}, path("lora"))
    in_8_bits = [name for name, part in plain.named_modules() if type(part) is nn.Linear and "blocks" in name]
    for name, spelling in SPELLINGS.items():
        converted = QuantisingFile(open_network(path("plain"), DIT), in_8_bits, spelling).stream()
        save_file({key: value.clone() for key, value in converted}, path(name))
    largest = 96 * 64
    assert extra("plain") < 9 * largest  # 2 bytes of the file, 4 of float32, 1 of codes, and what is divided
    assert extra("plain", str(path("lora"))) < 15 * largest
    for name in SPELLINGS:
        assert extra(name) < 1.2 * largest, "codes and scales, and no more"


def test_what_cannot_be_is_said_before_a_weight_is_read(tiny_checkpoint: Path, tiny_config: Any) -> None:
    old = Hardware(device=torch.device("cuda"), name="RTX 3090", sm=(8, 6))
    with pytest.raises(UnsupportedHardware, match=r"--fp8 scaled needs sm_89 .* RTX 3090 .*Use --fp8 weight"):
        FP8(fp8="scaled").check(old)
    FP8(fp8="weight").check(old)
    with pytest.raises(BadRequest, match=r"--fp8_keep 'head\.\*' names no linear layer of the blocks"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", fp8="weight", fp8_keep="head.*")
