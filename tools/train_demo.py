"""Trains the model in demo/ from nothing: VAE, DiT with its text encoder, the two experts, then measures it.

    python tools/train_demo.py all --work runs/demo        every stage, about 3 hours on 2 cores with AMX
    python tools/train_demo.py evaluate --folder demo      measure the shipped weights again
    python tools/train_demo.py resume --folder demo        train the shipped experts further, and measure the result
    python tools/train_demo.py phrases --folder demo       teach the text encoder word order once more, and measure that
    python tools/train_demo.py i2v --folder demo           teach the shipped experts to continue a picture (demo/i2v/)
    python tools/train_demo.py evaluate-i2v --folder demo  measure that
    python tools/train_demo.py few_step --folder demo      distil them into LoRAs for four steps (demo/few_step/)
    python tools/train_demo.py evaluate-few_step --folder demo     measure that
    python tools/train_demo.py frames --folder demo        draw demo/frames.png
    python tools/train_demo.py all --smoke --work /tmp/x   every stage for a few seconds, to see that it runs

Stages are scheduled by wall clock, so a slower machine gives a weaker model, not a longer run; `--scale 2` doubles
every stage. Each stage reads what the one before left in `--work`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STAGES = ("vae", "base", "experts", "phrases", "export", "evaluate")


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


def train_base(work: Path, scale: float, smoke: bool) -> None:
    """One DiT for all noise levels, together with the text encoder, at constant rates."""
    from demo import parallel
    from demo.dit_train import DitTraining, train_dit

    config = DitTraining(seconds=1857 * scale)
    if smoke:
        config = replace(config, seconds=2.0, first_clips=2, batch=2, compiled=False)
    parallel.launch(train_dit, 2, config, work / "vae.pt", work / "base.pt")


def train_experts(work: Path, scale: float, smoke: bool, resume: bool = False) -> None:
    """Each expert on its own noise levels, from the base or from where it stands, rates falling to zero at the end.

    The high-noise expert takes most of the time: it alone decides where the object goes, and it learns that last.
    """
    from demo import parallel
    from demo.dit_train import BOUNDARY, DitTraining, train_dit

    # Many clips: with 500 the high-noise expert learned them by heart.
    common = DitTraining(first_clips=2000, clips_per_step=0.4, average=0.999, freeze_text=True, varied=0.5)
    runs = {
        "high": replace(common, seconds=4400 * scale, decay_from=0.7, low=BOUNDARY, high=1.0, seed=6),
        "low": replace(common, seconds=1300 * scale, decay_from=0.2, low=0.0, high=BOUNDARY, seed=7),
    }
    for name, config in runs.items():
        if smoke:
            config = replace(config, seconds=2.0, first_clips=2, batch=2, compiled=False)
        start = work / (f"{name}.pt" if resume else "base.pt")
        parallel.launch(train_dit, 2, config, work / "vae.pt", work / f"{name}.pt", start)


def train_phrases(work: Path, scale: float, smoke: bool) -> None:
    """The text encoder alone, on phrases whose meaning is in the order of their words."""
    from demo.phrases import PhraseTraining, train_phrases

    train_phrases(PhraseTraining(seconds=1.0 if smoke else 300 * scale), work)


def train_i2v(work: Path, scale: float, smoke: bool) -> None:
    """An adapter of each expert, with a first frame given and now and then a last one.

    One that is there already is trained further, over the experts as they are now.

    Learning to look at given frames is most of it, and both experts must, so they share the time about evenly. So few
    numbers bear high rates: 70 steps of the low-noise expert on nine-frame clips at 2e-3, 4e-3 and 8e-3 ended at a
    loss of 0.234, 0.171 and 0.153.
    """
    import torch
    from demo import given, parallel
    from demo.dit import DitConfig
    from demo.dit_train import DitTraining, train_dit

    from wan.configs import WAN_CONFIGS

    boundary = WAN_CONFIGS["i2v-demo"].boundary

    common = DitTraining(
        batch=8, first_clips=40, clips_per_step=0.5, matrix_rate=5e-3, other_rate=5e-3, decay_from=0.4, average=0.99,
        no_caption=0.15, freeze_text=True, rank=16, given=given.draw_channels, caption=given.draw_caption,
        model=DitConfig(in_dim=DitConfig.in_dim + given.CHANNELS),
    )  # fmt: skip
    runs = {
        "high": replace(common, seconds=800 * scale, low=boundary, high=1.0, seed=101),
        "low": replace(common, seconds=700 * scale, low=0.0, high=boundary, seed=102),
    }
    for name, config in runs.items():
        if smoke:
            config = replace(config, seconds=2.0, first_clips=2, batch=2, compiled=False)
        out, start = work / f"i2v_{name}.pt", work / f"{name}.pt"
        if out.exists():
            torch.save(torch.load(out, weights_only=True) | {"base": torch.load(start, weights_only=True)["dit"]}, out)
            start = out
        parallel.launch(train_dit, 2, config, work / "vae.pt", out, start)


def train_few_step(work: Path, scale: float, smoke: bool) -> None:
    """A LoRA of each expert: a round on the teacher's own ways, then one that also begins where the student gets."""
    from demo import parallel
    from demo.export import EXPERTS
    from demo.few_step import FewStepTraining, collect, distil, student_file

    first = FewStepTraining(collecting=330 * scale, training=480 * scale)
    second = replace(first, collecting=270 * scale, training=420 * scale, seed=first.seed + 1)
    for name in EXPERTS:
        student_file(work, name).unlink(missing_ok=True)
    files: list[Path] = []
    for number, config in enumerate((first, second)):
        if smoke:
            config = replace(config, collecting=1e-3, training=1e-3, batch=2, compiled=False)
        ways = work / f"few_step_ways{number}"
        parallel.launch(collect, 2, config, work, ways)
        files += [ways.with_name(f"{ways.name}_{rank}.pt") for rank in range(2)]
        parallel.launch(distil, len(EXPERTS), config, work, files)


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


def evaluate_i2v(folder: Path, clips: int, split: str, seed: int) -> None:
    """The same for clips that begin with a picture, in the checkpoint's own folder; its README gets the table."""
    from demo import evaluate_i2v as measure
    from demo.evaluate import save

    result = measure.evaluate(folder, split, clips, seed)
    save(result, folder / "i2v" / "results.json")
    print(measure.table(result))
    if (folder / "i2v" / "README.md").is_file():
        measure.write_into(folder / "i2v" / "README.md", result, measure.table(result))


def evaluate_few_step(folder: Path, clips: int, split: str, seed: int) -> None:
    """The four steps beside the twenty, in the checkpoint's own folder; its README gets the table."""
    from demo import evaluate_few_step as measure
    from demo.evaluate import save
    from demo.evaluate_i2v import write_into

    result = measure.evaluate(folder, split, clips, seed)
    save(result, folder / "few_step" / "results.json")
    print(measure.table(result))
    if (folder / "few_step" / "README.md").is_file():
        write_into(folder / "few_step" / "README.md", result, measure.table(result))


def frames(folder: Path) -> None:
    """The picture of README, in the checkpoint's own folder."""
    from demo.frames import draw

    draw(folder, folder / "frames.png")


def go_on(args: argparse.Namespace, folder: Path) -> tuple[tuple[str, ...], Path]:
    """Train on the checkpoint in `folder`; the stages that are left then, and the folder they are for."""
    from demo.export import EXPERTS, export_adapters, read_back
    from demo.few_step import export_loras

    read_back(folder, args.work)
    if args.stage == "resume":
        train_experts(args.work, args.scale, args.smoke, resume=True)
    if args.stage in ("resume", "phrases"):
        train_phrases(args.work, args.scale, args.smoke)
        return ("export", "evaluate"), args.work / "demo"
    if args.stage == "i2v":
        train_i2v(args.work, args.scale, args.smoke)
        export_adapters({name: args.work / f"i2v_{name}.pt" for name in EXPERTS}, folder)
    else:
        train_few_step(args.work, args.scale, args.smoke)
        export_loras(args.work, folder)
    return (f"evaluate-{args.stage}",), folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    later = ("resume", "i2v", "evaluate-i2v", "few_step", "evaluate-few_step", "frames")
    parser.add_argument("stage", choices=(*STAGES, "all", *later))
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
    clips = 2 if args.smoke else args.prompts
    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.stage in ("resume", "i2v", "few_step") or (args.stage == "phrases" and args.folder):
        stages, folder = go_on(args, folder)
    work, rest = args.work, (args.work, args.scale, args.smoke)
    run: dict[str, Callable[[], None]] = {
        "vae": lambda: train_vae(*rest),
        "base": lambda: train_base(*rest),
        "experts": lambda: train_experts(*rest),
        "phrases": lambda: train_phrases(*rest),
        "export": lambda: export(work, folder),
        "evaluate": lambda: evaluate(folder, clips, args.split, args.seed, work / "results.json"),
        "evaluate-i2v": lambda: evaluate_i2v(folder, clips, args.split, args.seed),
        "evaluate-few_step": lambda: evaluate_few_step(folder, clips, args.split, args.seed),
        "frames": lambda: frames(folder),
    }
    for stage in stages:
        run[stage]()


if __name__ == "__main__":
    main()
