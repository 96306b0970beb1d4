"""`--vram_budget`, `--reserve_vram` and `--find_max` as a user meets them, without a GPU or with one described."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.cli.args import memory, parse
from wan.cli.budget import Budget, budget_of, within_budget
from wan.cli.generate import Job, main
from wan.cli.pipelines import memory_advice
from wan.cli.presets import make_plan
from wan.cli.queue import plan_queue
from wan.cli.request import resolve
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.plan import Plan, options
from wan.engine.prediction import Prediction
from wan.engine.roofline import GB

SMALL = ["--task", "t2v-1.3B", "--size", "480p", "--load_format", "dummy"]
CARD = Hardware(
    device=torch.device("cuda", 0), name="NVIDIA L40S", sm=(8, 9), total_memory=48 * GB, free_memory=40 * GB
)


def arguments(*argv: str, words: Sequence[str] = SMALL) -> Any:
    return parse([*words, *argv], options(registry()))


def planned(
    *argv: str, preset: str = "none", card: Hardware = CARD, words: Sequence[str] = SMALL
) -> tuple[Plan, Prediction, Budget]:
    args = arguments(*argv, words=words)
    budget = budget_of(args, card, preset)
    assert budget is not None
    plan = make_plan(args, registry(), card, "none")
    return *within_budget(args, resolve(args), plan, registry(), card, budget), budget


def test_the_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main([*SMALL, "--vram_budget", "8GB", "--print_plan", "--save_file", f"{tmp_path}/"]) == 0
    said = capsys.readouterr().err
    assert "of 8.0 GB, computed for" in said
    assert "(not measured)" in said
    assert "s/step" in said


@pytest.mark.parametrize(("preset", "card"), [("rtx4090", "RTX 4090"), ("auto", "L4"), ("rtx3060_12gb", "L4")])
def test_without_a_gpu_it_is_planned_for_the_card_of_the_preset_or_one_that_has_it(
    preset: str, card: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the preset says, whatever is installed here."""
    assert main([*SMALL, "--vram_budget", "24GB", "--print_plan", "--preset", preset]) == 0
    said = capsys.readouterr().err
    assert f"run     on {card}, which is not here" in said
    assert f"of 24.0 GB, computed for {card} (not measured)" in said
    assert f"preset  {'l4' if preset == 'auto' else preset}" in said and "compile=True (preset" in said
    rows = said.partition("\noption")[2].splitlines()[1:-2]
    chosen = [not re.match(r"\S+ +\S+ +default$", row) for row in rows]
    assert chosen == sorted(chosen, reverse=True) and any(chosen)


def test_what_does_not_go_with_an_option_that_stays_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--task", "t2v-A14B", "--size", "1280*720", "--load_format", "dummy", "--vram_budget", "12GB"]
    plan, found, _ = planned(words=words)
    assert plan.values()["attention_rows"] == found.values["attention_rows"] > 0
    Path("mine.toml").write_text("share_first_block = true\n")
    for stays in (["--share_first_block"], ["--preset", "mine.toml"]):
        plan, found, _ = planned(*stays, words=words)
        assert plan.values()["share_first_block"] and not found.values["attention_rows"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--vram_budget", "12"], "write 12GB"),
        (["--vram_budget", "8GB"], "--print_plan"),
        (["--reserve_vram", "2GB"], "no GPU here"),
        (["--vram_budget", "1GB", "--print_plan"], "Give --vram_budget "),
        (["--find_max", "frames"], "--vram_budget 12GB"),
        (["--find_max", "colours", "--vram_budget", "8GB"], "frames"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_the_remedy(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--device", "cpu", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_find_max_answers_with_what_fits_and_not_more(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(budget: str) -> int:
        assert main([*SMALL, "--device", "cpu", "--find_max", "frames", "--vram_budget", budget]) == 0
        return int(capsys.readouterr().out)

    fewer, more = answer("8GB"), answer("12GB")
    assert fewer % 4 == more % 4 == 1
    assert 81 < fewer < more
    frames = ["--vram_budget", "8GB", "--print_plan", "--frame_num"]
    args = arguments(*frames, str(fewer))
    budget = Budget(size=8 * GB, asked=True)
    plan = make_plan(args, registry(), CARD, "none")
    within_budget(args, resolve(args), plan, registry(), CARD, budget)
    args = arguments(*frames, str(fewer + 4 * (fewer // 20)))  # well beyond the last that fits
    with pytest.raises(IncompatibleOptions, match="too little"):
        within_budget(args, resolve(args), plan, registry(), CARD, budget)


def test_flags_win_over_the_budget_and_the_budget_over_the_preset() -> None:
    plan, found, _ = planned("--vram_budget", "32GB", "--offload_model", "True", "--vae_cpu")
    values = plan.values()
    assert values["offload_model"] is True and values["vae_cpu"] is True
    assert plan.reasons["offload_model"] == "flag"
    assert found.values["offload_model"] is True
    roomy, _, _ = planned("--vram_budget", "32GB")
    assert roomy.values()["offload_model"] is False
    assert roomy.reasons["offload_model"] == "budget: there is room"


def test_weights_in_8_bits_are_chosen_by_name_alone_and_kept_where_a_preset_says_them(
    tmp_path: Any,
) -> None:
    tight, large = ["--vram_budget", "4.6GB"], ["--task", "t2v-14B", *SMALL[2:]]
    with pytest.raises(IncompatibleOptions, match="Give --vram_budget 5"):
        planned(*tight, words=large)
    allowed = planned(*tight, "--fp8", "auto", words=large)[0]
    assert allowed.values()["fp8"] == "weight" and allowed.reasons["fp8"].startswith("budget: ")
    assert "fp8" not in planned("--vram_budget", "32GB", words=large)[0].reasons
    preset = tmp_path / "mine.toml"
    preset.write_text('fp8 = "scaled"\n')
    plan, found, _ = planned("--vram_budget", "32GB", "--preset", str(preset), words=large)
    assert plan.values()["fp8"] == found.values["fp8"] == "scaled"
    assert plan.reasons["fp8"] == "preset mine"


def test_the_jobs_of_a_queue_keep_to_what_the_largest_video_needs_to_be_loaded(tmp_path: Path) -> None:
    """Networks are loaded once: the small video alone would swap fewer blocks."""

    def planned_queue(*frames: int) -> list[Job]:
        file = tmp_path / f"{len(frames)}.jsonl"
        file.write_text("".join(f'{{"prompt": "{count}", "frame_num": {count}}}\n' for count in frames))
        words = ["--task", "t2v-A14B", "--size", "480p", "--load_format", "dummy", "--device", "cpu", "--print_plan"]
        words += ["--vram_budget", "16GB", "--save_file", f"{tmp_path}/", "--prompt_file", str(file)]
        return [item.job for item in plan_queue(parse(words, options(registry())), registry(), "none").items]

    [alone] = planned_queue(17)
    small, large = planned_queue(17, 81)
    fixed = [o.name for kind in registry() if not kind.per_call for o in options([kind])]
    assert {name: small.plan.values()[name] for name in fixed} == {name: large.plan.values()[name] for name in fixed}
    assert alone.plan.values()["block_swap"] < small.plan.values()["block_swap"]
    assert small.plan.reasons["block_swap"] == "budget of the largest"
    for job in (small, large):
        assert job.prediction is not None and job.prediction.peak_bytes <= 16 * GB
        assert job.prediction.values["block_swap"] == job.plan.values()["block_swap"]


def test_auto_plans_for_what_is_free_and_nothing_else_does() -> None:
    assert budget_of(arguments(), CARD, "none") is None
    auto = budget_of(arguments(), CARD, "auto")
    assert auto is not None and not auto.asked
    assert 40 * GB < auto.size < 40.5 * GB  # with the context of this process, less a margin
    reserved = budget_of(arguments("--reserve_vram", "10GB"), CARD, "none")
    assert reserved == Budget(size=38 * GB, asked=True)
    both = budget_of(arguments("--reserve_vram", "10GB", "--vram_budget", "44GB"), CARD, "none")
    assert both == reserved
    with pytest.raises(BadRequest, match="reserve less"):
        budget_of(arguments("--reserve_vram", "48GB"), CARD, "none")


def test_a_refusal_nobody_asked_for_says_how_to_go_without() -> None:
    tiny = dataclasses.replace(CARD, free_memory=GB)
    with pytest.raises(IncompatibleOptions, match="--preset none"):
        planned(preset="auto", card=tiny)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * GB), ("12GiB", 12 * 2**30), ("11.5G", 11_500_000_000), ("900 MB", 900_000_000), ("8gb", 8 * GB)],
)
def test_sizes_of_memory_are_read_as_people_write_them(text: str, size: int) -> None:
    assert memory(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "-3GB", "12 apples", "0GB", "1e3GB", ""])
def test_what_is_no_size_of_memory_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Exception, match="write 12GB"):
        memory(text)


def test_advice_for_lack_of_memory_names_every_option_that_is_off_and_none_that_is_on() -> None:
    plain = memory_advice(Plan.of(registry(), {}))
    saving = ("--vram_budget", "--offload_model True", "--vae_cpu", "--vae_tiling", "--stream_t5", "--block_swap auto")
    assert all(flag in plain for flag in (*saving, "--convert_model_dtype", "--ffn_rows", "--size"))
    on = {"offload_model": True, "vae_tiling": True, "t5_cpu": True, "block_swap": 4, "ffn_rows": 8192}
    some = memory_advice(Plan.of(registry(), on, reasons={"block_swap": "budget: else 20 GB"}))
    assert some == "try a smaller --vram_budget, --vae_cpu, --convert_model_dtype, a smaller --size, fewer --frame_num"


@pytest.mark.parametrize("count", ["-1", "99"])
def test_a_number_of_swapped_blocks_that_there_are_not_is_refused(
    count: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    command = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu", "--block_swap", count]
    assert main([*command, "--prompt", "a bird", "--save_file", f"{tmp_path}/"]) == 2
    assert f"--block_swap {count}" in capsys.readouterr().err
