"""The quality mode measures what the registry holds, in pairs and in turns, loses nothing that was made, and says why
a row is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan.cli import benchmark
from wan.cli.benchmarking import cases, intervals, samples
from wan.cli.benchmarking.ceilings import Ceilings
from wan.cli.benchmarking.session import run
from wan.cli.benchmarking.trial import Order, Ready, Setting, Trial, Variant
from wan.engine.errors import BadRequest, GenerationFailed
from wan.engine.optimizations import registry
from wan.engine.options import options_of

TINY = ["--mode", "quality", "--task", "t2v-A14B", "--load_format", "dummy", "--size", "64*48", "--any_size",
        "--frame_num", "5", "--sample_steps", "4"]  # fmt: skip


class Studio:
    """Answers every order: frames whose level says the prompt's seed, a step brighter where a cache is on.

    `breaks` (option, seed) is an order that fails; `dies` a seed at which all of it is cut off, as by Ctrl-C.
    """

    def __init__(self, breaks: tuple[str, int] | None = None, dies: int | None = None) -> None:
        self.breaks, self.dies = breaks, dies
        self.log: list[tuple[str, int]] = []
        self.opened: list[str] = []

    @contextmanager
    def __call__(self, variant: Variant, words: Sequence[str], setting: Setting) -> Iterator[Any]:
        self.opened.append(variant.name)
        ceilings = Ceilings(dtype="float32", matmul_tflops=0.5, copy_gb_s=8.0)
        yield _Desk(self, Ready(plan="", hardware="", versions={}, machine={}, ceilings=ceilings))


class _Desk:
    def __init__(self, studio: Studio, ready: Ready) -> None:
        self.studio, self.answers = studio, [ready]

    def send(self, order: Order) -> None:
        asked, seed = dict(order.asked), order.asked["base_seed"]
        changed = [name for name in ("cache", "apg", "use_batched_cfg") if asked.get(name)]
        if order.keep is None:  # warm-up
            self.answers.append(self._trial(1.0))
            return
        if seed == self.studio.dies:
            raise KeyboardInterrupt
        self.studio.log.append((changed[0] if changed else "plain", seed))
        if changed and self.studio.breaks == (changed[0], seed):
            self.answers.append(GenerationFailed("out of memory: <3 GiB> were asked for"))
            return
        np.save(order.keep, np.full((5, 16, 16, 3), 100 + seed + 2 * ("cache" in changed), np.uint8))
        self.answers.append(self._trial(1.0 if "cache" in changed else 2.0))

    def recv(self) -> Any:
        return self.answers.pop(0)

    @staticmethod
    def _trial(seconds: float) -> Trial:
        return Trial(seconds=seconds, stages={"denoise": seconds / 2}, components={}, peaks={"host": 2**30},
                     latents=np.ones((1, 2, 2, 2, 2)), forwards=int(4 * seconds), cpu_seconds=seconds)  # fmt: skip


def go(words: list[str], studio: Studio) -> int:
    return run(words, benchmark.build_parser(), studio)


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(next(folder.glob("quality_*.json")).read_text("utf-8"))
    return content


def rows(folder: Path) -> dict[str, Any]:
    return {row["variant"]: row for row in results(folder)["rows"]}


def test_every_optimisation_that_is_not_bitwise_has_a_row_or_a_reason() -> None:
    """A new one appears by itself where its switch says its values; otherwise this asks for a line in cases.toml."""
    found = {kind for case in cases.cases_of(registry(), trained=33, cuda=True) for kind in case.kinds}
    for kind in registry():
        assert kind.grade == "bitwise" or kind.__name__ in found | set(cases.left_out()), kind.__name__
    labels = [case.label for case in cases.cases_of(registry(), trained=33, cuda=False)]
    assert len(labels) == len(set(labels))


def test_the_label_of_a_case_is_what_to_add_to_a_command_line() -> None:
    from wan.cli.args import parse
    from wan.engine.plan import options

    known = {o.name for kind in registry() for o in options_of(kind)}
    for case in [
        *cases.cases_of(registry(), trained=33, cuda=True),
        *cases.group_of("long", registry(), trained=33)[0],
    ]:
        args = vars(parse(case.label.split(), options(registry())))
        assert {name: args[name] for name in case.values} == dict(case.values)
        assert {name for name in known if args[name] is not None} == set(case.values) & known


def test_rows_are_pairs_of_the_same_noise_and_say_gain_and_loss(tmp_path: Path, capsys: Any) -> None:
    studio = Studio()
    words = [*TINY, "--cases", "apg,easy", "--num_prompts", "3", "--base_seed", "7", "--output_dir", str(tmp_path)]
    assert go(words, studio) == 0
    turns = [name for name, seed in studio.log if seed == 8]
    assert turns[0] == "plain" and set(turns) == {"plain", "cache", "apg"}
    assert studio.log == sorted(studio.log, key=lambda entry: entry[1])
    assert studio.opened == ["networks as they are"]
    found = rows(tmp_path)
    easy = found["--cache easy"]
    assert easy["runs"] == easy["pairs"] == 3
    assert easy["speed"] == easy["cpu_speed"] == [2.0, 2.0, 2.0] and easy["forwards"] == 4 and easy["grade"] == "lossy"
    assert easy["psnr_db"] == pytest.approx(20 * np.log10(255 / 2), rel=1e-4) and easy["latents_differ"] == 0
    assert found["--apg"]["equal"] == 3 and "psnr_db" not in found["--apg"]
    assert "| `--cache easy` | 2.00x" in capsys.readouterr().out
    assert next(tmp_path.glob("quality_*.png")).read_bytes()[:4] == b"\x89PNG"


def test_a_case_that_breaks_is_a_marked_row_and_the_others_go_on(tmp_path: Path) -> None:
    words = [*TINY, "--cases", "apg,tea,easy", "--num_prompts", "3", "--output_dir", str(tmp_path)]
    assert go(words, Studio(breaks=("apg", 1))) == 0
    found = rows(tmp_path)
    assert found["--apg"]["status"] == "failed" and "3 GiB" in found["--apg"]["reason"] and found["--apg"]["runs"] == 1
    assert found["--cache easy"]["runs"] == 3


def test_a_survey_that_was_cut_off_goes_on_behind_what_it_made(tmp_path: Path) -> None:
    words = [*TINY, "--cases", "apg,easy", "--num_prompts", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        go(words, Studio(dies=2))
    file = next(tmp_path.glob("quality_*.json"))
    lines = file.with_suffix(".samples.jsonl")
    lines.write_text(lines.read_text("utf-8") + '{"case": "--apg", "num', "utf-8")  # as a crash leaves it
    studio = Studio()
    assert go(["--resume", str(file)], studio) == 0
    assert {seed for _, seed in studio.log} == {2, 3}
    assert all(row["runs"] == 4 for row in rows(tmp_path).values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--cases", "warp"], "--cases 'warp' names none"),
        (["--num_prompts", "0"], "--num_prompts 0"),
        (["--matrix", "demo"], "--matrix"),
        (["--compare", "diffusers"], "--compare diffusers"),
        (["--context_frames", "6"], "--context_frames 6"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_loaded(more: list[str], said: str, tmp_path: Path) -> None:
    studio = Studio()
    with pytest.raises(BadRequest, match=said):
        go([*TINY, "--output_dir", str(tmp_path), *more], studio)
    assert not studio.opened


def test_intervals_are_those_of_their_definitions() -> None:
    """Wilson's bounds solve (p - share)^2 = z^2 p (1 - p) / n; the interval of a mean is near the normal one."""
    low, high = intervals.wilson(45, 48)
    for bound in (low, high):
        assert (bound - 45 / 48) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 48)
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = intervals.of_mean(list(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * values.std() / 20, mean + 1.96 * values.std() / 20), abs=0.03)


def test_a_jump_where_clips_meet_is_found() -> None:
    """Frames that brighten by 1 a step and by 9 behind the 33rd; clips of 33 that share a frame meet twice in 97."""
    levels = np.arange(97) + 8 * (np.arange(97) > 32)
    frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(97, 4, 4, 3)
    found = samples.joints(frames, 33)
    assert (found["change_usual"], found["change_joint"], found["change_most"]) == (1, 5, 9)
