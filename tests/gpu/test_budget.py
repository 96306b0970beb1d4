"""What a run takes of a card against what was predicted, with torch kept to the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wan.cli.args import parse
from wan.cli.budget import budget_of, within_budget
from wan.cli.generate import main
from wan.cli.presets import make_plan
from wan.cli.request import resolve
from wan.engine.hardware import probe
from wan.engine.optimizations import registry
from wan.engine.plan import options
from wan.engine.prediction import CONTEXT_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("budget", ["12GB", "24GB"])
def test_a_run_needs_what_was_predicted(budget: str, tmp_path: Path) -> None:
    argv = ["--task", "t2v-1.3B", "--size", "480p", "--load_format", "dummy", "--sample_steps", "2"]
    argv += ["--vram_budget", budget, "--save_file", str(tmp_path / "video.mp4")]
    args, hardware = parse(argv, options(registry())), probe()
    limit = budget_of(args, hardware, "none")
    assert limit is not None
    plan = make_plan(args, registry(), hardware, "none")
    _, predicted = within_budget(args, resolve(args), plan, registry(), hardware, limit)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        assert main(argv) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    measured = torch.cuda.max_memory_reserved() + CONTEXT_BYTES
    assert measured == pytest.approx(predicted.peak_bytes, rel=0.1)
