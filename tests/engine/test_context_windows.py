"""Long videos on a tiny model: what the model is shown, how much of it, and when nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.components import dummy_components
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadRequest
from wan.engine.live_bytes import peak_live_bytes
from wan.engine.ops.rope import axis_table, bands, grid_table
from wan.engine.optimizations import ContextWindows
from wan.engine.optimizations.riflex import slowed_table
from wan.engine.prediction import SOLVED, Video, predict
from wan.engine.roofline import CARDS
from wan.engine.types import Condition, Denoiser, Shot, Step
from wan.modules.model import WanModel
from wan.sizes import models_of

CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 33, "sampling_steps": 3, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "offload_model": None,
}  # fmt: skip
WINDOWS: dict[str, Any] = {"context_frames": 13, "context_overlap": 4}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu")


def watched(pipe: Any, prompt: str = "a red bird", **options: Any) -> tuple[Tensor, list[tuple[int, float]]]:
    """The video, and (tokens, mean of the text) of every conditional forward of the high-noise expert."""
    seen: list[tuple[int, float]] = []
    dit = pipe.engine.network("high")

    def watching(tokens: Tensor, inputs: Any, condition: Any, step: Any) -> Tensor:
        if "cond" in inputs.branches:
            seen.append((tokens.shape[1], float(condition.context[-1].float().abs().sum())))
        return dit.plain_trunk(tokens, inputs, condition, step)  # type: ignore[no-any-return]

    dit.trunk = watching
    try:
        return pipe.generate(prompt, **(CALL | options)), seen
    finally:
        dit.trunk = dit.plain_trunk


@pytest.mark.parametrize("schedule", ["uniform", "looped", "static"])
def test_a_long_video_has_its_length_and_no_forward_sees_more_than_a_window(pipe: Any, schedule: str) -> None:
    video, seen = watched(pipe, **WINDOWS, context_schedule=schedule)
    assert video.shape[1] == 33 and torch.isfinite(video).all()
    assert {tokens for tokens, _ in seen} == {4 * 2 * 2} and len(seen) > 1
    assert pipe.report.forwards[-1].describe().count("cond") == 4, "a step's windows are one forward of the plan"


def test_a_forward_costs_the_same_from_81_to_1025_frames() -> None:
    """Counted on the meta device at the widths of A14B, 832x480, one block of forty: no forward sees more tokens than
    81 frames have, and what is alive at the peak grows by what a video of that length itself is. Beside an expert's
    weights that is less than 5 %.
    """
    with torch.device("meta"):
        dit = WanModel(dim=5120, ffn_dim=13824, freq_dim=256, num_heads=40, num_layers=1).bfloat16()
        text = Condition(context=torch.empty(1, 512, 4096, dtype=torch.bfloat16))
    step, seen = Step(0, 1, 500.0, 0.5, 0.0), set[tuple[int, ...]]()

    def peak(frames: int, schedule: Any) -> int:
        def inner(latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
            seen.add(tuple(latents.shape))
            if step.window and step.window[-1] != frames // 4:  # the last one is computed, with the others' beside it
                return {name: torch.empty_like(latents) for name in branches}
            t = torch.full((1,), step.t, device="meta")
            return {name: dit.velocity(latents, t, branch, step) for name, branch in branches.items()}

        latents = torch.empty(1, 16, frames // 4 + 1, 60, 104, device="meta")
        windowed = through_windows(inner, schedule)
        return peak_live_bytes(lambda: windowed(latents, step, {"cond": text, "uncond": text}))

    models = models_of(dummy_components(WAN_CONFIGS["t2v-A14B"]))
    short = peak(81, "uniform")
    for schedule, frames in (("uniform", 1025), ("looped", 161), ("static", 161)):
        video = 4 * 16 * (frames // 4 + 1) * 60 * 104
        grown = peak(frames, schedule) - short
        assert grown < 2.1 * video, "two branches"
        assert grown + SOLVED * video < 0.05 * (short + models.transformer.num_bytes)
    assert seen == {(1, 16, 21, 60, 104)}
    predicted = [
        predict(models, Video(width=832, height=480, frames=frames, window=81, overlap=16), CARDS[0], {})
        for frames in (81, 1025)
    ]
    on_card = [sum(each.phases["denoise"].values()) for each in predicted]
    assert on_card[0] < on_card[1] < 1.05 * on_card[0]
    assert predicted[1].seconds_per_step == pytest.approx(16 * predicted[0].seconds_per_step)


def through_windows(inner: Denoiser, schedule: Any) -> Denoiser:
    """A denoiser as a run with windows of 81 frames has it."""
    made: dict[str, Any] = {}
    engine = SimpleNamespace(
        split_prompts=lambda split: None,
        change_noise=lambda change: None,
        wrap_segment=lambda wrapper: made.update(segment=wrapper),
        wrap_denoiser=lambda factory: made.update(wrap=factory),
    )
    ContextWindows(context_frames=81, context_schedule=schedule).apply(engine)  # type: ignore[arg-type]
    run = SimpleNamespace(scenes=(), branches={}, shot=Shot(latent_shape=(16, 0, 60, 104)))

    def denoise(latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        run.branches = dict(branches)
        with made["segment"](None, run):
            found: dict[str, Tensor] = made["wrap"](inner, None, None)(latents, step, branches)
        return found

    return denoise


def test_a_video_of_one_window_is_the_plain_video_bit_for_bit(pipe: Any) -> None:
    plain = pipe.generate("a red bird", **CALL)
    assert torch.equal(pipe.generate("a red bird", **CALL, context_frames=33), plain)
    assert torch.equal(pipe.generate("a red bird", **CALL, context_frames=81), plain)


def test_batched_guidance_and_step_caches_work_in_windows(pipe: Any) -> None:
    for schedule in ("static", "uniform"):
        options = {**WINDOWS, "context_schedule": schedule}
        video = pipe.generate("a red bird", **CALL, **options)
        batched = pipe.generate("a red bird", **CALL, **options, use_batched_cfg=True)
        assert (batched - video).abs().max() < 1e-4
        assert torch.equal(pipe.generate("a red bird", **CALL, **options, cache="easy", cache_threshold=0.0), video)


def test_a_step_cache_skips_in_windows_that_stay_and_is_told_to_where_they_move(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = {**WINDOWS, "cache": "mag", "cache_table": "Wan2.2-T2V-A14B", "cache_threshold": 1e9, "cache_retain": 0.0}
    options |= {"cache_max_skips": 99, "sampling_steps": 8}
    ran = {}
    for schedule in ("static", "uniform"):
        caplog.clear()
        ran[schedule] = len(watched(pipe, **options, context_schedule=schedule)[1])
        assert ("--cache mag finds few windows again" in caplog.text) == (schedule == "uniform")
    assert ran["static"] == 3 < ran["uniform"], "each of the three windows once"


def test_parts_of_a_prompt_follow_each_other(pipe: Any) -> None:
    _, whole = watched(pipe, "a red bird", **WINDOWS, context_schedule="static")
    _, parts = watched(pipe, "a red bird | a fish in the sea", **WINDOWS, context_schedule="static")
    texts = [text for _, text in parts]
    assert texts[0] == whole[0][1] != texts[-1] and len(parts) == len(whole)


def test_noise_of_its_own_is_kept_on_request(pipe: Any) -> None:
    first = pipe.generate("a red bird", **CALL, **WINDOWS)
    assert not torch.equal(pipe.generate("a red bird", **CALL, **WINDOWS, freenoise=False), first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context_frames": 12}, "--context_frames 12: give 4n"),
        ({"context_frames": 13, "context_overlap": 9}, "--context_overlap 9: give 0 to 8"),
        ({"riflex": -1}, "--riflex -1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, tiny_config: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequest, match=said):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options)


def test_riflex_slows_one_temporal_frequency_to_less_than_a_turn_and_no_other() -> None:
    grid, width, cpu = (30, 2, 3), 48, torch.device("cpu")
    plain, slowed = grid_table(grid, width, cpu), slowed_table(4, grid, width, cpu)
    differs = (plain != slowed).any(0).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [3]
    turned = torch.atan2(slowed[6, 0, 3, 1], slowed[6, 0, 3, 0])  # frame 1
    assert float(turned) == pytest.approx(0.9 * 2 * torch.pi / 30, rel=1e-5)
    assert torch.equal(axis_table(range(4), bands(width)[0]), axis_table(range(4), bands(width)[0], replaced={}))


def test_riflex_leaves_the_next_video_alone(pipe: Any) -> None:
    plain = pipe.generate("a red bird", **CALL)
    assert not torch.equal(pipe.generate("a red bird", **CALL, riflex=2), plain)
    assert torch.equal(pipe.generate("a red bird", **CALL), plain)
