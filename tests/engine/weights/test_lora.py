"""LoRA files of every dialect, merged to the numbers of W + strength * alpha / rank * up @ down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan
from wan.engine.errors import BadCheckpoint, BadRequest, IncompatibleOptions
from wan.engine.given_loras import parsed
from wan.engine.hardware import Hardware
from wan.engine.optimizations import LoRA
from wan.engine.weights.lora import merged, open_lora
from wan.engine.weights.lora_names import target_of

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
    "older, with a dot": ("model.{}.lora.down.weight", "model.{}.lora.up.weight"),
    "older still": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "kohya, dots": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "kohya, diffusers' names": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "VideoX-Fun": ("lora_unet__{}.lora_down.weight", "lora_unet__{}.lora_up.weight"),
}
DIFFUSERS = {"self_attn.q": "attn1.to_q", "cross_attn.k_img": "attn2.add_k_proj", "ffn.2": "ffn.net.2"}


def spelled(layer: str, dialect: str) -> str:
    if "diffusers" in dialect:
        for ours, theirs in DIFFUSERS.items():
            layer = layer.replace(ours, theirs)
    dashes = dialect in ("kohya", "kohya, diffusers' names", "VideoX-Fun")
    return layer.replace(".", "_") if dashes else layer


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
    assert lora.targets == {target_of(f"{layer}.weight") for layer in LAYERS}
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


def test_a_middle_matrix_is_multiplied_in(tmp_path: Path) -> None:
    """W + up @ mid @ down, for a layer and for a convolution, whose window the middle one has."""
    down, mid, up = torch.randn(RANK, 10), torch.randn(RANK, RANK), torch.randn(8, RANK)
    first, window, last = torch.randn(RANK, 2, 1, 1, 1), torch.randn(RANK, RANK, 1, 2, 2), torch.randn(8, RANK, 1, 1, 1)
    parts = {"ffn.0": (down, mid, up), "patch_embedding": (first, window, last)}
    names = ("lora_down", "lora_mid", "lora_up")
    state = {f"{k}.{name}.weight": each for k, v in parts.items() for name, each in zip(names, v, strict=True)}
    save_file(state, str(tmp_path / "x.safetensors"))
    lora = open_lora(tmp_path / "x.safetensors")
    base = {"ffn.0.weight": torch.zeros(8, 10), "patch_embedding.weight": torch.zeros(8, 2, 1, 2, 2)}
    lora.check({key: tuple(value.shape) for key, value in base.items()})
    layer, convolution = dict(merged(base.items(), [(lora, 1.0)])).values()
    torch.testing.assert_close(layer, up @ mid @ down)
    kernel = torch.einsum("or,rsthw,si->oithw", last.flatten(1), window, first.flatten(1))
    torch.testing.assert_close(convolution, kernel)


def test_differences_of_lightx2v_reach_weights_biases_norms_and_modulation(tmp_path: Path) -> None:
    """The keys of an extracted few-step LoRA: pairs, diff of small weights, diff_b of biases, diff_m of modulation."""
    shapes = {
        "patch_embedding.weight": (8, 2, 1, 2, 2), "patch_embedding.bias": (8,), "blocks.0.modulation": (1, 6, 8),
        "blocks.0.self_attn.q.weight": (8, 8), "blocks.0.self_attn.q.bias": (8,), "blocks.0.norm3.weight": (8,),
        "blocks.0.norm3.bias": (8,), "blocks.0.self_attn.norm_q.weight": (8,), "head.head.weight": (4, 8),
        "head.head.bias": (4,), "head.modulation": (1, 2, 8), "blocks.0.ffn.0.weight": (8, 8),
    }  # fmt: skip
    theirs = {
        "patch_embedding.weight": "patch_embedding.diff", "blocks.0.modulation": "blocks.0.diff_m",
        "patch_embedding.bias": "patch_embedding.diff_b", "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.0.norm3.weight": "blocks.0.norm3.diff", "blocks.0.norm3.bias": "blocks.0.norm3.diff_b",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff", "head.head.weight": "head.head.diff",
        "head.head.bias": "head.head.diff_b", "head.modulation": "head.modulation.diff",
    }  # fmt: skip
    base = {key: torch.randn(shape) for key, shape in shapes.items()}
    added = {key: torch.randn(shapes[key]) for key in theirs}
    down, up = torch.randn(RANK, 8), torch.randn(8, RANK)
    state = {f"diffusion_model.{theirs[key]}": value for key, value in added.items()}
    q = "diffusion_model.blocks.0.self_attn.q"
    state |= {f"{q}.lora_down.weight": down, f"{q}.lora_up.weight": up, "scaled_fp8": torch.zeros(0)}
    save_file(state, str(tmp_path / "x.safetensors"))
    lora = open_lora(tmp_path / "x.safetensors")
    lora.check(shapes)
    assert lora.counts() == "12 tensors used (1 pairs, 10 differences), 1 of no effect, 0 unknown"
    out = dict(merged(base.items(), [(lora, 0.5)]))
    added["blocks.0.self_attn.q.weight"] = up @ down
    assert out["blocks.0.ffn.0.weight"] is base["blocks.0.ffn.0.weight"]
    for key, delta in added.items():
        torch.testing.assert_close(out[key], base[key] + 0.5 * delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"transformer.r": RANK, "transformer.lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"self_attn.q": 1}}, 1 / RANK),
    ],
    ids=str,
)
def test_alpha_is_taken_from_the_adapters_metadata_where_no_key_has_it(
    tmp_path: Path, config: dict[str, object], factor: float
) -> None:
    down, up = torch.randn(RANK, 10), torch.randn(8, RANK)
    q, path = "transformer.blocks.0.self_attn.q", tmp_path / "x.safetensors"
    state = {f"{q}.lora_A.weight": down, f"{q}.lora_B.weight": up, f"{q}.lora_B.bias": torch.ones(8)}
    save_file(state, str(path), metadata={"lora_adapter_metadata": json.dumps(config)})
    base = {"blocks.0.self_attn.q.weight": torch.zeros(8, 10), "blocks.0.self_attn.q.bias": torch.zeros(8)}
    weight, bias = dict(merged(base.items(), [(open_lora(path), 1.0)])).values()
    torch.testing.assert_close(weight, factor * up @ down, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, factor * torch.ones(8))


@pytest.mark.parametrize(("config", "said"), [([1], "no object"), ({"lora_alpha": "8"}, "alpha '8', which is no")])
def test_metadata_that_says_no_alpha_is_refused(tmp_path: Path, config: object, said: str) -> None:
    state = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / "x.safetensors"
    save_file(state, str(path), metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(BadCheckpoint, match=rf"x\.safetensors': its PEFT configuration .*{said}"):
        open_lora(path).check({"q.weight": (4, 4)})


def test_a_file_of_two_experts_gives_each_its_own(tmp_path: Path) -> None:
    first, second = pairs(), pairs()
    state: dict[str, Tensor] = {}
    for prefix, matrices in (("transformer", first), ("transformer_2", second)):
        for layer, (down, up) in matrices.items():
            name = f"{prefix}.{spelled(layer, 'diffusers')}"
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(state, str(tmp_path / "x.safetensors"))
    lora, key = open_lora(tmp_path / "x.safetensors"), f"{LAYERS[0]}.weight"
    for name, matrices in (("high", first), ("low", second)):
        down, up = matrices[LAYERS[0]]
        torch.testing.assert_close(lora.for_expert(name).delta(key).dense(), up @ down)
    with pytest.raises(BadCheckpoint, match=r"'transformer_2.*it is for a model of two experts, this has one"):
        lora.for_expert("dit")


def test_a_wider_difference_brings_input_channels(tmp_path: Path) -> None:
    """As control LoRAs do: the first convolution takes more than the base has, and nothing else may."""
    wide, base = torch.randn(8, 5, 1, 2, 2), torch.randn(8, 2, 1, 2, 2)
    for name, state in {
        "diff": {"patch_embedding.diff": wide},
        "pair": {
            "patch_embedding.lora_A.weight": wide,
            "patch_embedding.lora_B.weight": torch.eye(8)[:, :, None, None],
        },
    }.items():
        save_file(state, str(tmp_path / f"{name}.sft"))
        lora = open_lora(tmp_path / f"{name}.sft")
        assert lora.shape("patch_embedding.weight", (8, 2, 1, 2, 2)) == (8, 5, 1, 2, 2)
        [(_, out)] = merged([("patch_embedding.weight", base)], [(lora, 1.0)])
        torch.testing.assert_close(out[:, :2], base + wide[:, :2])
        torch.testing.assert_close(out[:, 2:], wide[:, 2:])
        with pytest.raises(BadCheckpoint, match="of another size"):
            lora.check({"patch_embedding.weight": (8, 6, 1, 2, 2)})


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4)}, "no 'up' matrix for 'blocks.0.ffn.0'"),
        (
            {"blocks.0.ffn.0.hada_w1_a": torch.zeros(2, 4)},
            r"'blocks.0.ffn.0.hada_w1_a' \(1 tensors\), which it cannot use",
        ),
        ({"blocks.0.ffn.0.weight": torch.zeros(2, 4)}, "cannot use"),
        ({"lora_te_x.bias": torch.zeros(2), "a.diff": torch.zeros(2)}, r"'lora_te_x.bias' \(1 tensors\)"),
        (
            {f"q.{n}": torch.zeros(2, 2) for n in ("diff", "lora_A.weight", "lora_B.weight")},
            "a pair and a difference for 'q'",
        ),
        ({"q.lora_A.weight": torch.zeros(2, 4), "q.lora_down.weight": torch.zeros(2, 4)}, "twice"),
        ({}, "is empty"),
        (
            {"q.lora_A.weight": torch.zeros(0, 4), "q.lora_B.weight": torch.zeros(4, 0)},
            r"float32 \[0, 4\], nothing that",
        ),
        ({"q.diff": torch.zeros(2, dtype=torch.int8)}, r"'q\.diff' is int8 \[2\], nothing that can be added"),
        ({"q.lokr_w1": torch.zeros(2, 2)}, r"'q\.lokr_w1' .* convert other kinds \(LoHa, LoKr, DoRA\)"),
        (
            {f"q.{n}": torch.zeros(2, 2) for n in ("lora_A.weight", "lora_B.weight", "dora_scale")},
            r"'q\.dora_scale' \(1 tensors\)",
        ),
        ({f"q.lora_{n}.weight": torch.zeros(2, 2) for n in ("A", "B", "magnitude_vector")}, r"'q.lora_magnitude_vect"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(tmp_path: Path, state: dict[str, Tensor], said: str) -> None:
    save_file(state, str(tmp_path / "x.safetensors"))
    with pytest.raises(BadCheckpoint, match=said) as caught:
        open_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("alpha", "is nan, which scales"), ("lora_A.weight", "holds NaN")])
def test_what_is_no_number_is_refused_where_it_is_read(tmp_path: Path, name: str, said: str) -> None:
    state = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2), "q.alpha": torch.tensor(1.0)}
    state[f"q.{name}"] = state[f"q.{name}"] * torch.nan
    save_file(state, str(tmp_path / "x.safetensors"))
    with pytest.raises(BadCheckpoint, match=rf"x\.safetensors': 'q\.{name}' {said}.*; download it again"):
        list(merged([("q.weight", torch.zeros(4, 4))], [(open_lora(tmp_path / "x.safetensors"), 1.0)]))


def test_a_lora_of_another_model_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    lora = open_lora(write(tmp_path / "x.safetensors", "PEFT", pairs()))
    shapes = {key: tuple(value.shape) for key, value in weights().items()}
    with pytest.raises(BadCheckpoint, match=r"8, 3\] x \[3, 10\] for '.*blocks.1.ffn.2', whose weight is \[8, 12\]"):
        lora.check(shapes | {"blocks.1.ffn.2.weight": (8, 12)})
    del shapes["blocks.1.ffn.2.weight"]
    with pytest.raises(
        BadCheckpoint, match=r"changes '.*blocks.1.ffn.2', which .* lacks; .*\(1 of its 3 changes do not fit"
    ):
        lora.check(shapes)
    with pytest.raises(BadCheckpoint, match="which this transformer lacks"):
        list(merged([], [(lora, 1.0)]))


def test_a_lora_is_spelled_from_the_right(tmp_path: Path) -> None:
    path = write(tmp_path / "a:0.5.safetensors", "PEFT", pairs())
    windows = r"C:\loras\a.safetensors"
    for text, file, strength, steps in (
        (f"{path}", path, 1.0, (0, 1)),
        (f"{path}:0.25", path, 0.25, (0, 1)),
        (f"{path}:-1@0.5-1", path, -1.0, (0.5, 1)),
        (windows, Path(windows), 1.0, (0, 1)),
        (f"{windows}:2@0-0.5", Path(windows), 2.0, (0, 0.5)),
    ):
        given = parsed(text, "--lora")
        assert (given.path, given.strength, (given.first, given.last)) == (file, strength, steps)
        assert str(parsed(str(given), "--lora")) == str(given)
    for wrong, said in (
        (":strong", "'strong' is no number"),
        (":nan", "'nan' is no number"),
        (":1@0.7-0.2", "share of"),
    ):
        with pytest.raises(BadRequest, match=said):
            LoRA(lora=(f"{path}{wrong}",)).check(CPU)
    with pytest.raises(BadCheckpoint, match=r"LoRA '.*none' does not exist"):
        LoRA(lora=(str(tmp_path / "none"),)).check(CPU)
    with pytest.raises(IncompatibleOptions, match="--lora_mode merge and .*:1@0-0.5'.*use --lora_mode onthefly"):
        LoRA(lora=(f"{path}:1@0-0.5",), lora_mode="merge").check(CPU)


def test_the_pipeline_merges_into_every_expert_and_refuses_what_does_not_fit(
    tiny_checkpoint: Path, tiny_config: object, root: Path, tmp_path: Path
) -> None:
    path = root / "tests" / "data" / "lora-tiny.safetensors"
    plain = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")
    changed = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=f"{path}:2")
    lora = open_lora(path)
    for name in ("high_noise_model", "low_noise_model"):
        before, after = (getattr(pipe, name).state_dict() for pipe in (plain, changed))
        assert before.keys() == after.keys()
        for key, value in before.items():
            delta = 2 * lora.delta(key).dense() if lora.changes(key) else torch.zeros(())
            torch.testing.assert_close(after[key], value + delta, rtol=1e-6, atol=1e-7)
    other = write(tmp_path / "other.safetensors", "PEFT", pairs())
    with pytest.raises(BadCheckpoint, match="whose weight is|which this transformer lacks"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora=str(other))
