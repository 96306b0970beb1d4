"""Measures a demo checkpoint: prompts of combinations never trained on, sampled by `wan.WanT2V`, judged from pixels.

Beside the model stand the two bounds of the judge: the rendered clip of the same scene, and that clip through the VAE.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from wan.cli.benchmarking.intervals import wilson
from wan.cli.judge import judge

from . import scenes

ATTRIBUTES = ("color", "shape", "motion", "size", "speed", "tone", "texture")
ROWS = ("model", "ground truth", "VAE reconstruction")


def evaluate(folder: Path, split: str, count: int, seed: int, guide_scale: float | None = None) -> dict[str, Any]:
    """Results over `count` prompts of the combinations in `split`, in two single-threaded processes."""
    found, seconds = in_two(_share, folder, split, count, seed, guide_scale)
    result = {"split": split, "prompts": count, "seed": seed, "seconds": seconds}
    rows = {row: summary([entry[row] for entry in found]) for row in ROWS}
    cases = [entry["case"] for entry in found]
    return result | rows | {"by motion": _by_motion(cases), "disobeyed": [case for case in cases if case["wrong"]]}


def in_two(
    share: Callable[..., list[dict[str, Any]]], folder: Path, split: str, count: int, seed: int, *more: Any
) -> tuple[list[dict[str, Any]], float]:
    """What `share(folder, split, numbers, seed, *more)` finds for either half of the numbers, each in a process of its
    own, and the seconds that took."""
    started = time.monotonic()
    with mp.get_context("spawn").Pool(2) as pool:
        jobs = [(str(folder), split, list(range(part, count, 2)), seed, *more) for part in range(2)]
        found = [entry for part in pool.starmap(share, jobs) for entry in part]
    return found, round(time.monotonic() - started, 1)


def drawn(split: str, numbers: Iterable[int], seed: int) -> Iterator[tuple[int, random.Random, scenes.Scene]]:
    """The scenes of these numbers, of the combinations in turn, each with what its captions are drawn from."""
    combos = scenes.split_combos()[split]
    for number in numbers:
        rng = random.Random(f"{seed}/{split}/{number}")
        yield number, rng, scenes.random_scene(rng, combos[number % len(combos)])


def sampled(pipe: Any, prompt: str, seed: int, **other: Any) -> Tensor:
    """A clip [3, 33, 96, 96] of the text-to-video demo, with its task's settings where `other` says none."""
    from wan.configs import WAN_CONFIGS

    config = WAN_CONFIGS["t2v-demo"]
    settings = {
        "size": (scenes.SIDE, scenes.SIDE), "frame_num": scenes.FRAMES, "shift": config.sample_shift,
        "sampling_steps": config.sample_steps, "guide_scale": config.sample_guide_scale,
    }  # fmt: skip
    video: Tensor = pipe.generate(prompt, seed=seed, **settings | other)
    return video


def _share(folder: str, split: str, numbers: list[int], seed: int, guide_scale: float | None) -> list[dict[str, Any]]:
    import wan
    from wan.configs import WAN_CONFIGS

    torch.set_num_threads(1)
    config = WAN_CONFIGS["t2v-demo"]
    scale = {} if guide_scale is None else {"guide_scale": guide_scale}
    pipe = wan.WanT2V(config, folder, device="cpu")
    found = []
    for number, rng, scene in drawn(split, numbers, seed):
        prompt = scenes.caption(scene, rng, complete=True)
        video = sampled(pipe, prompt, number, **scale)
        truth = scenes.render([scene])[0]
        with torch.no_grad():
            rebuilt = pipe.vae.decode(pipe.vae.encode([truth]))[0]
        clips = dict(zip(ROWS, (video, truth, rebuilt), strict=True))
        verdicts = {row: verdict(clip, scene) for row, clip in clips.items()}
        found.append({**verdicts, "case": _case(number, prompt, scene, verdicts["model"])})
    return found


def _case(number: int, prompt: str, scene: scenes.Scene, found: dict[str, Any]) -> dict[str, Any]:
    """What was asked, and what was read where that is something else."""
    wrong = {name: found["read"][name] for name, right in found["right"].items() if not right}
    return {"number": number, "prompt": prompt, "motion": scene.motion, "wrong": wrong}


def _by_motion(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each motion asked for, how many clips showed it and what the others showed."""
    table: dict[str, dict[str, Any]] = {}
    for case in cases:
        row = table.setdefault(case["motion"], {"right": 0, "of": 0, "read as": {}})
        row["of"] += 1
        read = case["wrong"].get("motion")
        if read is None:
            row["right"] += 1
        else:
            row["read as"][read] = row["read as"].get(read, 0) + 1
    return table


def verdict(video: Tensor, scene: scenes.Scene) -> dict[str, Any]:
    """What of a scene the judge finds in a clip: {"right": {attribute: bool}, what it read, and numbers}."""
    seen, words = judge(video), scene.words()
    read = {name: getattr(seen, name) for name in words}
    return {"right": seen.agrees(**words), "read": read, "shape_iou": seen.shape_iou,
            "color_distance": seen.color_distance, "outline_iou": seen.outline_iou}  # fmt: skip


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of clips with their intervals, and means of the numbers."""
    rights: list[dict[str, bool]] = [entry["right"] for entry in entries]
    shares = {name: [right[name] for right in rights if name in right] for name in ATTRIBUTES}
    shares["color, shape and motion"] = [all(right[k] for k in ("color", "shape", "motion")) for right in rights]
    shares["everything at once"] = [all(right.values()) for right in rights]
    found: dict[str, Any] = {}
    for name, hits in shares.items():
        low, high = wilson(sum(hits), len(hits))
        found[name] = {"right": sum(hits), "of": len(hits), "low": round(low, 4), "high": round(high, 4)}
    for name in ("shape_iou", "color_distance", "outline_iou"):
        values = [entry[name] for entry in entries if entry[name] is not None]
        found[name] = round(sum(values) / max(1, len(values)), 4)
    return found


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [f"| | {' | '.join(ROWS)} |", "|---|" + "---|" * len(ROWS)]
    for name in result["model"]:
        cells = [cell(result[row][name]) for row in ROWS]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, dict):
        share = value["right"] / max(1, value["of"])
        return f"{value['right']}/{value['of']} = {share:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
    return f"{value:.3f}"


def save(result: dict[str, Any], path: Path) -> None:
    """As JSON, one file with everything measured."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
