"""What is measured of one clip beside the plain one that began with the same noise, and where that is kept.

A line is written for each clip as soon as it is made, so that a survey that is cut off goes on behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli.benchmarking import quality
from wan.cli.benchmarking.trial import Trial
from wan.engine.errors import BadRequest, OutputError

if TYPE_CHECKING:
    import torch

CONTINUOUS = ("shape_iou", "color_distance", "outline_iou")
"""What the judge measures; these move before an attribute is read otherwise."""
Sample = dict[str, Any]


@dataclass
class Samples:
    """All lines so far. A case that failed has one line that says why."""

    path: Path
    found: dict[tuple[str, int], Sample] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def load(self) -> None:
        """Read what an earlier process wrote; a last line that it did not finish is left out."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self._hold(entry)

    def add(self, case: str, number: int, sample: Sample) -> None:
        """Raises OutputError."""
        self._write({"case": case, "number": number, **sample})

    def fail(self, case: str, reason: str) -> None:
        """Raises OutputError."""
        self._write({"case": case, "failed": reason})

    def missing(self, case: str, number: int) -> bool:
        """Whether this clip is still to be made."""
        return case not in self.failures and (case, number) not in self.found

    def of(self, case: str) -> dict[int, Sample]:
        """Number of the prompt -> what was measured."""
        return {number: sample for (name, number), sample in sorted(self.found.items()) if name == case}

    def _write(self, entry: Sample) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")
        except OSError as error:
            raise OutputError(f"--output_dir: {str(self.path)!r} cannot be written: {error.strerror}") from error
        self._hold(entry)

    def _hold(self, entry: Any) -> None:
        if not isinstance(entry, dict) or "case" not in entry:
            raise BadRequest(f"{str(self.path)!r} holds no samples; name the results of a --mode quality")
        if "failed" in entry:
            self.failures[entry["case"]] = entry["failed"]
        else:
            self.found[entry["case"], entry["number"]] = entry


def measured(
    trial: Trial,
    frames: torch.Tensor,
    reference: tuple[torch.Tensor, Any] | None,
    shows: Mapping[str, str | None] | None,
    trained: int,
) -> Sample:
    """Everything about one clip. `reference` are the plain clip's frames and latents, None for the plain clip itself.

    `shows` is what the demo's judge must read; None where it can read nothing. Frames are uint8 [N, H, W, 3].
    """
    sample: Sample = {"seconds": round(trial.seconds, 4), "denoise_s": round(trial.stages.get("denoise", 0.0), 4)}
    sample |= {
        "cpu_s": round(trial.cpu_seconds, 4),
        "forwards": trial.forwards,
        "peak_gib": max(trial.peaks.values(), default=0) / 2**30,
    }
    if reference is not None:
        found, _ = quality.compare(frames, reference[0])
        sample |= {name: found[name] for name in ("psnr_db", "ssim", "lpips", "frames_max") if name in found}
        sample |= _latents(trial.latents, reference[1])
    if len(frames) > trained:
        sample |= joints(frames, trained)
    if shows is not None and len(frames) > 1:
        sample |= _judged(frames, shows, trained)
    return sample


def joints(frames: torch.Tensor, trained: int) -> Sample:
    """How far frames are from the ones before: usually (the median), where two clips would meet, and at most.

    In root mean squares of 8-bit levels. Clips of the trained length that share a frame meet behind that frame.
    """
    steps = [float((b.float() - a.float()).square().mean().sqrt()) for a, b in zip(frames, frames[1:], strict=False)]
    usual = sorted(steps)[len(steps) // 2]
    at = [steps[place] for place in range(trained - 1, len(steps), trained - 1)]
    return {"change_usual": usual, "change_joint": sum(at) / len(at), "change_most": max(steps)}


def _latents(mine: Any, plain: Any) -> Sample:
    import numpy as np

    if mine.shape != plain.shape:
        return {}
    return {"latents_differ": float(np.linalg.norm(mine - plain) / np.linalg.norm(plain))}


def _judged(frames: torch.Tensor, shows: Mapping[str, str | None], trained: int) -> Sample:
    """The verdict; of a long clip that of each stretch of the trained length, right where all of them are."""
    from wan.cli.judge import judge

    last = max(len(frames) - trained, 0)
    parts = [frames[start : start + trained] for start in range(0, last + 1, max(trained - 1, 1))]
    verdicts = [judge(part.permute(3, 0, 1, 2).float() / 127.5 - 1) for part in parts]
    rights = [verdict.agrees(**shows) for verdict in verdicts]
    sample: Sample = {"right": {name: all(right[name] for right in rights) for name in rights[0]}}
    if len(parts) > 1:
        sample["parts_right"] = rights
    for name in CONTINUOUS:
        values = [value for verdict in verdicts if (value := getattr(verdict, name)) is not None]
        if values:
            sample[name] = sum(values) / len(values)
    return sample
