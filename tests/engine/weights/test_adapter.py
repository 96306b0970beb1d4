"""A PEFT adapter folder is a checkpoint: its base's weights with the pairs merged and the whole layers put in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wan.cli.fingerprints import files_of
from wan.engine.errors import BadCheckpoint
from wan.engine.weights.dialects import DIT, open_network

Q, PATCH = "blocks.0.self_attn.q", "patch_embedding"
BASE = {
    f"{Q}.weight": torch.linspace(-1, 1, 24).view(4, 6),
    f"{Q}.bias": torch.ones(4),
    f"{PATCH}.weight": torch.ones(4, 2, 1, 2, 2),
}
DOWN, UP = torch.linspace(0, 1, 12).view(2, 6), torch.linspace(-2, 1, 8).view(4, 2)
WIDE = torch.linspace(0, 3, 80).view(4, 5, 1, 2, 2)
PREFIX = "base_model.model."
Make = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> Make:
    """Writes base and adapter with some fields or tensors changed; returns the adapter's file."""
    (tmp_path / "base").mkdir()
    (tmp_path / "thin").mkdir()
    save_file(BASE, tmp_path / "base" / "diffusion_pytorch_model.safetensors")

    def make(tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
        stored = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{PATCH}.weight": WIDE} | (tensors or {})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "../base"} | fields
        (tmp_path / "thin" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(
            {PREFIX + key: value for key, value in stored.items()}, tmp_path / "thin" / "adapter_model.safetensors"
        )
        return tmp_path / "thin" / "adapter_model.safetensors"

    return make


def test_it_reads_as_the_base_with_pairs_merged_and_layers_widened(adapter: Make) -> None:
    weights = open_network(adapter(), DIT)
    read = dict(weights.stream())
    assert {key: tuple(value.shape) for key, value in read.items()} == weights.shapes()
    assert {key: value.dtype for key, value in read.items()} == weights.dtypes()
    torch.testing.assert_close(read[f"{Q}.weight"], BASE[f"{Q}.weight"] + 1.5 * UP @ DOWN)
    assert torch.equal(read[f"{PATCH}.weight"], WIDE) and torch.equal(read[f"{Q}.bias"], BASE[f"{Q}.bias"])
    assert [key for key, _ in weights.stream([f"{Q}.bias"])] == [f"{Q}.bias"]


def test_its_fingerprint_covers_the_base(adapter: Make) -> None:
    path = adapter()
    assert [each.resolve().parent.name for each in files_of(path)] == ["thin", "base"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"base_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B"},
            r"'Wan-AI/Wan2\.1-T2V-14B', and there is no such folder",
        ),
        ({"use_dora": True}, r"use_dora True: only plain LoRA can be merged; merge it with PEFT"),
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA'"),
        ({"r": None}, r"r None"),
        ({"tensors": {f"{Q}.lora_B.weight": UP[:3]}}, r"was made for a model of another size"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(adapter: Make, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadCheckpoint, match=says):
        open_network(adapter(**fields), DIT)


def test_an_adapter_without_its_configuration_is_refused(adapter: Make) -> None:
    path = adapter()
    (path.parent / "adapter_config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"adapter_config\.json' cannot be read"):
        open_network(path, DIT)
