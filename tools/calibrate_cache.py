"""Measures on a checkpoint what TeaCache and MagCache must know about it, and writes a table for --cache_table.

    python tools/calibrate_cache.py --out table.json --prompts prompts.txt -- --task t2v-1.3B --ckpt_dir FOLDER
    python generate.py --task t2v-1.3B --ckpt_dir FOLDER --cache mag --cache_table table.json --prompt ...

What comes after -- are the flags of generate.py; every line of the prompts' file is generated once, plainly, each with
the next seed. The table holds for the steps, shift and solver it was measured with; another number of steps takes the
nearest of its entries. Source of both measurements: arXiv:2506.09045 and arXiv:2411.19108.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wan.cli import generate, pipelines  # noqa: E402
from wan.cli.args import parse  # noqa: E402
from wan.cli.naming import Claims  # noqa: E402
from wan.cli.report import Terminal  # noqa: E402
from wan.engine.errors import BadRequest, WanError  # noqa: E402
from wan.engine.optimizations import registry  # noqa: E402
from wan.engine.optimizations.step_cache import embedding_distances  # noqa: E402
from wan.engine.plan import options  # noqa: E402

DEGREE = 4
MAG = {"threshold": 0.06, "most": 2, "retain": 0.2}
TEA_THRESHOLD = 0.1


@dataclass
class Recorder:
    """What one expert's conditional forwards do from step to step, over all runs: one list of a run's steps each."""

    ratios: list[list[float]] = field(default_factory=list)
    """How the mean norm of the residual changes."""
    moved: list[list[float]] = field(default_factory=list)
    """Relative L1 distance of the output."""
    steps: list[Any] = field(default_factory=list)
    """The steps of the last run."""
    _before: tuple[Tensor, Tensor] | None = None
    _norm: Tensor | None = None

    def attach(self, dit: Any) -> None:
        """Listen at the trunk and at the output of `dit`."""
        trunk, velocity = dit.trunk, dit.velocity

        def watched_trunk(tokens: Tensor, inputs: Any, condition: Any, step: Any) -> Tensor:
            after: Tensor = trunk(tokens, inputs, condition, step)
            if "cond" in inputs.branches:
                self._norm = (after - tokens).norm(dim=-1)
            return after

        def watched_velocity(
            latents: Tensor, timestep: Tensor, condition: Any, step: Any = None, branches: tuple[str, ...] = ("cond",)
        ) -> Tensor:
            output: Tensor = velocity(latents, timestep, condition, step, branches)
            if "cond" in branches:
                self._record(step, output)
            return output

        dit.trunk, dit.velocity = watched_trunk, watched_velocity

    def _record(self, step: Any, output: Tensor) -> None:
        assert self._norm is not None
        if not self.steps or step.index != self.steps[-1].index + 1:  # a run begins
            self.steps, self._before = [], None
            self.ratios.append([1.0])
            self.moved.append([0.0])
        if self._before is not None:
            norm, last = self._before
            self.ratios[-1].append(float((self._norm / norm).mean()))
            self.moved[-1].append(float((output - last).abs().mean() / last.abs().mean()))
        self.steps.append(step)
        self._before = self._norm, output


def measure(prompts: list[str], flags: list[str]) -> tuple[Any, dict[str, Recorder], str]:
    """(engine, what was recorded by expert, name of the model's configuration). Raises WanError."""
    known = tuple(registry())
    terminal = Terminal()
    recorders: dict[str, Recorder] = defaultdict(Recorder)
    pipeline: Any = None
    for number, prompt in enumerate(prompts):
        args = parse([*flags, "--prompt", prompt, "--base_seed", str(number)], options(known))
        with Claims() as claims:
            job = generate.check(args, known, "none", claims)
        if job.plan.values()["use_batched_cfg"] or job.plan.values()["cache"] != "off":
            raise BadRequest("--batched_cfg and --cache change what is measured: leave them out")
        if pipeline is None:
            pipeline = pipelines.build(job, terminal)
            for name in pipeline.engine.expert_names:
                recorders[name].attach(pipeline.engine.network(name))
        pipelines.call(pipeline, job)
    return pipeline.engine, dict(recorders), job.wanted.config["__name__"]


def table(engine: Any, recorders: dict[str, Recorder], model: str, source: str) -> dict[str, Any]:
    """The table that wan.engine.caching.tables reads."""
    ratios = {name: np.mean(r.ratios, axis=0).round(5).tolist() for name, r in recorders.items()}
    tea: dict[str, Any] = {}
    for signal in ("e", "e0"):
        fits = {}
        for name, recorder in recorders.items():
            distances = embedding_distances(engine.network(name), recorder.steps, signal)[1:]
            x = np.tile(distances, len(recorder.moved))
            y = np.concatenate([moved[1:] for moved in recorder.moved])
            fits[name] = np.polyfit(x, y, min(DEGREE, len(distances) - 1)).tolist()
        tea[signal] = {"coefficients": fits, "threshold": TEA_THRESHOLD, "source": source}
    mag = {
        "ratios": ratios, "retain": dict.fromkeys(ratios, MAG["retain"]), "threshold": MAG["threshold"],
        "most": MAG["most"], "source": source,
    }  # fmt: skip
    return {"model": model, "tea": tea, "mag": mag}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table, JSON")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("flags", nargs="+", help="flags of generate.py, after --")
    args = parser.parse_args()
    try:
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise BadRequest(f"--prompts {str(args.prompts)!r} has no prompt")
        source = f"tools/calibrate_cache.py, {len(prompts)} prompts, {' '.join(args.flags)}"
        found = table(*measure(prompts, args.flags), source)
    except (WanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
