"""Files that are written tensor by tensor are those a library would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.stream import open_weights
from wan.engine.weights.write import Table, table_bytes, write_pth, write_safetensors

WEIGHTS: dict[str, Tensor] = {
    "half": torch.randn(3, 5).half(),
    "odd": torch.arange(7, dtype=torch.uint8),
    "brain": torch.randn(9, 3, 2).bfloat16(),
    "scalar": torch.tensor(4.5),
    "empty": torch.zeros(0, 4),
    "single": torch.randn(11),
}


def table(weights: dict[str, Tensor]) -> Table:
    return {key: (value.dtype, tuple(value.shape)) for key, value in weights.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_one_file_in_any_order_of_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path, "w", table(WEIGHTS), reversed(WEIGHTS.items()), limit=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert same(load_file(tmp_path / "w.safetensors"), WEIGHTS)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_shards_hold_at_most_the_limit_and_an_index_names_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path, "w", table(WEIGHTS), WEIGHTS.items(), limit=50)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0].name == f"w-00001-of-{len(shards):05d}.safetensors"
    loaded = [load_file(path) for path in shards]
    assert same({key: value for shard in loaded for key, value in shard.items()}, WEIGHTS)
    sizes = [[value.nbytes for value in shard.values()] for shard in loaded]
    assert all(sum(each) <= 50 or len(each) == 1 for each in sizes)
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == table_bytes(table(WEIGHTS)) == sum(map(sum, sizes))
    assert all(key in load_file(tmp_path / name) for key, name in index["weight_map"].items())
    assert same(dict(open_weights(tmp_path / "w.safetensors.index.json").stream()), WEIGHTS)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_pth_is_what_torch_saves(tmp_path: Path, mmap: bool) -> None:
    weights = {key: value for key, value in WEIGHTS.items() if value.numel()}
    write_pth(tmp_path / "w.pth", table(weights), weights.items())
    assert same(torch.load(tmp_path / "w.pth", weights_only=True, mmap=mmap), weights)
    assert same(dict(open_weights(tmp_path / "w.pth").stream()), weights)


def test_a_tensor_that_never_comes_is_an_error_and_no_file_is_written_over(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no tensor came for 'half'"):
        rest = [item for item in WEIGHTS.items() if item[0] != "half"]
        write_safetensors(tmp_path, "w", table(WEIGHTS), rest, limit=10**9)
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path, "w", table(WEIGHTS), WEIGHTS.items(), limit=10**9)
