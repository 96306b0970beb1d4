"""What is chosen for every task, size and budget fits, more memory is never slower, a refusal names what is enough."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from wan.components import dummy_components
from wan.conditioning.geometry import parse_size as parse_video_size
from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS
from wan.engine.budget import CHOSEN, Planner, Wishes, describe_budget
from wan.engine.errors import IncompatibleOptions
from wan.engine.optimizations import FP8
from wan.engine.prediction import PLAIN, Models, Video, predict
from wan.engine.roofline import CARDS, COMPILED_LAUNCH_S, GB, Card, forward_seconds
from wan.sizes import models_of

BUDGETS = [6, 8, 12, 16, 24, 32, 40, 48, 80]
CARD = next(card for card in CARDS if card.name == "RTX 4090")
H100 = next(card for card in CARDS if card.name == "H100")
EVERYTHING = Wishes(available=frozenset(PLAIN))


@functools.cache
def models(task: str) -> Models:
    return models_of(dummy_components(WAN_CONFIGS[task]))


def video(task: str, size: str | tuple[int, int], **other: Any) -> Video:
    width, height = parse_video_size(size) if isinstance(size, str) else size
    config = WAN_CONFIGS[task]
    return Video(width=width, height=height, frames=config.frame_num, steps=config.get("sample_steps", 50), **other)


@pytest.mark.parametrize("task", WAN_CONFIGS)
def test_every_budget_gets_what_fits_or_a_budget_that_does(task: str) -> None:
    for size in {max(parse_video_size(name), parse_video_size(name)[::-1]) for name in SUPPORTED_SIZES[task]}:
        planner, before = Planner(models(task), video(task, size, encodes="v2v" not in task), CARD, EVERYTHING), None
        for budget in (number * GB for number in BUDGETS):
            try:
                found = planner.choose(budget)
            except IncompatibleOptions as refusal:
                assert before is None, "a smaller budget was enough"
                enough = round(10 * float(str(refusal).partition("--vram_budget ")[2].partition("GB")[0])) * GB // 10
                assert budget < enough
                assert planner.choose(enough).peak_bytes <= enough
                with pytest.raises(IncompatibleOptions):
                    planner.choose(enough - GB // 5)
                continue
            assert found.peak_bytes <= budget
            assert before is None or found.total_seconds <= before.total_seconds + 0.01
            before = found
        assert before is not None, "the largest budget is enough for every task"


def test_whole_frames_are_decoded_where_they_fit() -> None:
    planner = Planner(models("t2v-1.3B"), video("t2v-1.3B", "832*480"), CARD, EVERYTHING)
    assert planner.choose(24 * GB).values["vae_tiling"] is False
    assert planner.choose(6 * GB).values["vae_tiling"] is True


def test_what_the_user_pinned_is_kept_and_named_in_a_refusal() -> None:
    wishes = Wishes(available=frozenset(PLAIN), pinned={"offload_model": False, "block_swap": 0})
    planner = Planner(models("t2v-A14B"), video("t2v-A14B", "1280*720"), H100, wishes)
    with pytest.raises(IncompatibleOptions, match="--offload_model False, --block_swap 0"):
        planner.choose(24 * GB)
    found = planner.choose(100 * GB)
    assert (found.values["offload_model"], found.values["block_swap"]) == (False, 0)


def test_an_option_that_does_not_exist_is_not_chosen() -> None:
    available = frozenset(PLAIN) - {"block_swap", "prefetch_blocks", "stream_t5", "ffn_rows", "attention_rows"}
    planner = Planner(models("t2v-14B"), video("t2v-14B", "1280*720"), H100, Wishes(available=available))
    found = planner.choose(40 * GB)
    assert found.values["offload_model"] is True
    assert {name for name, value in found.values.items() if value != PLAIN[name]} <= available
    assert planner.least() > 28 * GB


def test_lack_of_ram_is_avoided_where_it_can_be() -> None:
    def chosen(ram: int) -> Any:
        wishes = Wishes(available=frozenset(PLAIN), ram=ram)
        return Planner(models("t2v-A14B"), video("t2v-A14B", "832*480"), H100, wishes).choose(48 * GB)

    plenty = chosen(200 * GB)
    short = chosen(plenty.host_bytes - GB)
    assert short.host_bytes <= plenty.host_bytes - GB
    assert short.total_seconds >= plenty.total_seconds


def test_every_reason_says_what_would_be_without() -> None:
    found = Planner(models("t2v-A14B"), video("t2v-A14B", "1280*720"), H100, EVERYTHING).choose(12 * GB)
    assert found.reasons.keys() == set(CHOSEN)
    assert found.reasons["block_swap"].startswith("else ")
    lines = "\n".join(describe_budget(found))
    assert "of 12.0 GB, computed for H100 (not measured)" in lines
    assert "hide behind computing" in lines
    assert sum(found.phases[found.peak_phase].values()) == found.peak_bytes


@pytest.mark.parametrize(
    ("task", "size", "values", "gigabytes"),
    [
        ("t2v-14B", "832*480", {}, 31.8), ("t2v-14B", "1280*720", {}, 34.4),
        ("t2v-14B", "1280*720", {"block_swap": 40}, 8.1),  # two blocks 1.4, ends 0.8 (time projection in float32)
        ("i2v-14B", "1280*720", {}, 38.7), ("ti2v-5B", "1280*704", {}, 12.7), ("t2v-1.3B", "832*480", {}, 5.0),
    ],
)  # fmt: skip
def test_denoising_needs_what_was_worked_out_by_hand(
    task: str, size: str, values: dict[str, Any], gigabytes: float
) -> None:
    """Weights, activations and 1.2 GB, the VAE and the encoders being elsewhere; 5 %, for parts kept in float32."""
    found = predict(models(task), video(task, size), H100, values | {"offload_model": True, "vae_cpu": True})
    assert sum(found.phases["denoise"].values()) / GB == pytest.approx(gigabytes, rel=0.05)


def test_compiled_blocks_and_what_is_kept_need_room_of_their_own() -> None:
    """A second float32 stream each; a step cache also keeps a bfloat16 residual of both forwards. The first block's
    output is one such residual; keys and values are those of 512 tokens in 30 blocks for both branches."""

    def needed(**values: Any) -> int:
        found = predict(models("t2v-1.3B"), video("t2v-1.3B", "832*480"), H100, values)
        return sum(found.phases["denoise"].values())

    n, plain = 32_760 * 1536, needed()
    assert needed(compile=True) - plain == 4 * n
    assert needed(cache="mag") - plain == needed(cache="tea") - plain == (4 + 2 * 2) * n
    assert needed(cache="easy") == plain
    assert needed(share_first_block=True) - plain == 2 * n
    assert needed(keep_text_keys=True) - plain == 2 * 2 * 30 * 512 * 1536 * 2


def test_frames_decoded_at_a_time_count_with_their_activations_and_not_with_what_is_remembered() -> None:
    def needed(frames: int) -> int:
        found = predict(models("t2v-A14B"), video("t2v-A14B", "1280*720"), H100, {"vae_frames_per_call": frames})
        return found.phases["decode"]["frames"]

    one, two, four = map(needed, (1, 2, 4))
    assert needed(0) == one
    assert 0 < two - one == (four - two) // 2
    assert needed(99) == needed(21)  # no more than there are


def test_8_bits_are_chosen_where_nothing_else_fits() -> None:
    task = "t2v-14B"
    both = models_of(dummy_components(WAN_CONFIGS[task]), float8=FP8(fp8="weight"))
    net, coded = both.transformer, both.float8
    assert coded is not None
    weights = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    rows = 40 * (9 * 5120 + 13824)
    assert (coded.coded, net.num_bytes - coded.num_bytes) == (weights, weights - 4 * rows)

    small, ram = video(task, "832*480"), 60 * GB
    allowed, plain = (Planner(each, small, CARD, replace(EVERYTHING, ram=ram)) for each in (both, models(task)))
    least = allowed.choose(allowed.least())
    assert least.values["fp8"] == "weight" and allowed.least() < plain.least()
    for budget in (plain.least(), 16 * GB, 48 * GB):  # swapping costs little here
        assert allowed.choose(budget).values == plain.choose(budget).values
    short_of_ram = Planner(both, small, CARD, replace(EVERYTHING, ram=25 * GB)).choose(16 * GB)
    assert short_of_ram.values["fp8"] == "weight" and short_of_ram.host_bytes <= 25 * GB
    assert short_of_ram.reasons["fp8"].startswith("else ")


def test_branches_go_in_step_where_copies_would_not_hide_and_need_half_of_them() -> None:
    task, swapped = "t2v-A14B", {"offload_model": True, "block_swap": 40}
    picture, clip = (replace(video(task, "832*480"), frames=frames) for frames in (1, 81))
    alone, in_step = (predict(models(task), picture, CARD, swapped | {"lockstep_cfg": on}) for on in (False, True))
    assert in_step.copy_rate_needed == pytest.approx(alone.copy_rate_needed / 2)
    assert not alone.copies_hide and in_step.seconds_per_step == pytest.approx(alone.seconds_per_step / 2, rel=0.01)
    chosen = Planner(models(task), picture, CARD, EVERYTHING).choose(12 * GB)
    assert chosen.values["lockstep_cfg"] and chosen.reasons["lockstep_cfg"].endswith("s faster a video")
    assert not Planner(models(task), clip, CARD, EVERYTHING).choose(12 * GB).values["lockstep_cfg"]


COMPILING = Wishes(available=frozenset({"cuda_graphs"}), others={"compile": True})


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_graphs_are_chosen_where_launching_takes_longest_and_never_for_a_published_video(card: Card) -> None:
    """Predicted: on every card, blocks of all published networks and sizes take longer than their launches."""
    for task in WAN_CONFIGS:
        for size in SUPPORTED_SIZES[task]:
            found = Planner(models(task), video(task, size), card, COMPILING).choose(10**15)
            assert found.values["cuda_graphs"] is task.endswith("demo")
            assert (found.reasons["cuda_graphs"] == "nothing gained") is not task.endswith("demo")
    picture = Video(width=256, height=256, frames=1, steps=50)
    planner = Planner(models("t2v-1.3B"), picture, card, COMPILING)
    launching = 30 * COMPILED_LAUNCH_S
    computing = forward_seconds(planner.models.transformer, 256, card, compiled=True, launched=False)
    found = planner.choose(10**15)
    assert found.values["cuda_graphs"] is (launching > computing)
    if found.values["cuda_graphs"]:
        assert found.seconds_per_step == pytest.approx(2 * computing)
        assert found.reasons["cuda_graphs"].endswith(" s faster a video")


@pytest.mark.parametrize("moving", [{"offload_model": True}, {"block_swap": 3}, {"lockstep_cfg": True}], ids=str)
def test_graphs_hold_addresses_so_they_gain_nothing_where_weights_move(moving: dict[str, Any]) -> None:
    wishes = replace(COMPILING, pinned=moving, others={"compile": True, **moving})
    found = Planner(models("t2v-1.3B"), Video(width=256, height=256, frames=1, steps=50), H100, wishes).choose(10**15)
    assert found.values["cuda_graphs"] is False
