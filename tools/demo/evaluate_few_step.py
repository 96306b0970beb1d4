"""Measures the demo model in four steps beside its twenty: the same prompts and seeds, judged from pixels."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from . import scenes
from .evaluate import cell, drawn, in_two, sampled, summary, verdict

LABELS = {
    "plain": "20 steps, guided",
    "few_step": "`--few_step demo-4step`",
    "control": "4 steps, guided, no LoRA",
}
SECONDS = "seconds a clip"


def evaluate(folder: Path, split: str, count: int, seed: int) -> dict[str, Any]:
    """Results over `count` prompts of the combinations in `split`, in two single-threaded processes."""
    found, seconds = in_two(_share, folder, split, count, seed)
    result = {"split": split, "clips": count, "seed": seed, "seconds": seconds}
    for row in LABELS:
        entries = [entry[row] for entry in found]
        result[row] = {
            "forwards": entries[0]["forwards"], **summary(entries),
            SECONDS: round(fmean(entry["seconds"] for entry in entries), 2),
            "PSNR to 20 steps, dB": round(fmean(entry["psnr"] for entry in entries), 2),
        }  # fmt: skip
    return result


def _share(folder: str, split: str, numbers: list[int], seed: int) -> list[dict[str, Any]]:
    import wan
    from wan.configs import WAN_CONFIGS

    from .evaluate_i2v import psnr

    torch.set_num_threads(1)
    config, place = WAN_CONFIGS["t2v-demo"], Path(folder)
    pairs = {f"lora_{name}": str(place / "few_step" / f"{name}.safetensors") for name in ("high", "low")}
    plain = wan.WanT2V(config, folder, device="cpu")
    student = wan.WanT2V(config, folder, device="cpu", few_step="demo-4step", **pairs)
    ways = {"plain": (plain, config.sample_steps), "few_step": (student, config.sample_steps), "control": (plain, 4)}
    found = []
    for number, rng, scene in drawn(split, numbers, seed):
        prompt, entry, clips = scenes.caption(scene, rng, complete=True), {}, {}
        for row, (pipe, steps) in ways.items():
            begun = time.monotonic()
            clips[row] = sampled(pipe, prompt, number, sampling_steps=steps)
            took = time.monotonic() - begun
            forwards = sum(each.done.total() for each in pipe.report.forwards)
            likeness = psnr(clips[row], clips["plain"])
            entry[row] = verdict(clips[row], scene) | {"seconds": took, "forwards": forwards, "psnr": likeness}
        found.append(entry)
    return found


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [f"| | {' | '.join(LABELS.values())} |", "|---|" + "---|" * len(LABELS)]
    for name in result["plain"]:
        cells = [str(v) if isinstance(v := result[row][name], int) else cell(v) for row in LABELS]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)
