"""Trains the model in demo/ from nothing: VAE, DiT with its text encoder, the two experts, then measures it.

    python tools/train_demo.py all --work runs/demo        every stage, about 100 minutes on 2 cores with AMX
    python tools/train_demo.py evaluate --folder demo      measure the shipped weights again
    python tools/train_demo.py resume --folder demo        train the shipped weights further: base, then new experts
    python tools/train_demo.py all --smoke --work /tmp/x   every stage for a few seconds, to see that it runs

Stages are scheduled by wall clock, so a slower machine gives a weaker model, not a longer run; `--scale 2` doubles
every stage. Each stage reads what the one before left in `--work`.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STAGES = ("vae", "base", "experts", "export", "evaluate")


def train_vae(work: Path, scale: float, smoke: bool) -> None:
    """The VAE in two runs, then its latents normalised by folding the statistics into its 1x1 convolutions."""
    import torch
    from demo import parallel, scenes
    from demo.vae import fold_normalization
    from demo.vae_train import SHARPENING, Stage, VaeTraining, train_vae

    # The shipped VAE's first run was planned for 1260 s and cut short when its outlines were found too round.
    first = VaeTraining(seconds=1260 * scale, stop_at=0.74)
    second = replace(SHARPENING, seconds=660 * scale)
    if smoke:
        tiny = (Stage(until=1.0, batch=1, frames=5, side=32),)
        first, second = (replace(run, seconds=2.0, clips=2, stages=tiny) for run in (first, second))
    parallel.launch(train_vae, 2, first, work / "vae_first.pt")
    parallel.launch(train_vae, 2, second, work / "vae_sharp.pt", work / "vae_first.pt")
    rng = random.Random(17)
    combos = scenes.split_combos()["train"]
    videos = [scenes.render([scenes.random_scene(rng, rng.choice(combos))]) for _ in range(2 if smoke else 64)]
    torch.save(fold_normalization(torch.load(work / "vae_sharp.pt", weights_only=True), videos), work / "vae.pt")


def train_base(work: Path, scale: float, smoke: bool, start: Path | None = None) -> None:
    """One DiT for all noise levels, together with the text encoder, at constant rates, from `start` or from nothing."""
    from demo import parallel
    from demo.dit_train import DitTraining, train_dit

    config = DitTraining(seconds=1857 * scale)
    if smoke:
        config = replace(config, seconds=2.0, first_clips=2, batch=2, compiled=False)
    parallel.launch(train_dit, 2, config, work / "vae.pt", work / "base.pt", start)


def train_experts(work: Path, scale: float, smoke: bool) -> None:
    """Each expert from the base on its own noise levels, rates falling to zero; one process each, side by side."""
    import torch.multiprocessing as mp
    from demo.dit_train import BOUNDARY, DitTraining

    config = DitTraining(seconds=1496 * scale, first_clips=900, clips_per_step=0.5, decay_from=0.25, freeze_text=True)
    if smoke:
        config = replace(config, seconds=2.0, first_clips=2, batch=2, compiled=False)
    runs = {
        "high": replace(config, low=BOUNDARY, high=1.0, seed=6),
        "low": replace(config, low=0.0, high=BOUNDARY, seed=7),
    }
    workers = [mp.get_context("spawn").Process(target=_expert, args=(run, work, name)) for name, run in runs.items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"an expert's training ended with status {worker.exitcode}")


def _expert(config: object, work: Path, name: str) -> None:
    from demo import parallel
    from demo.dit_train import train_dit

    parallel.launch(train_dit, 1, config, work / "vae.pt", work / f"{name}.pt", work / "base.pt")


def export(work: Path, folder: Path) -> None:
    """The checkpoint folder in upstream's layout."""
    from demo.export import export

    export(work / "vae.pt", {"high": work / "high.pt", "low": work / "low.pt"}, folder)


def evaluate(folder: Path, prompts: int, split: str, seed: int, out: Path) -> None:
    """The measurement on combinations that were never trained on, as JSON and printed as a table."""
    from demo import evaluate as measure

    result = measure.evaluate(folder, split, prompts, seed)
    measure.save(result, out)
    print(measure.table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all", "resume"))
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="where stages leave their weights")
    parser.add_argument("--folder", type=Path, help="checkpoint folder to write or to measure (default: WORK/demo)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the time of every training stage")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of hours")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.folder or args.work / "demo"
    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.stage == "resume":
        from demo.export import read_back

        read_back(folder, args.work / "vae.pt", args.work / "base.pt")
        train_base(args.work, args.scale, args.smoke, args.work / "base.pt")
        stages, folder = ("experts", "export", "evaluate"), args.work / "demo"
    for stage in stages:
        if stage == "vae":
            train_vae(args.work, args.scale, args.smoke)
        elif stage == "base":
            train_base(args.work, args.scale, args.smoke)
        elif stage == "experts":
            train_experts(args.work, args.scale, args.smoke)
        elif stage == "export":
            export(args.work, folder)
        else:
            evaluate(folder, 2 if args.smoke else args.prompts, args.split, args.seed, args.work / "results.json")


if __name__ == "__main__":
    main()
