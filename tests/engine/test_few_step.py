"""`--few_step` on a tiny model of two experts: forwards, experts and LoRAs of each phase, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.plan import Plan
from wan.engine.types import Step
from wan.runs import Run

CPU = Hardware(device=torch.device("cpu"), name="CPU")
LORA = str(Path(__file__).parents[1] / "data" / "lora-tiny.safetensors")
CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 1, "sampling_steps": 10, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "offload_model": None,
}  # fmt: skip


@pytest.fixture
def pipe(tiny_checkpoint: Path, tiny_config: Any) -> Any:
    """LoRAs beside the weights, so that every call may have others."""
    return wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", lora_mode="onthefly")


def recipe(folder: Path, text: str) -> str:
    file = folder / "mine.toml"
    file.write_text(text)
    return str(file)


def forwards(pipe: Any) -> dict[tuple[str, str], int]:
    return dict(pipe.report.forwards[-1].done)


def test_four_forwards_two_of_each_expert_in_place_of_twenty(pipe: Any) -> None:
    told: list[Step] = []
    call = CALL | {"observe": (lambda step, latents: told.append(step),)}
    video = pipe.generate("a red bird", **call, few_step="lightx2v-4step", lora_high=LORA, lora_low=LORA)
    assert torch.isfinite(video).all()
    assert forwards(pipe) == {("high", "cond"): 2, ("low", "cond"): 2}
    assert pipe.report.saved_forwards() == (4, 20)
    assert [step.t for step in told] == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert {step.count for step in told} == {4}


def test_phases_have_their_own_guidance(pipe: Any, tmp_path: Path) -> None:
    text = '[[phase]]\nexpert="high"\nsteps=3\nguidance=3.5\n[[phase]]\nexpert="low"\nsteps=2\n'
    pipe.generate("a red bird", **CALL, few_step=recipe(tmp_path, text))
    assert forwards(pipe) == {("high", "uncond"): 3, ("high", "cond"): 3, ("low", "cond"): 2}
    # Guidance of all phases alike is the plain sampler's, bit by bit.
    text = 'shift=3\n[[phase]]\nsteps=10\nguidance=4\nsolver="unipc"\n'
    assert torch.equal(
        pipe.generate("a red bird", **CALL, few_step=recipe(tmp_path, text)), pipe.generate("a red bird", **CALL)
    )
    assert pipe.report.saved_forwards() is None


def test_phases_have_loras_at_their_own_strengths(pipe: Any, tmp_path: Path) -> None:
    """A factor of 0 is no LoRA, one of 0.5 is a LoRA of half the strength; of two, each has its own."""

    def made(factor: str, *loras: str) -> Any:
        text = f'[[phase]]\nexpert="high"\nsteps=2\n{factor}\n[[phase]]\nexpert="low"\nsteps=2\nlora=0\n'
        return pipe.generate("a red bird", **CALL, few_step=recipe(tmp_path, text), lora=loras)

    def alone(strength: str) -> Any:
        text = '[[phase]]\nexpert="high"\nsteps=2\n[[phase]]\nexpert="low"\nsteps=2\n'
        return pipe.generate("a red bird", **CALL, few_step=recipe(tmp_path, text), lora_high=f"{LORA}:{strength}")

    strong, half = f"{LORA}:40", alone("20")
    torch.testing.assert_close(made("lora=0.5", strong), half, rtol=1e-4, atol=1e-5)  # another order of summation
    torch.testing.assert_close(made("lora=[0.5, 0]", strong, LORA), half, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made("lora=0", strong), alone("0"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half, alone("0"), atol=1e-3)
    with pytest.raises(IncompatibleOptions, match="phase 1: lora has 2 factors, and 1 LoRAs"):
        made("lora=[0.5, 0]", strong)


def test_long_videos_go_through_windows_and_stopped_ones_go_on(pipe: Any, tmp_path: Path) -> None:
    call = CALL | {"frame_num": 25, "few_step": "fastwan-3step", "few_step_distilled": True, "context_frames": 13}
    call["context_overlap"] = 4
    straight = pipe.generate("a red bird", **call)
    assert straight.shape[1] == 25
    assert sum(forwards(pipe).values()) == 3

    def stop(step: Step, latents: Any) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    run = Run(tmp_path / "run", {}, every=1)
    run.begin()
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a red bird", **call, keeper=run, observe=(stop,))
    run.interrupted()
    assert torch.equal(pipe.generate("a red bird", **call, keeper=Run(tmp_path / "run", {})), straight)
    assert pipe.report.saved_forwards() is None  # what ran before is not known


# Before weights are read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"few_step": "lightx2v-4step"}, "pass its LoRA with --lora, or --lora_high and --lora_low .*Distill-Loras"),
        ({"few_step": "lightx2v-4step", "lora_high": LORA}, "or --lora_low of two experts"),
        ({"few_step": "lightx2v-motion", "lora_high": LORA}, "or --lora_low of two experts"),
        ({"few_step": "fastwan-3step"}, "FastWan2.2-TI2V-5B-FullAttn-Diffusers"),
        ({"few_step": "lightx2v"}, "--few_step 'lightx2v' is unknown: use lightx2v-4step, .*FILE.toml"),
        ({"few_step": "nowhere.toml"}, "--few_step 'nowhere.toml' cannot be read"),
        ({"few_step": "causvid-9step", "lora": LORA, "cache": "easy"}, "--few_step and --cache|--cache and --few_step"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_remedy(
    tiny_checkpoint: Path, tiny_config: Any, option: dict[str, Any], said: str
) -> None:
    with pytest.raises((BadRequest, IncompatibleOptions), match=said) as caught:
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **option)
    assert "\n" not in str(caught.value)


def test_a_distilled_checkpoint_needs_no_lora_by_flag_or_by_name(
    tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path
) -> None:
    link = tmp_path / "Wan2.2-T2V-A14B-StepDistill"
    link.symlink_to(tiny_checkpoint)
    told = {"few_step_distilled": True}
    for folder, option in ((tiny_checkpoint, told), (link, {})):
        wan.WanT2V(tiny_config, folder, device="cpu", few_step="lightx2v-4step", **option)


def test_strengths_by_phase_keep_loras_out_of_the_weights(tmp_path: Path) -> None:
    few = recipe(tmp_path, "[[phase]]\nsteps=2\nlora=0\n[[phase]]\nsteps=2\n")
    plan = Plan.of(registry(), {"few_step": few, "lora": LORA})
    assert plan.values()["lora_mode"] == "onthefly"
    assert plan.reasons["lora_mode"] == "--few_step"
    for values, said in (({"lora_mode": "merge"}, "--lora_mode merge"), ({"context_frames": 81}, "--context_frames")):
        with pytest.raises(IncompatibleOptions, match=f"{said} and --few_step .* do not go together"):
            plan.changed(registry(), values).check(CPU)


def test_what_a_recipe_brings_goes_with_it_and_gives_way_to_what_is_said() -> None:
    plan = Plan.of(registry(), {"few_step": "demo-4step"})
    brought = plan.values()
    assert [Path(*Path(brought[f"lora_{name}"][0]).parts[-3:]) for name in ("high", "low")] == [
        Path("demo/few_step/high.safetensors"), Path("demo/few_step/low.safetensors")
    ]  # fmt: skip
    assert plan.own_values()["few_step"] == "demo-4step" and not {"lora_high", "lora_low"} & plan.own_values().keys()
    assert plan.changed(registry(), {"few_step": "off"}).values()["lora_high"] == ()
    assert Plan.of(registry(), {"few_step": "demo-4step", "lora_low": LORA}).values()["lora_low"] == (LORA,)


def test_a_lora_of_lightning_without_its_alpha_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Plan.of(registry(), {"few_step": "lightning-4step", "lora": LORA}).check(CPU)
    assert "lora-tiny.safetensors has no alpha" in caplog.text and "FILE:0.125" in caplog.text
