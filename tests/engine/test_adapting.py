"""LoRAs at run time give what merging gives, leave every weight as it was, and come and go with blocks that visit."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import wan
from wan.engine.adapting import Adapted, LowRank
from wan.engine.compiling import Compiled
from wan.engine.errors import BadCheckpoint, BadRequest, IncompatibleOptions
from wan.engine.ops.float8 import Coded, Float8Linear, quantize_weight
from wan.engine.optimizations import Compile, registry
from wan.engine.plan import Plan
from wan.engine.weights.lora import merged, open_lora

SIZE: dict[str, Any] = {"sampling_steps": 2, "seed": 1, "offload_model": None, "guide_scale": 4.0}
D = 48


def write(path: Path, seed: int, rank: int, *, outside: bool = True) -> str:
    """A LoRA of odd rank for the tiny model: pairs in both blocks, differences of what is no such layer."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made) * 0.2

    state = {}
    for layer, (rows, columns) in {
        "blocks.0.self_attn.q": (D, D), "blocks.1.self_attn.o": (D, D), "blocks.1.cross_attn.v": (D, D),
        "blocks.0.ffn.0": (64, D), "blocks.1.ffn.2": (D, 64),
    }.items():  # fmt: skip
        state |= {f"{layer}.lora_down.weight": normal(rank, columns), f"{layer}.lora_up.weight": normal(rows, rank)}
        state[f"{layer}.alpha"] = torch.tensor(rank / 2)
    state |= {
        "blocks.0.self_attn.q.diff_b": normal(D),
        "blocks.1.norm3.diff": normal(D),
        "blocks.0.diff_m": normal(1, 6, D),
    }
    if outside:
        state |= {"text_embedding.2.diff_b": normal(D), "head.head.diff": normal(64, D)}
        state |= {
            "time_embedding.0.lora_down.weight": normal(rank, 32),
            "time_embedding.0.lora_up.weight": normal(D, rank),
        }
    save_file({f"diffusion_model.{key}": value for key, value in state.items()}, str(path))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "a.safetensors", 1, 3), write(tmp_path / "b.safetensors", 2, 5, outside=False)


def video(pipe: Any, **options: Any) -> Tensor:
    made: Tensor | None = pipe.generate("a red bird", (32, 32), 1, **SIZE | options)
    assert made is not None
    return made


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"param_dtype": "bfloat16"}, 2e-2),
        ({"use_batched_cfg": True, "block_swap": 1}, 1e-5),
        pytest.param({"compile": True, "use_batched_cfg": True, "block_swap": 1}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"fp8": "weight", "block_swap": 1, "compile": True}, 0.04, marks=pytest.mark.slow),
        ({"fp8": "scaled"}, 0.06),
    ],
    ids=str,
)
def test_every_mode_makes_the_video_that_merging_makes(
    tiny_checkpoint: Path, tiny_config: Any, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any], tolerance: float,
) -> None:  # fmt: skip
    """Two LoRAs for both experts and one more for the low one, in float32 and bfloat16; the tolerance is that of
    another order of summation, over two steps with guidance 4. Over 8 bits it is that of e4m3's three binary digits:
    `merge` rounds the sum once, `stream` the weight and then the sum, `onthefly` the weight alone."""
    monkeypatch.setattr(Compiled, "backend", "eager")
    a, b = files
    chosen = {"lora": (a, f"{b}:-0.5"), "lora_low": (f"{b}:0.25",), **options}
    pipes = {
        mode: wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode=mode, **chosen)
        for mode in ("merge", "onthefly", "stream")
    }
    made = {mode: video(pipe) for mode, pipe in pipes.items()}
    assert distance(made["onthefly"], made["merge"]) < tolerance
    assert distance(made["stream"], made["merge"]) < tolerance
    assert torch.equal(video(pipes["onthefly"]), made["onthefly"])
    plain = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options)
    assert distance(video(plain), made["merge"]) > 5 * tolerance, "the LoRAs change the video"
    for expert in ("high_noise_model", "low_noise_model"):
        mine = {k.replace(".base.", "."): v for k, v in getattr(pipes["onthefly"], expert).state_dict().items()}
        for key, value in getattr(plain, expert).state_dict().items():
            assert torch.equal(mine[key], value), "no weight was changed"


def test_strengths_change_by_the_step_and_one_expert_can_be_left_alone(
    tiny_checkpoint: Path, tiny_config: Any, files: tuple[str, str]
) -> None:
    """Of two steps, one of each expert, a LoRA of the first half acts in the high-noise expert's alone."""
    build = lambda **options: wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options)  # noqa: E731
    plain, both = video(build()), video(build(lora=files[0]))
    high, low = video(build(lora_high=files[0])), video(build(lora_low=files[0]))
    half = video(build(lora=f"{files[0]}:1@0-0.5"))
    assert distance(half, high) < 1e-5
    assert min(distance(x, y) for x in (plain, both, low) for y in (high,)) > 1e-4
    assert distance(low, both) > 1e-4


def test_what_embeds_the_text_follows_a_strength_that_changes_within_an_expert(
    tiny_checkpoint: Path, tiny_config: Any, files: tuple[str, str]
) -> None:
    """Ranges that join are the whole: the text is embedded anew where the strength changes."""
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode="onthefly")
    a = files[0]
    whole = video(pipe, lora=a, sampling_steps=4)
    split = video(pipe, lora=(f"{a}:0.6", f"{a}:0.4@0-0.25", f"{a}:0.4@0.25-0.75", f"{a}:0.4@0.75-1"), sampling_steps=4)
    other = video(pipe, lora=(f"{a}:0.6", f"{a}:0.4@0-0.75"), sampling_steps=4)
    assert distance(split, whole) < 1e-5 < 1e-4 < distance(other, whole)


def test_another_video_reads_only_files_that_are_new(
    tiny_checkpoint: Path, tiny_config: Any, files: tuple[str, str]
) -> None:
    a, b = files
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=a, lora_mode="onthefly")
    first = video(pipe)
    adapted = pipe.engine.adapted["low"]
    after_a = adapted.counts.tensors_read
    assert after_a == 11
    video(pipe, lora=(a, f"{b}:0.5"))
    assert adapted.counts.tensors_read == after_a + 8
    before = adapted.counts.misses
    assert torch.equal(video(pipe, lora=f"{a}:1"), first)
    assert torch.equal(video(pipe, lora=f"{a}:1"), first)
    assert adapted.counts.tensors_read == after_a + 8
    assert adapted.counts.misses == before + 5, "found on the device by every forward but the first"
    plain = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")
    # A layer that may be adapted is not fused with what follows it.
    assert (video(pipe, lora=()) - video(plain)).abs().max() < 1e-4
    merging = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=a)
    with pytest.raises(IncompatibleOptions, match=r"generate\(lora=...\) cannot be changed for one call"):
        video(merging, lora=b)


def test_the_table_of_times_has_the_calls_that_were_made(
    tiny_checkpoint: Path, tiny_config: Any, files: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Four steps, two of each expert, with guidance: each of five layers is called four times, and copied once.

    Merged nothing is called; then loading tells what was read.
    """
    caplog.set_level(logging.INFO)
    options = {"lora": files[0], "lora_timing": True}
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode="onthefly", **options)
    video(pipe, sampling_steps=4)
    table = [line.split() for line in caplog.messages if line.startswith("LoRA timing:")]
    assert [row[2] for row in table] == ["expert", "high", "low"]
    for row in table[1:]:
        counts = pipe.engine.adapted[row[2]].counts
        assert row[4:6] == ["11", "15/20"] and row[7] == "2"
        assert float(row[6]) == round(counts.copied_bytes / 2**20, 1) and float(row[8]) > 0
        assert counts.copied_bytes == 4 * 3 * (3 * 2 * D + 2 * (64 + D))
    caplog.clear()
    video(wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options))
    told = "\n".join(caplog.messages)
    assert "LoRA timing: high, 11 tensors read and merged in" in told
    assert re.search(r"LoRA timing: low +0\.00 +0 +- +0\.0 +1 +\d", told)


class Two(nn.Module):
    """Two blocks of one layer, as much of a transformer as `Adapted` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.run_block = lambda block, x: block(x)

    def all_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def read_by_trunk(self) -> dict[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


def test_matrices_of_a_block_that_visits_leave_with_it(tmp_path: Path) -> None:
    state = {f"blocks.{n}.0.lora_{side}.weight": torch.eye(4) for n in range(2) for side in "AB"}
    save_file(state, str(tmp_path / "x.safetensors"))
    net = Two()
    visiting = net.blocks[1]
    adapted = Adapted(net, torch.device("cpu"), dense=False, visits=lambda block: block is visiting)
    adapted.load([open_lora(tmp_path / "x.safetensors")])
    for _ in range(3):
        with adapted.at((0.5,)):
            net(torch.ones(1, 4))
    thin = [block[0].thin for block in net.blocks]  # type: ignore[index]
    assert isinstance(net.blocks[0][0], LowRank)  # type: ignore[index]
    assert [each.down is None for each in thin] == [False, True]
    assert (adapted.counts.hits, adapted.counts.misses) == (2, 4)
    adapted.leave()
    assert all(each.down is None for each in thin)


@pytest.mark.parametrize("dense", [False, True])
def test_over_8_bits_a_change_is_added_to_codes_times_scales(tmp_path: Path, dense: bool) -> None:
    """`onthefly` leaves codes alone and adds in float, `stream` quantises the sum anew for the time of a call, `merge`
    once and for all. A whole difference is always exchanged."""
    torch.manual_seed(0)
    down, up, difference, x = (torch.randn(*shape) for shape in ((3, 16), (32, 3), (32, 16), (2, 16)))
    pair = {"blocks.0.0.lora_A.weight": down, "blocks.0.0.lora_B.weight": up}
    save_file(pair | {"blocks.1.0.diff": difference}, str(tmp_path / "x.safetensors"))
    net = Two()
    layers = [Float8Linear(nn.Linear(16, 32)) for _ in range(2)]
    net.blocks = nn.ModuleList(nn.Sequential(layer) for layer in layers)
    for layer in layers:
        layer.weight.data, layer.weight_scale.data = quantize_weight(torch.randn(32, 16))
    own = [(layer.weight.clone(), layer.weight_scale.clone()) for layer in layers]
    adapted = Adapted(net, torch.device("cpu"), dense=dense)
    lora = open_lora(tmp_path / "x.safetensors")
    adapted.load([lora])
    with adapted.at((0.5,)):
        made = [net.run_block(block, x) for block in net.blocks]
    changes = (up @ down, difference)
    stored = [(f"blocks.{n}.0.weight", Coded(*each)) for n, each in enumerate(own)]
    sums = dict(merged(stored, [(lora, 0.5)])).values()
    for out, layer, (codes, scale), change, added in zip(made, layers, own, changes, sums, strict=True):
        total = codes.float() * scale + 0.5 * change
        assert torch.allclose(added, total, rtol=0, atol=1e-5)
        again, scales = quantize_weight(total)
        kept = not dense and change is not difference
        weight = total if kept else again.float() * scales
        assert torch.allclose(out, F.linear(x, weight, layer.bias), rtol=0, atol=1e-5)
        assert torch.equal(layer.weight.float(), codes.float())
        assert torch.equal(layer.weight_scale, scale)


def test_matrices_for_tokens_behind_the_video_leave_the_others_alone(tmp_path: Path) -> None:
    """As Stand-In has them, beside a LoRA for all tokens of the same layer."""
    torch.manual_seed(0)
    net, x = Two(), torch.randn(2, 5, 4)
    net.blocks = nn.ModuleList(nn.ModuleDict({"self_attn": nn.ModuleDict({"q": nn.Linear(4, 4)})}) for _ in range(2))
    net.run_block = lambda block, x, inputs: block["self_attn"]["q"](x)
    pairs = {side: torch.randn(*shape) for side, shape in {"down": (2, 4), "up": (4, 2)}.items()}
    for name, layer in {"behind": "q_loras.{}", "all": "q.lora_{}"}.items():
        key = f"blocks.0.self_attn.{layer}.weight"
        save_file({key.format(side): each for side, each in pairs.items()}, str(tmp_path / f"{name}.safetensors"))
    files = [open_lora(tmp_path / f"{name}.safetensors") for name in ("behind", "all")]
    inputs = SimpleNamespace(frames=torch.tensor([0, 0, 1, -1, -1]))
    plain = net.run_block(net.blocks[0], x, inputs)
    adapted = Adapted(net, torch.device("cpu"), dense=False)
    adapted.load(files)
    with adapted.at((0.5, 2.0)):
        made = net.run_block(net.blocks[0], x, inputs) - plain
    change = x @ (pairs["up"] @ pairs["down"]).T
    assert torch.allclose(made[:, :3], 2 * change[:, :3], atol=1e-5)
    assert torch.allclose(made[:, 3:], 2.5 * change[:, 3:], atol=1e-5)


def test_a_lora_for_tokens_behind_the_video_is_refused_where_it_cannot_act(
    tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path
) -> None:
    state = {f"blocks.0.self_attn.k_loras.{side}.weight": torch.ones(*shape) for side, shape in
             {"down": (2, D), "up": (D, 2)}.items()}  # fmt: skip
    save_file(state, str(tmp_path / "x.safetensors"))
    path = str(tmp_path / "x.safetensors")
    for mode in ("merge", "stream"):
        with pytest.raises(IncompatibleOptions, match=rf"--lora_mode {mode} and '.*x\.safetensors:1' do not"):
            wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=path, lora_mode=mode)
    with pytest.raises(IncompatibleOptions, match=r"--attention_rows 64 and --lora '.*x\.safetensors:1' do not go"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=path, attention_rows=64)
    with pytest.raises(BadRequest, match=r"x\.safetensors' acts on tokens behind .* alone, and 'high' has none"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=path)


@pytest.mark.parametrize("graphs", [{"compile_mode": "max-autotune"}, {"cuda_graphs": True}], ids=str)
def test_weights_that_are_merged_for_a_call_are_not_for_graphs(graphs: dict[str, Any]) -> None:
    plan = Plan.of(registry(), {"compile": True, "lora_mode": "stream", **graphs})
    (flag,) = (f"--{name}" for name in graphs)
    with pytest.raises(
        IncompatibleOptions, match=rf"{flag}.* and --lora_mode stream do not go together: a graph holds"
    ):
        plan.get(Compile).check_plan(plan)
    plan.get(Compile).check_plan(plan.changed(registry(), {"lora_mode": "onthefly"}))


def test_a_file_of_another_model_is_refused_also_for_one_video(
    tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path
) -> None:
    save_file({"blocks.7.ffn.0.diff_b": torch.zeros(64)}, str(tmp_path / "x.safetensors"))
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode="onthefly")
    with pytest.raises(BadCheckpoint, match=r"'blocks.7.ffn.0', which this transformer lacks"):
        video(pipe, lora=str(tmp_path / "x.safetensors"))
