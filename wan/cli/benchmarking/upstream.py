"""`--upstream DIR`: the user's clone of Wan's own code as a variant, and how far each stage of it is from ours.

The clone runs in a process of its own (`upstream_driver.py`), as its package has the name of this one.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli.benchmarking.trial import Seen, Trial
from wan.engine.errors import BadRequest, GenerationFailed, IncompatibleOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from wan.cli.request import Wanted
    from wan.engine.hardware import Hardware

    Array = np.ndarray[Any, Any]


class Upstream:
    """The clone's pipeline behind the benchmark's interface."""

    frames: torch.Tensor

    def __init__(self, folder: Path, wanted: Wanted, hardware: Hardware, noise: torch.Tensor | None) -> None:
        self.wanted, self.plan = wanted, f"unmodified code in {folder}"
        self._scratch = tempfile.TemporaryDirectory()
        asked = Path(self._scratch.name, "asked.pickle")
        asked.write_bytes(pickle.dumps(_asked(wanted, hardware, noise)))
        driver = str(Path(__file__).with_name("upstream_driver.py"))
        self._process = subprocess.Popen(
            [sys.executable, driver, str(folder.resolve()), str(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            self._answer()
        except GenerationFailed:
            self.close()
            raise

    def close(self) -> None:
        """The clone's process leaves when nothing can be asked any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._scratch.cleanup()

    def run(self, watch: bool) -> Trial:
        """Every run is watched: the hooks see what passes between stages and cost nothing."""
        import numpy as np
        import torch

        from wan.video import to_pixels

        target = Path(self._scratch.name, "run.npz")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{target}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise GenerationFailed("the process of --upstream ended; its own words are above") from error
        told = self._answer()
        with np.load(target) as arrays:
            found = dict(arrays)
        self.frames = to_pixels(torch.from_numpy(found["frames"]))
        return Trial(
            seconds=sum(told["stages"].values()),
            stages=told["stages"],
            components=told["stages"],
            peaks=told["peaks"],
            latents=found["latents"][None],
            forwards=told["forwards"],
            seen=_seen(found, self.wanted),
        )

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise GenerationFailed("the process of --upstream ended; its own words are above")
        return json.loads(line)


def check_upstream(folder: Path, wanted: Wanted) -> None:
    """Raise BadRequest or IncompatibleOptions where the clone cannot make the same video."""
    if not (folder / "wan" / "__init__.py").is_file():
        raise BadRequest(f"--upstream {str(folder)!r} has no wan/__init__.py: name the folder of the clone")
    inputs = wanted.inputs
    if wanted.checkpoint is None or wanted.files:
        raise IncompatibleOptions("--upstream reads a checkpoint folder in the original layout: give --ckpt_dir alone")
    if wanted.solver == "euler" or (inputs is not None and (inputs.prepare or inputs.beyond or inputs.construct)):
        what = "--sample_solver euler" if wanted.solver == "euler" else "an input flag"
        raise IncompatibleOptions(f"--upstream: {what} asks {wanted.task} for what the original classes do not have")


def _asked(wanted: Wanted, hardware: Hardware, noise: torch.Tensor | None) -> dict[str, Any]:
    """What the driver needs, in plain types."""
    import torch

    from wan.families import class_name

    if noise is None:
        config, generator = wanted.config, torch.Generator().manual_seed(wanted.seed)
        time, rows, columns = config.vae_stride
        frames = (wanted.num_frames - 1) // time + 1
        shape = (config.get("z_dim", 16), frames, wanted.height // rows, wanted.width // columns)
        noise = torch.randn(shape, generator=generator)[None]
    sampling = {"shift": wanted.shift, "sample_solver": wanted.solver, "sampling_steps": wanted.steps}
    rest = {"guide_scale": wanted.guide_scale, "n_prompt": wanted.n_prompt, "seed": wanted.seed}
    return {
        "task": wanted.task,
        "class": class_name(wanted.task),
        "checkpoint": str(wanted.checkpoint),
        "construct": {"device_id": hardware.device.index or 0, "rank": 0},
        "prompt": wanted.prompt,
        "noise": noise[0].numpy(),
        "arguments": {**wanted.arguments, **sampling, **rest, "offload_model": True},
    }


def _seen(found: Mapping[str, Array], wanted: Wanted) -> Seen:
    """The guided velocity is that of the step's expert: the high-noise one has the second scale."""
    from wan.pipeline import scale_pair

    scale = scale_pair(wanted.guide_scale)[1]
    cond, uncond = found["velocity 1"], found["velocity 2"]
    texts = {branch: found[f"text {branch}"] for branch in ("cond", "uncond") if f"text {branch}" in found}
    return Seen(texts=texts, velocity=(uncond + scale * (cond - uncond))[None])


def stage_differences(
    ours: Trial, theirs: Trial, frames: tuple[Array, Array] | None = None
) -> Iterator[tuple[str, float | None, float | None]]:
    """(stage, relative L2 distance, largest difference) from the texts to the frames, in the order of computation.

    Both are None where the shapes differ.
    """
    if ours.seen is not None and theirs.seen is not None:
        for branch, text in theirs.seen.texts.items():
            # Theirs ends with the last token; ours goes on in zeros.
            yield f"text, {branch}", *_apart(ours.seen.texts[branch][: len(text)], text)
        if ours.seen.velocity is not None and theirs.seen.velocity is not None:
            yield "first velocity", *_apart(ours.seen.velocity, theirs.seen.velocity)
    yield "final latents", *_apart(ours.latents, theirs.latents)
    if frames is not None:
        yield "frames, of 255", *_apart(frames[0].astype("float32"), frames[1].astype("float32"))


def _apart(ours: Array, theirs: Array) -> tuple[float | None, float | None]:
    import numpy as np

    if ours.shape != theirs.shape:
        return None, None
    difference = ours - theirs
    return float(np.linalg.norm(difference) / np.linalg.norm(theirs)), float(np.abs(difference).max())
