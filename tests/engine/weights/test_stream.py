"""Weights are read from any layout, refused when damaged or hostile, and never held twice."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.stream import dummy_weights, find_weights, load_into, open_weights

CPU = torch.device("cpu")
STEM = "diffusion_pytorch_model"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 5),
        "a.bias": torch.randn(3).bfloat16(),
        "b.table": torch.arange(6).reshape(2, 3),
        "b.half": torch.randn(2, 2, 2).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def stream_equals(path: Path, weights: dict[str, Tensor]) -> bool:
    found = dict(open_weights(path).stream())
    return found.keys() == weights.keys() and all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in weights.items()
    )


def write_shards(folder: Path, weights: dict[str, Tensor], count: int, *, index: bool = True) -> Path:
    """`count` shards that share the keys between them."""
    weight_map = {}
    for number in range(count):
        name = f"{STEM}-{number + 1:05d}-of-{count:05d}.safetensors"
        keys = list(weights)[number::count]
        save_file({key: weights[key] for key in keys}, str(folder / name))
        weight_map |= dict.fromkeys(keys, name)
    if index:
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_one_file(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file(weights, str(folder / f"{STEM}.safetensors"), metadata={"format": "pt"})
    return folder / f"{STEM}.safetensors"


def as_pth(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


def as_old_pth(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def as_nested_pth(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


LAYOUTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "one safetensors file": as_one_file,
    "one shard": lambda folder, weights: write_shards(folder, weights, 1),
    "three shards": lambda folder, weights: write_shards(folder, weights, 3),
    "shards without an index": lambda folder, weights: write_shards(folder, weights, 2, index=False),
    "zipped pth": as_pth,
    "pth from before torch 1.6": as_old_pth,
    "state dict inside a checkpoint": as_nested_pth,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path: Path, weights: dict[str, Tensor], layout: str) -> None:
    path = LAYOUTS[layout](tmp_path, weights)
    assert stream_equals(path, weights)
    file = open_weights(path)
    assert file.shapes() == {key: tuple(value.shape) for key, value in weights.items()}
    assert file.dtypes()["a.bias"] is torch.bfloat16
    assert torch.equal(dict(file.stream(["a.weight"]))["a.weight"], weights["a.weight"])


def test_views_in_a_pth_are_read_as_they_were_saved(tmp_path: Path) -> None:
    """Transposed, sliced and tied tensors share a storage in the file."""
    base = torch.randn(4, 6)
    weights = {"base": base, "transposed": base.t(), "slice": base[1:3, 2:5], "row": base[2]}
    torch.save(weights, tmp_path / "views.pth")
    assert stream_equals(tmp_path / "views.pth", weights)


def test_find_weights_takes_index_before_file_before_shards(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(BadCheckpoint, match=f"has no {STEM}.safetensors"):
        find_weights(tmp_path)
    write_shards(tmp_path, weights, 2, index=False)
    assert find_weights(tmp_path).name == f"{STEM}-00001-of-00002.safetensors"
    as_one_file(tmp_path, weights)
    assert find_weights(tmp_path).name == f"{STEM}.safetensors"
    write_shards(tmp_path, weights, 2)
    assert find_weights(tmp_path).name == f"{STEM}.safetensors.index.json"


@pytest.mark.parametrize("index", [True, False], ids=["with index", "without index"])
def test_a_missing_shard_is_named(tmp_path: Path, weights: dict[str, Tensor], index: bool) -> None:
    write_shards(tmp_path, weights, 3, index=index)
    missing = f"{STEM}-00002-of-00003.safetensors"
    (tmp_path / missing).unlink()
    with pytest.raises(BadCheckpoint, match=missing):
        open_weights(tmp_path)


def test_a_shard_without_the_promised_key_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write_shards(tmp_path, weights, 2)
    shard = f"{STEM}-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, str(tmp_path / shard))
    with pytest.raises(BadCheckpoint, match=f"{shard}.*lacks 'a.bias'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("layout", ["one safetensors file", "zipped pth", "pth from before torch 1.6"])
@pytest.mark.parametrize("kept", [0, 5, 40, -1], ids=["empty", "5 bytes", "40 bytes", "all but one byte"])
def test_a_truncated_file_is_named_before_anything_is_read(
    tmp_path: Path, weights: dict[str, Tensor], layout: str, kept: int
) -> None:
    path = LAYOUTS[layout](tmp_path, weights)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadCheckpoint, match=path.name):
        open_weights(path)


def test_a_file_cut_while_it_is_read_is_named_with_the_key(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = as_one_file(tmp_path, weights)
    file = open_weights(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(BadCheckpoint, match=f"{path.name}.*truncated"):
        list(file.stream())


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "../other/weights", ""])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_pointers_and_texts_are_not_weights(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadCheckpoint, match="git-lfs pointer" if "lfs" in text else name):
        open_weights(tmp_path / name)


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [100, 104]},
        {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"shape": [1]},
        7,
    ],
)
def test_impossible_headers_are_refused(tmp_path: Path, row: Any) -> None:
    header = json.dumps({"x": row}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(BadCheckpoint, match=r"w\.safetensors"):
        open_weights(tmp_path / "w.safetensors")


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"a": Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadCheckpoint, match="could run code"):
        open_weights(path)
    path.write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    with pytest.raises(BadCheckpoint, match=path.name):
        open_weights(path)
    assert not trace.exists()


def test_things_that_are_not_state_dicts_are_refused(tmp_path: Path) -> None:
    for content in ({"a": 1}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(BadCheckpoint, match="not a state dict"):
            open_weights(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(BadCheckpoint, match=r"w\.pth"):
        open_weights(tmp_path / "w.pth")


def small_net() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def load(net: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    load_into(net, weights.items(), dtype=lambda key: dtype, place=lambda key, tensor: CPU)


def test_loading_fills_parameters_and_buffers_without_copying() -> None:
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict()
    net = small_net()
    load(net, source)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in source.items())
    assert net[0].weight.data_ptr() == source["0.weight"].data_ptr()


def test_storage_dtype_is_chosen_by_key_and_spares_integers() -> None:
    net = small_net()
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict()
    half = lambda key: torch.bfloat16 if key.startswith("0") else None  # noqa: E731
    load_into(net, source.items(), dtype=half, place=lambda key, tensor: CPU)
    assert {net[0].weight.dtype, net[0].bias.dtype} == {torch.bfloat16}
    assert net[1].weight.dtype is torch.float32
    assert net[1].num_batches_tracked.dtype is torch.int64


def test_every_tensor_lands_where_place_says() -> None:
    net, source = small_net(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict()
    asked: list[str] = []

    def place(key: str, tensor: Tensor) -> torch.device:
        asked.append(key)
        return CPU

    load_into(net, source.items(), dtype=lambda key: None, place=place)
    assert asked == list(source)


def test_one_error_names_missing_unexpected_and_misshaped_keys() -> None:
    source = dict(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict())
    del source["0.bias"]
    source |= {"1.weight": torch.zeros(7), "lora.weight": torch.zeros(1)}
    with pytest.raises(BadCheckpoint) as caught:
        load(small_net(), source)
    message = str(caught.value)
    assert "1 missing (0.bias)" in message
    assert "1 unexpected (lora.weight)" in message
    assert "1 of the wrong shape (1.weight is [7], not [3])" in message
    assert "\n" not in message


def test_long_lists_of_wrong_keys_are_cut() -> None:
    with pytest.raises(BadCheckpoint, match=r"7 missing \(0\.weight, 0\.bias, 1\.weight and 4 more\)"):
        load(small_net(), {})


def test_a_key_the_file_lacks_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(BadCheckpoint, match="no 'c'"):
        list(open_weights(as_pth(tmp_path, weights)).stream(["a.bias", "c"]))


def tiny_dit(dtype: torch.dtype = torch.float32) -> nn.Module:
    from wan.modules.model import WanModel

    with torch.device("meta"):
        return WanModel(dim=256, ffn_dim=512, freq_dim=64, text_dim=64, num_heads=2, num_layers=4).to(dtype)


def test_dummy_weights_depend_on_seed_and_key_alone() -> None:
    first, again, other = (dict(dummy_weights(tiny_dit(), seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    key = "blocks.0.self_attn.q.weight"
    assert not torch.equal(first[key], other[key])
    assert not torch.equal(first[key], first["blocks.1.self_attn.q.weight"])


def test_dummy_weights_have_the_modules_dtype_and_a_sane_scale() -> None:
    weights = dict(dummy_weights(tiny_dit(torch.bfloat16)))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    matrix = weights["blocks.0.ffn.0.weight"].float()
    assert matrix.std() == pytest.approx(256**-0.5, rel=0.02)
    assert abs(matrix.mean()) < 1e-3
    assert torch.linalg.matrix_rank(matrix) == 256
    assert weights["blocks.0.norm3.weight"].eq(1).all()
    assert weights["blocks.0.ffn.0.bias"].eq(0).all()
    assert weights["blocks.0.modulation"].float().std() == pytest.approx(256**-0.5, rel=0.1)


def test_dummy_networks_compute_finite_values_of_order_one() -> None:
    from wan.engine.types import Condition
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    dit = tiny_dit()
    load(dit, dict(dummy_weights(dit)))
    with torch.device("meta"):
        vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8))
    load(vae, dict(dummy_weights(vae)))
    with torch.inference_mode():
        condition = Condition(context=torch.randn(1, 8, 64))
        velocity = dit.velocity(torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), condition)  # type: ignore[operator]
        video = vae.decode(velocity)
    for value in (velocity, video):
        assert 0.05 < value.std() < 50


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from wan.engine.weights.stream import load_into, open_weights

def memory(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

warm = torch.zeros(2**10).to(torch.bfloat16)
for path, kept, layers, width in zip(*[iter(sys.argv[1:])] * 4):
    path, kept, layers, width = Path(path), getattr(torch, kept), int(layers), int(width)
    open("/proc/self/clear_refs", "w").write("5")   # the peak counts from here: importing torch is not loading
    before = memory("VmRSS")
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    load_into(net, open_weights(path).stream(), dtype=lambda key: kept, place=lambda key, tensor: torch.device("cpu"))
    print((memory("VmHWM") - before) / max(path.stat().st_size, sum(p.nbytes for p in net.parameters())))
    del net
"""

Case = tuple[str, str, str, int, int]


def peak_ratios(folder: Path, cases: list[Case], root: Path) -> list[float]:
    """Peak resident memory of loading over the larger of file and network, measured in a process of its own."""
    arguments: list[str] = []
    for name, stored, kept, layers, width in cases:
        path = folder / f"{stored}-{kept}-{name}"
        state = {f"{i}.weight": torch.zeros(width, width, dtype=getattr(torch, stored)) for i in range(layers)}
        torch.save(state, path) if path.suffix == ".pth" else save_file(state, str(path))
        arguments += [str(path), kept, str(layers), str(width)]
    command = [sys.executable, "-c", PEAK, *arguments]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return [float(line) for line in output.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures peak memory through /proc")
def test_loading_never_holds_two_copies(tmp_path: Path, root: Path) -> None:
    """At most 1.15 times the larger of file and network; 64 tensors of 2 to 4 MiB, so one tensor more is 3 %."""
    cases: list[Case] = [
        ("w.safetensors", "bfloat16", "bfloat16", 64, 1448),
        ("w.safetensors", "float32", "bfloat16", 64, 1024),
        ("w.safetensors", "bfloat16", "float32", 64, 1024),
        ("w.pth", "float32", "bfloat16", 64, 1024),
        ("w.pth", "bfloat16", "float32", 64, 1024),
    ]
    ratios = peak_ratios(tmp_path, cases, root)
    assert max(ratios) < 1.15, dict(zip(cases, ratios, strict=True))
