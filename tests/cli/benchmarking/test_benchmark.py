"""The benchmark measures what it says: every variant runs, rows are complete, and diffusers does the same work."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from wan.cli import benchmark
from wan.cli.trial import Clock

TINY = shlex.split("--task t2v-A14B --size 64x48 --any_size --frame_num 5 --sample_steps 2 --device cpu")


@pytest.fixture
def tiny_words(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that finishes in seconds; the float32 of a comparison is what the tiny folder is stored in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = ["--num_runs", "2", "--warmup", "1", "--threads", "1", "--save_results", "--output_dir", str(tmp_path)]
    return [*TINY, "--ckpt_dir", str(tiny_checkpoint), "--prompt", "a red bird", *own]


def results(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(next(folder.glob("*.json")).read_text("utf-8"))
    return rows


@pytest.mark.slow
def test_diffusers_does_the_same_work_on_the_same_weights(
    tiny_words: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-3 is the benchmark's own bound; two steps in float32 differ by rounding only, so 1e-4 here."""
    chosen = benchmark.variants
    monkeypatch.setattr(benchmark, "variants", lambda own: [v for v in chosen(own) if v.dtype == "float32"])
    assert benchmark.main([*tiny_words, "--compare", "diffusers", "--mode", "baseline"]) == 0
    rows = {row["variant"]: row for row in results(tmp_path)}
    assert list(rows) == ["baseline float32", "diffusers float32"]
    assert rows["diffusers float32"]["reference"] == "baseline float32"
    assert rows["diffusers float32"]["latents_differ"] < 1e-4
    for row in rows.values():
        assert len(row["all_s"]) == 2  # the warm-up run is not among them
        assert row["total_min_s"] <= row["total_s"] <= row["total_max_s"]
        assert all(row[name] > 0 for name in ("text_s", "denoise_s", "decode_s", "step_s", "peak_gib"))
        assert row["hardware"] and row["plan"] and row["commit"] and "--compare diffusers" in row["command"]
    with next(tmp_path.glob("*.csv")).open(newline="", encoding="utf-8") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == list(rows)
    printed = capsys.readouterr().out
    assert "x as fast as diffusers" in printed or "diffusers float32 is" in printed
    assert str(next(tmp_path.glob("*.json"))) in printed


def test_baseline_switches_off_all_but_placement(tiny_checkpoint: Path) -> None:
    import torch

    from wan.cli.args import parse
    from wan.cli.trial import plan_of
    from wan.engine.hardware import Hardware
    from wan.engine.optimizations import T5CPU, BatchedCFG, registry
    from wan.engine.plan import options

    words = ["--use_batched_cfg", "--t5_cpu"]
    args = parse(words, options(registry()))
    hardware = Hardware(device=torch.device("cpu"), name="CPU")
    assert plan_of(args, True, hardware).get(BatchedCFG).use_batched_cfg
    assert not plan_of(args, False, hardware).get(BatchedCFG).use_batched_cfg
    assert plan_of(args, False, hardware).get(T5CPU).t5_cpu


def test_different_latents_are_an_error() -> None:
    row = {"runner": "diffusers", "dtype": "float32", "variant": "diffusers float32", "reference": "baseline float32"}
    benchmark.check_agreement([row | {"latents_differ": 9e-4}])
    with pytest.raises(benchmark.GenerationFailed, match="different work"):
        benchmark.check_agreement([row | {"latents_differ": 2e-3}])


def test_clock_adds_up_stages_of_one_kind() -> None:
    """Two segments of denoising are one column; the stages sum to the whole."""
    import torch

    now = iter(range(100))
    clock = Clock(torch.device("cpu"))
    clock._now = lambda: float(next(now))  # type: ignore[method-assign]
    clock.start()
    for name in ("encode with text_encoder", "denoise", "denoise", "decode"):
        clock.stage(name)
    trial = clock.stop(torch.zeros(1))
    assert trial.stages == {"text": 2.0, "denoise": 2.0, "decode": 1.0}
    assert trial.seconds == 5.0


def test_comparison_needs_a_checkpoint(capsys: Any) -> None:
    words = shlex.split("--compare diffusers --task t2v-1.3B --load_format dummy --size 480p --num_runs 1")
    assert benchmark.main(words) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_number_of_runs_must_be_positive(capsys: Any) -> None:
    assert benchmark.main(["--num_runs", "0"]) == 2
    assert "--num_runs 0" in capsys.readouterr().err
