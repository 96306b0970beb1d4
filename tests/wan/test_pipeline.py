"""Text to video from end to end: upstream's numbers, experts switched once, options that change nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan
from wan.engine.errors import BadCheckpoint, BadRequest, IncompatibleOptions, NonFinite

SMALL: dict[str, Any] = {
    "size": (64, 48), "frame_num": 5, "shift": 12.0, "sampling_steps": 4, "guide_scale": (3.0, 4.0), "seed": 42,
}  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def pipe(tiny_checkpoint: Path, tiny_config: Any) -> wan.WanT2V:
    return wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")


def recorded(pipe: wan.WanT2V, **arguments: Any) -> tuple[Tensor, list[Any], Tensor]:
    """Video, steps and final latents of one run."""
    steps: list[Any] = []
    latents: list[Tensor] = []
    run = pipe.run

    def with_observer(request: Any, **options: Any) -> Tensor | None:
        return run(request, observe=(lambda step, x: (steps.append(step), latents.append(x.clone())),), **options)  # type: ignore[arg-type,return-value]

    pipe.run = with_observer  # type: ignore[method-assign]
    try:
        video = pipe.generate("a red bird", **(SMALL | arguments))
    finally:
        pipe.run = run  # type: ignore[method-assign]
    assert video is not None
    return video, steps, latents[-1][0]


def test_same_seed_gives_upstreams_latents_and_video(golden: Path, tiny_config: Any) -> None:
    """Bound 5e-5 relative: upstream computes attention and the VAE in another summation order."""
    expected = load_file(golden / "e2e_t2v-A14B.safetensors")
    tiny_config.update(text_len=512, sample_neg_prompt="low quality , static frame , blurry hands")
    pipe = wan.WanT2V(tiny_config, golden / "t2v-A14B", device_id=0, rank=0, device="cpu")
    prompt = "a white cat walks on the beach &amp; looks   at the camera"
    steps: list[Any] = []
    latents: list[Tensor] = []
    run = pipe.run
    pipe.run = lambda request, **options: run(  # type: ignore[method-assign]
        request,
        observe=(lambda step, x: (steps.append(step), latents.append(x)),),
        **options,  # type: ignore[arg-type,return-value]
    )
    video = pipe.generate(
        prompt, size=(64, 48), frame_num=5, shift=12.0, sample_solver="unipc", sampling_steps=4, guide_scale=(3.0, 4.0),
        seed=42, offload_model=True,
    )  # fmt: skip
    assert video is not None
    assert [(step.t, step.expert) for step in steps] == [(999, "high"), (972, "high"), (922, "high"), (799, "low")]
    assert relative(latents[-1][0], expected["latents.0"]) < 5e-5
    assert relative(video, expected["video"]) < 5e-5


def test_video_has_the_size_asked_for_and_lies_in_range(pipe: wan.WanT2V) -> None:
    video, _, _ = recorded(pipe)
    assert video.shape == (3, 5, 48, 64)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    assert not video.is_inference()


def test_experts_switch_once_at_the_boundary(pipe: wan.WanT2V) -> None:
    _, steps, _ = recorded(pipe, sampling_steps=8)
    names = [step.expert for step in steps]
    assert names == sorted(names)  # "high" before "low", one switch
    assert all((step.t >= 875) == (step.expert == "high") for step in steps)


def test_second_run_with_the_same_seed_is_bitwise_equal(pipe: wan.WanT2V) -> None:
    first, _, _ = recorded(pipe)
    other, _, _ = recorded(pipe, seed=43)
    second, _, _ = recorded(pipe)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"t5_cpu": True}, {"vae_cpu": True}, {"offload_model": False}])
def test_placement_options_change_no_bit(
    pipe: wan.WanT2V, tiny_checkpoint: Path, tiny_config: Any, options: dict[str, Any]
) -> None:
    plain, _, _ = recorded(pipe)
    build = {name: value for name, value in options.items() if name != "offload_model"}
    call = {name: value for name, value in options.items() if name == "offload_model"}
    placed = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **build)
    assert torch.equal(recorded(placed, **call)[0], plain)


def test_batched_guidance_equals_sequential(pipe: wan.WanT2V) -> None:
    """Rounding grade: the same sums over another batch, so 1e-4 relative after four steps in float32."""
    _, _, plain = recorded(pipe)
    _, _, batched = recorded(pipe, use_batched_cfg=True)
    assert relative(batched, plain) < 1e-4


def test_guidance_one_needs_a_single_forward(pipe: wan.WanT2V) -> None:
    calls: list[tuple[str, ...]] = []
    for name in ("high", "low"):
        dit = pipe.engine.network(name)
        inner: Callable[..., Tensor] = dit.velocity  # type: ignore[assignment]

        def counted(*arguments: Any, _inner: Callable[..., Tensor] = inner, **named: Any) -> Tensor:
            calls.append(arguments[-1])
            return _inner(*arguments, **named)

        dit.velocity = counted
    recorded(pipe, guide_scale=1.0)
    assert calls == [("cond",)] * 4


def test_upstreams_attributes_are_there(pipe: wan.WanT2V) -> None:
    assert pipe.vae.decode([torch.zeros(16, 1, 4, 4)])[0].shape == (3, 1, 32, 32)
    assert pipe.text_encoder(["a cat"], torch.device("cpu"))[0].ndim == 2
    assert pipe.text_encoder.model is pipe.engine.network("text_encoder")
    assert type(pipe.high_noise_model).__name__ == type(pipe.low_noise_model).__name__ == "WanModel"
    assert pipe.boundary == 0.875
    assert pipe.num_train_timesteps == 1000


def test_replaced_network_is_used(pipe: wan.WanT2V) -> None:
    before, _, _ = recorded(pipe)
    pipe.low_noise_model = pipe.high_noise_model
    after, _, _ = recorded(pipe)
    assert not torch.equal(before, after)


def test_broken_latents_stop_the_run_and_name_the_step(pipe: wan.WanT2V) -> None:
    with torch.no_grad():
        pipe.low_noise_model.head.head.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(NonFinite, match=r"step 4 of 4.*'low'"):
        recorded(pipe)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": (65, 48)}, "64"),
        ({"frame_num": 6}, "5"),
        ({"sample_solver": "ddim"}, "unipc"),
        ({"sampling_steps": 0}, "at least 1"),
        ({"shift": 0.0}, "greater than 0"),
    ],
)
def test_impossible_request_is_refused_before_loading(pipe: wan.WanT2V, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        pipe.generate("a cat", **(SMALL | arguments))
    assert not pipe.engine.placement.loaded()


def test_unknown_option_is_refused_by_name(tiny_checkpoint: Path, tiny_config: Any, pipe: wan.WanT2V) -> None:
    with pytest.raises(IncompatibleOptions, match="use_bathced_cfg"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", use_bathced_cfg=True)
    with pytest.raises(IncompatibleOptions, match="use_bathced_cfg"):
        pipe.generate("a cat", **SMALL, use_bathced_cfg=True)


def test_load_time_option_is_refused_for_one_call(pipe: wan.WanT2V) -> None:
    with pytest.raises(IncompatibleOptions, match="constructor"):
        pipe.generate("a cat", **SMALL, convert_model_dtype=True)


def test_incomplete_folder_is_named_in_the_constructor(tiny_config: Any, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="does not exist"):
        wan.WanT2V(tiny_config, tmp_path / "nowhere", device="cpu")
    with pytest.raises(BadCheckpoint, match="models_t5"):
        wan.WanT2V(tiny_config, tmp_path, device="cpu")


def test_optimized_class_gives_the_same_video(pipe: wan.WanT2V, tiny_checkpoint: Path, tiny_config: Any) -> None:
    """TF32 and compile are off on a CPU by default, so not a bit may differ."""
    plain, _, _ = recorded(pipe)
    fast = wan.WanT2VOptimized(tiny_config, tiny_checkpoint, device="cpu", enable_tf32=False)
    assert torch.equal(recorded(fast)[0], plain)


def test_noise_drawn_on_the_cpu_is_the_same_noise(pipe: wan.WanT2V) -> None:
    plain, _, _ = recorded(pipe)
    named, _, _ = recorded(pipe, noise_device="cpu")
    assert torch.equal(plain, named)


def test_dummy_weights_need_no_checkpoint_and_have_the_tasks_sizes() -> None:
    from wan.configs import WAN_CONFIGS

    pipe = wan.WanT2V(WAN_CONFIGS["t2v-demo"], None, device="cpu", load_format="dummy")
    video = pipe.generate("a cat", size=(32, 32), frame_num=5, sampling_steps=2, guide_scale=3.0, seed=1)
    assert video is not None and video.shape == (3, 5, 32, 32)
    assert video.isfinite().all()
    assert pipe.high_noise_model.dim == WAN_CONFIGS["t2v-demo"].dim


def test_task_with_longer_text_than_the_checkpoint_is_refused_early(tiny_checkpoint: Path, tiny_config: Any) -> None:
    tiny_config.update(text_len=1024)
    with pytest.raises(BadCheckpoint, match="has text_len"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("options", [{}, {"cache": "easy", "use_batched_cfg": True}, {"block_swap": 1}], ids=str)
def test_a_pipeline_that_is_let_go_frees_its_networks_at_once(
    tiny_checkpoint: Path, tiny_config: Any, options: dict[str, Any]
) -> None:
    """Without waiting for the garbage collector, so that another model can come in its place."""
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options)
    pipe.generate("a red bird", (32, 32), 1, sampling_steps=2, seed=1, offload_model=None)
    kept = [weakref.ref(network) for network in pipe.engine.placement.loaded().values()]
    gc.collect()  # of what was there before
    gc.disable()
    try:
        del pipe
        assert len(kept) == 4 and all(network() is None for network in kept)
    finally:
        gc.enable()
