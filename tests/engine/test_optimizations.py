"""Every registered optimisation keeps its promise on a tiny checkpoint, through the real engine.

A new optimisation is tested here without a line being added: its settings are read from its options. On the CPU a
placement moves nothing, so what placements do is tested as policies here and as moves in test_placement.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.compiling import Compiled
from wan.engine.errors import MissingPackage, UnsupportedHardware, WanError
from wan.engine.hardware import Hardware
from wan.engine.ops.attention import BACKENDS, sdpa
from wan.engine.optimizations import registry
from wan.engine.optimizations.batched_cfg import batched
from wan.engine.options import Option, options_of
from wan.engine.placement import Policy
from wan.engine.plan import Optimization, Plan, options
from wan.engine.types import Condition, Segment, Step, Tiling

Settings = dict[str, Any]
CPU = Hardware(device=torch.device("cpu"), name="CPU")
Generate = Callable[..., Tensor]

UPSTREAM: Settings = {
    "tf32": None, "bf16_reduced_precision": None, "convert_model_dtype": False, "param_dtype": None,
    "residual_dtype": "float32",
    "attention": "sdpa", "kernels": "torch", "compile": False,
    "compile_mode": "default", "cuda_graphs": None,
    "compile_dynamic": None, "cudnn_benchmark": False, "deterministic": False, "lora": (),
    "lora_high": (), "lora_low": (), "lora_mode": "auto", "lora_timing": False,
    "use_batched_cfg": False, "lockstep_cfg": False, "share_first_block": False, "keep_text_keys": False,
    "fuse_qkv": False,
    "offload_model": None, "t5_cpu": False, "vae_cpu": False,
    "vae_dtype": "fp32", "vae_tiling": False, "vae_tile_size": 32, "vae_tile_overlap": 8, "vae_tile_park": True,
    "vae_channels_last": False, "vae_subpixel": False, "vae_matmul_attention": False, "vae_frames_per_call": 0,
    "vae_compile": False,
    "cache": "off", "cache_threshold": None, "cache_max_skips": None, "cache_retain": None, "cache_signal": "e",
    "cache_table": None, "cfg_interval": None, "cfg_zero_star": False, "cfg_zero_init": 0, "fresca": False,
    "fresca_low": 1.0, "fresca_high": 1.25, "fresca_cutoff": 20, "apg": False, "apg_momentum": -0.75,
    "apg_limit": 55.0, "apg_parallel": 0.0, "guidance_rescale": 0.0, "nag_scale": 0.0, "nag_tau": 2.5,
    "nag_alpha": 0.25, "skip_layers": None, "skip_layers_interval": "0.1-1", "enhance_video": 0.0,
    "enhance_video_interval": "0-1", "context_frames": 0, "context_overlap": 16, "context_schedule": "uniform",
    "context_fuse": "linear", "freenoise": True, "riflex": 0, "few_step": None, "few_step_distilled": False,
    "fp8": "off", "fp8_keep": None, "t5_fp8": False,
    "block_swap": 0, "prefetch_blocks": 1, "stream_t5": False,
    "ffn_rows": 0, "attention_rows": 0,
}  # fmt: skip
"""What the original code does when nothing is asked for (`offload_model` is an argument of its `generate`)."""


DATA = Path(__file__).parents[1] / "data"
EXAMPLES = {
    **dict.fromkeys(("lora", "lora_high", "lora_low"), (str(DATA / "lora-tiny.safetensors"),)),
    "cache_table": str(DATA / "cache-tiny.json"),
    "cfg_interval": "0-0.5", "guidance_rescale": 0.7, "cfg_zero_init": 1, "nag_scale": 11.0,
    "skip_layers": "1", "enhance_video": 2.0, "context_frames": 81, "riflex": 2, "block_swap": 2, "prefetch_blocks": 0,
    "ffn_rows": 3, "attention_rows": 3, "vae_frames_per_call": 2,
    "fp8_keep": "blocks.0.*", "few_step": "fastwan-3step",
}  # fmt: skip
"""For options whose values cannot be listed, one that fits the tiny checkpoint."""
NEEDS = {"cache": {"cache_table": EXAMPLES["cache_table"]}, "few_step": {"few_step_distilled": True}}
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


SAYING_OFF: tuple[Settings, ...] = ({"offload_model": False}, {"fp8": "auto"})
"""Values other than the default that switch nothing on; "auto" leaves it to a memory budget."""
MODES = {"compile_mode"}
"""Differ in code generation alone, which these tests leave out."""

ALL = [(cls, chosen) for cls in registry() for chosen in settings(cls) if not chosen.keys() & MODES]
IDS = [" ".join(f"{name}={value}" for name, value in chosen.items()) for _, chosen in ALL]


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without a C++ compiler's half minute; what options change for the whole process is put back by them."""
    monkeypatch.setattr(Compiled, "backend", "eager")
    before = process()
    yield
    assert process() == before


def process() -> Settings:
    """Switches of the whole process that options hold during a run."""
    import torch._inductor.config as inductor

    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "convolution": torch.backends.cudnn.allow_tf32,
        "sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "strict": torch.are_deterministic_algorithms_enabled(),
        "compiler": inductor.deterministic,
        "recompile_limit": torch._dynamo.config.recompile_limit,
    }


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
    assert [type(o) for o in plan.enabled()] == ([] if chosen in SAYING_OFF else [cls])


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
        assert latents.shape[0] == condition.context.shape[0] == len(branches) and len(timestep) == 1
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


# Numerics ----------------------------------------------------------------------------------------------------------

REPEATABLE = {"cudnn": True, "strict": True, "compiler": True}


@pytest.mark.parametrize(
    ("chosen", "during"),
    [
        ({}, {}),
        ({"tf32": True}, {"matmul": True}),
        ({"tf32": False}, {"convolution": False}),
        ({"cudnn_benchmark": True}, {"benchmark": True}),
        ({"deterministic": True}, REPEATABLE),
        ({"deterministic": True, "tf32": True, "compile": True}, REPEATABLE | {"matmul": True, "recompile_limit": 64}),
    ],
    ids=str,
)
@pytest.mark.parametrize("fails", [False, True])
def test_switches_of_the_process_hold_during_a_run_only(
    tiny_checkpoint: Path, tiny_config: Any, chosen: Settings, during: Settings, fails: bool
) -> None:
    pipe, before, found = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **chosen), process(), []

    def look(step: Step, latents: Tensor) -> None:
        found.append(process())
        if fails:
            raise KeyError

    with pytest.raises(KeyError) if fails else nullcontext():
        pipe.generate(
            "a red bird", (32, 32), 1, sampling_steps=1, seed=1, offload_model=None, guide_scale=1.0, observe=(look,)
        )
    assert found == [before | during]
    assert process() == before


def test_deterministic_refuses_what_is_chosen_by_timing_and_workspaces_that_do_not_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Hardware(device=torch.device("cuda", 0), name="H100", sm=(9, 0), total_memory=1, free_memory=1)
    with pytest.raises(WanError, match="--cudnn_benchmark and --deterministic do not go together"):
        Plan.of(registry(), {"deterministic": True, "cudnn_benchmark": True}).check(CPU)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(WanError, match="--deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or .* ':0:0'"):
        Plan.of(registry(), {"deterministic": True}).check(card)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    Plan.of(registry(), {"deterministic": True}).check(CPU)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    Plan.of(registry(), {"deterministic": True}).check(card)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


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
    tiles = {"vae_tile_size": 6, "vae_tile_overlap": 2}
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


def test_nothing_is_compiled_twice_and_two_compilations_serve_all_sizes(
    tiny_checkpoint: Path, tiny_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Four blocks, two experts, two branches: one graph a size at first, none for another text, seed or expert, and
    from the second size on one for all; it is told once each time."""
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", compile=True)
    shared: Settings = {"shift": 12.0, "sampling_steps": 2, "guide_scale": 4.0, "offload_model": None}
    with caplog.at_level(logging.INFO):
        for number, size in enumerate([(32, 32), (32, 32), (48, 32), (64, 48), (48, 64)]):
            pipe.generate(f"{number} red birds" + " sing" * number, size, 1, seed=number, **shared)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 2, 2]
    assert not counters["graph_break"]
    assert [line[:9] for line in caplog.messages if "compile" in line] == ["compile: "] * 2


@pytest.mark.parametrize(("dynamic", "expected"), [(True, [1, 1, 1]), (False, [1, 2, 3])])
def test_sizes_share_code_at_once_or_never_if_asked(
    tiny_checkpoint: Path, tiny_config: Any, dynamic: bool, expected: list[int]
) -> None:
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", compile=True, compile_dynamic=dynamic)
    for size in [(32, 32), (48, 32), (64, 48)]:
        pipe.generate("a red bird", size, 1, sampling_steps=1, guide_scale=1.0, seed=1, offload_model=None)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == expected


@pytest.mark.parametrize(("entry", "origin"), [("hit", "from the cache"), ("miss", "cold")])
def test_seconds_of_compiling_are_told_with_their_origin(
    tiny_checkpoint: Path, tiny_config: Any, caplog: pytest.LogCaptureFixture, entry: str, origin: str
) -> None:
    """The compiler stands in for itself: what inductor counts when it looks into its cache is counted here."""

    def looks_up(graph: Any, example_inputs: Any) -> Any:
        torch._dynamo.utils.counters["inductor"][f"fxgraph_cache_{entry}"] += 1
        return graph.forward

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(Compiled, "backend", staticmethod(looks_up))
        pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", compile=True)
        pipe.generate("a red bird", (32, 32), 1, sampling_steps=1, guide_scale=1.0, seed=1, offload_model=None)
    (told,) = (line for line in caplog.messages if line.startswith("compile: "))
    assert told.endswith(f" s {origin}")
    assert pipe.report.compile_seconds > 0


def test_compile_refuses_machines_it_cannot_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "backend", "inductor")
    old = Hardware(device=torch.device("cuda", 0), name="GTX 1080", sm=(6, 1), total_memory=1, free_memory=1)
    with pytest.raises(UnsupportedHardware, match="--compile needs sm_70.*GTX 1080.*--no-compile"):
        Plan.of(registry(), {"compile": True}).check(old)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match=r"C\+\+ compiler"):
        Plan.of(registry(), {"compile": True}).check(CPU)
