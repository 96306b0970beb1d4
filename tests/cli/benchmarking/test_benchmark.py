"""The benchmark measures what it says: diffusers does the same work, and the baseline is one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.cli import benchmark
from wan.cli.benchmarking import session, told
from wan.cli.benchmarking.session import run
from wan.engine.errors import GenerationFailed

TINY = shlex.split("--task t2v-A14B --size 64x48 --any_size --frame_num 5 --sample_steps 2 --device cpu")


@pytest.mark.slow
def test_diffusers_does_the_same_work_on_the_same_weights(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own. 1e-3 is the benchmark's own bound; two steps in float32 differ by rounding: 1e-4."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(session, "DTYPES", ("float32",))
    monkeypatch.setattr(session, "variants", lambda own: (benchmark_variant("baseline float32"),))
    own = ["--num_runs", "2", "--threads", "1", "--save_results", "--output_dir", str(tmp_path)]
    words = [*TINY, "--ckpt_dir", str(tiny_checkpoint), "--prompt", "a red bird", *own, "--compare", "diffusers"]
    assert benchmark.main(words) == 0
    content = json.loads(next(tmp_path.glob("*.json")).read_text("utf-8"))
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == ["baseline float32", "diffusers float32"]
    assert rows["diffusers float32"]["reference"] == "baseline float32"
    assert rows["diffusers float32"]["latents_differ"] < 1e-4
    assert rows["diffusers float32"]["psnr_db"] is None or rows["diffusers float32"]["psnr_db"] > 60
    for row in rows.values():
        assert len(row["all_s"]) == 2  # the warm-up run is not among them
        assert row["total_min_s"] <= row["total_s"] <= row["total_max_s"]
        assert all(row[name] > 0 for name in ("text_s", "denoise_s", "decode_s", "step_s", "peak_gib"))
        assert row["hardware"] and row["plan"] and row["commit"] and row["machine"]["versions"]["torch"]
    assert "--compare diffusers" in content["command"]
    printed = capsys.readouterr().out
    assert "x as fast as diffusers" in printed or "diffusers float32 is" in printed
    assert str(next(tmp_path.glob("*.html"))) in printed


def benchmark_variant(name: str) -> Any:
    from wan.cli.benchmarking.trial import Variant

    return Variant(name=name, dtype="float32")


@pytest.mark.slow
def test_the_tiny_matrix_is_measured_from_prompt_to_frames(tiny_checkpoint: Path, here: Any, tmp_path: Path) -> None:
    """Real pipelines, here: stages and parts of them sum up, batched guidance makes the same picture up to rounding."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        "num_runs = 1\n[flags]\nframe_num = 5\nsample_shift = 3.0\nbase_seed = 1\n"
        "[variants.baseline]\nbaseline = true\ndtype = 'float32'\n"
        "[variants.batched]\npreset = 'none'\ndtype = 'float32'\nuse_batched_cfg = true\n"
    )
    words = [*TINY, "--ckpt_dir", str(tiny_checkpoint), "--prompt", "a red bird", "--matrix", str(path)]
    assert run([*words, "--output_dir", str(tmp_path)], benchmark.build_parser(), here) == 0
    rows = json.loads(next(tmp_path.glob("*.json")).read_text("utf-8"))["rows"]
    assert [row["variant"] for row in rows] == ["baseline", "batched"]
    for row in rows:
        assert sum(row[f"{name}_s"] for name in ("text", "denoise", "decode")) == pytest.approx(row["total_s"])
        assert sum(row["components"].values()) == pytest.approx(row["total_s"])
        assert {"encode with text_encoder", "denoise high", "denoise low", "decode"} <= row["components"].keys()
        assert set(row["parts"]) == {"self_attn", "cross_attn", "ffn", "norms, gates and residuals"}
        assert 0 < row["mfu"] < 1 and row["ceiling_tflops"] > 0 and row["copy_gb_s"] > 0
        assert row["peak_gib"] == row["host_gib"] > 0 and row["allocated_gib"] is None
    assert "use_batched_cfg=True" in rows[1]["plan"]
    assert rows[1]["latents_differ"] < 1e-5  # two samples in one product: another order of summation
    assert rows[1]["ssim"] > 0.999 and rows[1]["frames_max"] <= 1


def test_baseline_switches_off_all_but_placement(tiny_checkpoint: Path) -> None:
    from wan.cli.args import parse
    from wan.cli.benchmarking.worker import plan_of
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
    row |= {"status": "ok"}
    told.check_agreement([row | {"latents_differ": 9e-4}])
    with pytest.raises(GenerationFailed, match="different work"):
        told.check_agreement([row | {"latents_differ": 2e-3}])
