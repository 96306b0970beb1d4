"""Every registered optimisation keeps its promise on a tiny checkpoint, through the real engine.

A new optimisation is tested here without a line being added: its settings are read from its options. On the CPU a
placement moves nothing, so what placements do is tested as policies here and as moves in test_placement.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import MissingPackage, UnsupportedHardware, WanError
from wan.engine.hardware import Hardware
from wan.engine.ops.attention import BACKENDS, sdpa
from wan.engine.optimizations import Compile, registry
from wan.engine.optimizations.batched_cfg import batched
from wan.engine.options import Option, options_of
from wan.engine.placement import Policy
from wan.engine.plan import Optimization, Plan, options
from wan.engine.types import Condition, Segment, Step, Tiling

Settings = dict[str, Any]
Generate = Callable[..., Tensor]

UPSTREAM: Settings = {
    "tf32": None, "convert_model_dtype": False, "param_dtype": None, "attention": "sdpa", "compile": False,
    "compile_mode": "default", "lora": None, "use_batched_cfg": False, "offload_model": None, "t5_cpu": False,
    "vae_cpu": False, "vae_tiling": False, "vae_tile": 32, "vae_tile_overlap": 8, "vae_tile_park": True,
    "cache": "off", "cache_threshold": None, "cache_max_skips": None, "cache_retain": None, "cache_signal": "e",
    "cache_table": None, "cfg_interval": None, "cfg_zero_star": False, "cfg_zero_init": 0, "fresca": False,
    "fresca_low": 1.0, "fresca_high": 1.25, "fresca_cutoff": 20, "apg": False, "apg_momentum": -0.75,
    "apg_limit": 55.0, "apg_parallel": 0.0, "guidance_rescale": 0.0, "nag_scale": 0.0, "nag_tau": 2.5,
    "nag_alpha": 0.25, "skip_layers": None, "skip_layers_interval": "0.1-1", "enhance_video": 0.0,
    "enhance_video_interval": "0-1",
}  # fmt: skip
"""What the original code does when nothing is asked for (`offload_model` is an argument of its `generate`)."""


DATA = Path(__file__).parents[1] / "data"
EXAMPLES = {
    "lora": str(DATA / "lora-tiny.safetensors"), "cache_table": str(DATA / "cache-tiny.json"),
    "cfg_interval": "0-0.5", "guidance_rescale": 0.7, "cfg_zero_init": 1, "nag_scale": 11.0,
    "skip_layers": "1", "enhance_video": 2.0,
}  # fmt: skip
"""For options whose values cannot be listed, one that fits the tiny checkpoint."""
NEEDS = {"cache": {"cache_table": EXAMPLES["cache_table"]}}
"""What a switch cannot do without on a checkpoint that nobody has measured."""


def values(o: Option) -> list[Any]:
    """Values of `o` other than its default."""
    if o.name in EXAMPLES:
        return [EXAMPLES[o.name]]
    found = o.choices or ((True, False) if o.is_switch else ())
    return [value for value in found if value != o.default]


def settings(cls: type[Optimization]) -> list[Settings]:
    """Every way to set one option of `cls` off its default, switched on where that option is not the switch."""
    switch, *others = options_of(cls)
    found = [{switch.name: value, **NEEDS.get(switch.name, {})} for value in values(switch)]
    on = found[0]
    return found + [on | {o.name: value} for o in others for value in values(o)]


MODES = {"compile_mode"}
"""Differ in code generation alone, which these tests leave out."""

ALL = [(cls, chosen) for cls in registry() for chosen in settings(cls) if not chosen.keys() & MODES]
IDS = [" ".join(f"{name}={value}" for name, value in chosen.items()) for _, chosen in ALL]


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without a C++ compiler's half minute; put back what options change for the whole process."""
    monkeypatch.setattr(Compile, "backend", "eager")
    limit = torch._dynamo.config.recompile_limit
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def generate(tiny_checkpoint: Path, tiny_config: Any) -> Generate:
    return lambda chosen, times=1: generated(tiny_checkpoint, tiny_config, chosen, times)


def generated(checkpoint: Path, config: Any, chosen: Settings, times: int = 1) -> Tensor:
    """Final latents of `times` equal calls of one pipeline with these options, stacked."""
    found: list[Tensor] = []
    pipe = wan.WanT2V(config, checkpoint, device="cpu", **chosen)
    for _ in range(times):
        last: list[Tensor] = []
        run = pipe.run

        def observed(request: Any, _run: Any = run, _last: list[Tensor] = last, **named: Any) -> Tensor | None:
            return _run(request, observe=(lambda step, latents: _last.append(latents.clone()),), **named)

        pipe.run = observed  # type: ignore[method-assign]
        pipe.generate(
            "a red bird", (32, 32), 1, shift=12.0, sampling_steps=2, guide_scale=4.0, seed=1,
            offload_model=chosen.get("offload_model"),
        )  # fmt: skip
        pipe.run = run  # type: ignore[method-assign]
        found.append(last[-1])
    return torch.stack(found)


def generated_or_refused(generate: Generate, chosen: Settings, times: int = 1) -> Tensor:
    try:
        return generate(chosen, times)
    except (UnsupportedHardware, MissingPackage) as refusal:
        assert "\n" not in str(refusal)
        pytest.skip(f"refused: {refusal}")


_plain: list[Tensor] = []


def plain_latents(generate: Generate) -> Tensor:
    """What every optimisation is compared with; made once."""
    if not _plain:
        _plain.append(generate({})[0])
    return _plain[0]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_every_default_is_upstreams_behaviour() -> None:
    assert {o.name: o.default for o in options(registry())} == UPSTREAM
    assert not list(Plan.of(registry(), {}).enabled())


@pytest.mark.parametrize(("cls", "chosen"), ALL, ids=IDS)
def test_result_is_within_the_stated_tolerance_of_plain_twice_in_a_row(
    generate: Generate, cls: type[Optimization], chosen: Settings
) -> None:
    """Relative L2 distance of the latents after two steps; bitwise means not one bit. The second call equals the
    first: whatever an optimisation keeps, it does not leak from one video into the next."""
    first, second = generated_or_refused(generate, chosen, times=2)
    plain = plain_latents(generate)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    if cls.grade == "bitwise":
        assert torch.equal(first, plain)
    else:
        assert distance(first, plain) <= cls.tolerance


@pytest.mark.parametrize(("cls", "chosen"), ALL, ids=IDS)
def test_settings_switch_the_optimisation_on_or_explicitly_off(cls: type[Optimization], chosen: Settings) -> None:
    plan = Plan.of(registry(), chosen)
    assert [type(o) for o in plan.enabled()] == ([] if chosen == {"offload_model": False} else [cls])


# Placement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae_cpu", [False, True])
@pytest.mark.parametrize("t5_cpu", [False, True])
@pytest.mark.parametrize("offload", [None, False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_placement_options_set_the_policies_whatever_their_order(
    tiny_checkpoint: Path, tiny_config: Any, offload: bool | None, t5_cpu: bool, vae_cpu: bool, order: int
) -> None:
    plan = Plan.of(registry()[::order], {"offload_model": offload, "t5_cpu": t5_cpu, "vae_cpu": vae_cpu})
    placement = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", optimizations=plan).engine.placement
    experts = Policy.AFTER_USE if offload else Policy.RESIDENT
    assert {name: placement.policy(name) for name in ("high", "low", "text_encoder", "vae")} == {
        "high": experts,
        "low": experts,
        "text_encoder": Policy.ON_CPU if t5_cpu else experts,
        "vae": Policy.AFTER_USE if vae_cpu else Policy.RESIDENT,
    }


# Batched guidance --------------------------------------------------------------------------------------------------


class Counting:
    """A model that notes the branches of each forward and answers with the mean of each branch's text."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.conditions: list[Condition] = []

    def velocity(
        self, latents: Tensor, timestep: Tensor, condition: Condition, step: Step | None, branches: tuple[str, ...]
    ) -> Tensor:
        self.calls.append(branches)
        self.conditions.append(condition)
        assert latents.shape[0] == timestep.shape[0] == condition.context.shape[0] == len(branches)
        return latents * condition.context.mean(dim=(1, 2))[:, None, None, None, None]


def alone(latents: Tensor, step: Step, branches: Any) -> dict[str, Tensor]:
    return {name: latents * branch.context.mean() for name, branch in branches.items()}


def test_branches_of_equal_shapes_run_together_and_others_alone() -> None:
    step = Step(index=0, count=1, t=999.0, sigma=1.0, sigma_next=0.0)
    branches = {
        "uncond": Condition(context=torch.full((1, 4, 2), 1.0)),
        "audio": Condition(context=torch.full((1, 3, 2), 2.0)),
        "cond": Condition(context=torch.full((1, 4, 2), 3.0)),
        "image": Condition(context=torch.full((1, 4, 2), 4.0), channels=torch.zeros(1, 2, 1, 1, 1)),
    }
    model = Counting()
    denoiser = batched(alone, model, Segment("dit", (step,)))  # type: ignore[arg-type]
    latents = torch.randn(1, 2, 1, 2, 2)
    for _ in range(2):
        found = denoiser(latents, step, branches)
    assert list(found) == list(branches)
    for name, branch in branches.items():
        torch.testing.assert_close(found[name], latents * branch.context.mean())
    assert model.calls == [("uncond", "cond")] * 2
    assert model.conditions[0] is model.conditions[1]  # so that text embeddings are computed once a segment


# Precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "matrix", "norm"),
    [
        ({}, torch.bfloat16, torch.float32),
        ({"convert_model_dtype": True}, torch.bfloat16, torch.bfloat16),
        ({"param_dtype": "float32"}, torch.float32, torch.float32),
        ({"param_dtype": "float16"}, torch.float16, torch.float32),
        ({"param_dtype": "float16", "convert_model_dtype": True}, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_precision_decides_how_the_dit_is_stored(
    tiny_checkpoint: Path, tiny_config: Any, chosen: Settings, matrix: torch.dtype, norm: torch.dtype
) -> None:
    tiny_config.param_dtype = torch.bfloat16
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **chosen)
    block = pipe.low_noise_model.blocks[0]
    assert block.ffn[0].weight.dtype is matrix
    assert {block.norm3.weight.dtype, block.modulation.dtype, pipe.low_noise_model.head.head.weight.dtype} == {norm}
    assert next(pipe.vae.model.parameters()).dtype is torch.float32


# TF32 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "matmul", "convolution"), [(True, True, True), (False, False, False), (None, 0, 1)])
def test_tf32_is_on_or_off_or_left_alone(
    tiny_checkpoint: Path, tiny_config: Any, value: bool | None, matmul: bool, convolution: bool
) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", tf32=value)
    now = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert now == (matmul, convolution)


# Attention ---------------------------------------------------------------------------------------------------------


def test_automatic_attention_says_what_it_chose(
    tiny_checkpoint: Path, tiny_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", attention="auto")
    with caplog.at_level(logging.INFO):
        block = pipe.low_noise_model.blocks[0]
    assert block.self_attn.attend is sdpa
    assert "attention of low: sdpa" in caplog.text


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_a_backend_this_machine_lacks_is_refused_before_anything_is_read(tiny_config: Any, name: str) -> None:
    old = Hardware(device=torch.device("cuda", 0), name="GTX 1080", sm=(6, 1), total_memory=1, free_memory=1)
    with pytest.raises(WanError, match=name) as caught:
        Plan.of(registry(), {"attention": name}).check(old)
    assert "\n" not in str(caught.value)


# VAE tiling --------------------------------------------------------------------------------------------------------


def test_vae_tiling_decodes_the_same_latents_in_tiles_for_one_call_or_all(
    tiny_checkpoint: Path, tiny_config: Any
) -> None:
    tiles = {"vae_tile": 6, "vae_tile_overlap": 2}
    call: Settings = {"size": (64, 48), "frame_num": 5, "sampling_steps": 1, "seed": 1, "offload_model": None}
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", vae_tiling=True, **tiles)
    tiled = pipe.generate("a red bird", **call)
    latents: list[Tensor] = []
    run = pipe.run
    pipe.run = lambda request, **named: run(request, observe=(lambda step, x: latents.append(x),), **named)  # type: ignore[method-assign]
    whole = pipe.generate("a red bird", vae_tiling=False, **call)
    for video, tiling in ((tiled, Tiling(tile=6, overlap=2)), (whole, None)):
        chunks = pipe.vae.model.decode_chunks(latents[-1], frames_per_chunk=None, tiling=tiling)
        assert torch.equal(video, torch.cat(list(chunks), dim=2)[0].clamp(-1, 1))
    assert not torch.equal(tiled, whole)


# Compile -----------------------------------------------------------------------------------------------------------


def test_compile_touches_blocks_only_and_all_of_them(tiny_checkpoint: Path, tiny_config: Any) -> None:
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", compile=True)
    for dit in (pipe.high_noise_model, pipe.low_noise_model):
        compiled = {name for name, module in dit.named_modules() if module._compiled_call_impl is not None}
        assert compiled == {"blocks.0", "blocks.1"}
    assert pipe.vae.model._compiled_call_impl is None
    assert pipe.text_encoder.model._compiled_call_impl is None


def test_blocks_of_both_experts_share_one_compilation_per_size(generate: Generate) -> None:
    """Four blocks, two experts, two steps and two branches: one graph, or a new size would cost minutes."""
    torch._dynamo.utils.counters.clear()
    generate({"compile": True})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compile_refuses_machines_it_cannot_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compile, "backend", "inductor")
    old = Hardware(device=torch.device("cuda", 0), name="GTX 1080", sm=(6, 1), total_memory=1, free_memory=1)
    with pytest.raises(UnsupportedHardware, match="--compile needs sm_70.*GTX 1080.*--no-compile"):
        Plan.of(registry(), {"compile": True}).check(old)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match=r"C\+\+ compiler"):
        Plan.of(registry(), {"compile": True}).check(Hardware(device=torch.device("cpu"), name="CPU"))
