"""What LoRAs are said to take before a weight is read is what they take, byte for byte, and the planner counts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.components import dummy_components
from wan.configs import WAN_CONFIGS
from wan.engine.adapting import Adapted, LowRank
from wan.engine.beside import beside_of
from wan.engine.optimizations import FP8
from wan.engine.prediction import Beside, Video, predict
from wan.engine.roofline import CARDS
from wan.engine.weights.lora import open_lora
from wan.modules.model import WanModel
from wan.sizes import models_of

D, F, RANKS = 48, 64, (3, 5)


def write(path: Path, rank: int) -> Path:
    """Pairs for two layers of each block, a whole difference in each, and one outside them."""
    state: dict[str, Tensor] = {"head.head.diff": torch.randn(64, D), "text_embedding.0.diff_b": torch.randn(D)}
    for block in ("blocks.0", "blocks.1"):
        for layer, (rows, columns) in {"self_attn.q": (D, D), "ffn.2": (D, F)}.items():
            state[f"{block}.{layer}.lora_down.weight"] = torch.randn(rank, columns)
            state[f"{block}.{layer}.lora_up.weight"] = torch.randn(rows, rank)
        state[f"{block}.norm3.diff"] = torch.randn(D)
    save_file(state, str(path))
    return path


def network(fp8: Literal["off", "weight"]) -> WanModel:
    made = WanModel(dim=D, ffn_dim=F, freq_dim=32, text_dim=32, num_heads=2, num_layers=2).eval()
    if fp8 != "off":
        FP8(fp8=fp8).convert(made, "dit")
    return made


@pytest.mark.parametrize(("dense", "fp8"), [(False, "off"), (True, "off"), (True, "weight")])
def test_it_is_what_stays_after_a_call_and_what_a_call_needs(
    tmp_path: Path, dense: bool, fp8: Literal["off", "weight"]
) -> None:
    files = [open_lora(write(tmp_path / f"{rank}.safetensors", rank)) for rank in RANKS]
    with torch.device("meta"):
        said = beside_of(network(fp8), files, dense=dense)
    made = network(fp8)
    calls: list[int] = []
    own = {key: value.data_ptr() for key, value in made.state_dict().items()}

    def run_block(block: nn.Module, inputs: None) -> None:
        calls.append(changed(made, own))

    made.run_block = run_block  # type: ignore[assignment]
    adapted = Adapted(made, torch.device("cpu"), dense=dense)
    adapted.load(files)
    with adapted.at((0.5, -1.0)):
        outside = changed(made, own)
        for block in made.blocks:
            made.run_block(block, None)  # type: ignore[call-arg,arg-type]
    thin = [layer.thin for layer in made.modules() if isinstance(layer, LowRank)]
    beside = sum(each.down.nbytes + each.up.nbytes for each in thin if each.down is not None and each.up is not None)
    assert said.outside == outside == 4 * (64 * D + D)
    numbers = sum(RANKS) * (2 * D + D + F)
    if dense:
        assert said.in_block == beside == said.elements == 0
        making = 4 * F * D  # the larger of the two weights, summed in float32 before it takes its place
        weights = (D * D + F * D) * (4 if fp8 == "off" else 1) + 4 * (D if fp8 == "off" else D + D + D)
        assert said.for_call == max(calls) - outside + making == weights + making
    else:
        assert said.in_block == beside // 2 + 4 * D and beside == 4 * 2 * numbers and said.elements == 2 * numbers
        assert max(calls) - outside == 4 * D
    held = {id(t): t for deltas in adapted._read.values() for d in deltas.values() for t in (d.down, d.up, d.diff)}
    assert said.host == sum(tensor.nbytes for tensor in held.values() if tensor is not None)


def changed(module: nn.Module, own: dict[str, int]) -> int:
    """Bytes of the weights that are now others than the network's own."""
    now = {key.replace(".base.", "."): value for key, value in module.state_dict().items()}
    return sum(value.nbytes for key, value in now.items() if value.data_ptr() != own[key])


def test_a_prediction_counts_them_where_their_blocks_are() -> None:
    """Beside resident blocks all the time, beside a swapped one while it computes, in RAM always, and as operations."""
    card, plain = CARDS[0], models_of(dummy_components(WAN_CONFIGS["t2v-A14B"]))
    video = Video(width=832, height=480, frames=81)
    beside = Beside(outside=7, in_block=1000, for_call=50, host=40_000, elements=5 * 10**8)

    def change(**values: object) -> tuple[int, int, int]:
        with_, without = (predict(m, video, card, values) for m in (replace(plain, lora=beside), plain))
        on_card = [sum(each.phases[phase].values()) for each in (with_, without) for phase in ("denoise", "decode")]
        assert with_.seconds_per_step > without.seconds_per_step
        return on_card[0] - on_card[2], on_card[1] - on_card[3], with_.host_bytes - without.host_bytes

    assert change() == (2 * 40_007 + 50, 2 * 40_007, 80_000)
    assert change(offload_model=True) == (40_057, 0, 80_000)
    assert change(offload_model=True, block_swap=30) == (7 + 11 * 1000 + 50, 0, 80_000)
