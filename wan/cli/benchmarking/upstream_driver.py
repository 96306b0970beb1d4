"""Runs somebody's clone of Wan's own code, unmodified, and tells what each stage computed and took.

A program of its own: `import wan` must find the clone, so nothing of this project is imported here. It is started with
the clone's folder and a file of arguments, and then reads one line an order from standard input: the file to write the
run's arrays to. It answers each with a line of JSON. What the clone prints goes to standard error.

Hooks are set from outside: on the text encoder, the transformers, the VAE's decoder and `torch.randn`, which gives the
noise of the comparison wherever the clone draws latents of that shape.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Told:
    """What one run showed. A stage ends where the next begins."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self.arrays: dict[str, Any] = {}
        self.stages: dict[str, float] = {}
        self.forwards = 0
        self._stage, self._since = "text", self._now()

    def stage(self, name: str) -> None:
        now = self._now()
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = name, now

    def first(self, name: str, value: Any) -> None:
        """Keep `value` unless `name` is known."""
        if name not in self.arrays:
            self.arrays[name] = value.detach().float().cpu().numpy()

    def forward(self, module: Any, inputs: Any, output: Any) -> None:
        """A transformer has run: with classifier-free guidance the first call has the prompt, the second has not."""
        if self.forwards == 0:
            self.stage("denoise")
        self.forwards += 1
        self.first(f"velocity {self.forwards}" if self.forwards < 3 else "velocity 2", output[0])

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


class Encoder:
    """The clone's text encoder, which is asked for the prompt and then for the negative one."""

    def __init__(self, encoder: Any) -> None:
        self.__dict__["encoder"] = encoder
        self.__dict__["told"] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        texts = self.encoder(*args, **kwargs)
        for text in texts:
            self.told.first("text uncond" if "text cond" in self.told.arrays else "text cond", text)
        return texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "told":
            self.__dict__["told"] = value
        else:
            setattr(self.encoder, name, value)


@contextmanager
def drawing(noise: Any) -> Iterator[None]:
    """Let `torch.randn` give `noise` [C, T, H, W] wherever that shape is drawn."""
    import torch

    real = torch.randn

    def randn(*size: Any, **kwargs: Any) -> Any:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
        if shape != tuple(noise.shape):
            return real(*size, **kwargs)
        return noise.to(kwargs.get("device") or "cpu", kwargs.get("dtype") or torch.float32)

    torch.randn = randn
    try:
        yield
    finally:
        torch.randn = real


def build(folder: Path, asked: dict[str, Any]) -> Any:
    """The clone's pipeline for the task."""
    sys.path[0] = str(folder)
    import wan

    if Path(wan.__file__).resolve().parent != folder.resolve() / "wan":
        raise SystemExit(f"{folder} holds no package wan: {wan.__file__} was found instead")
    from wan.configs import WAN_CONFIGS

    if asked["task"] not in WAN_CONFIGS:
        raise SystemExit(f"{asked['task']} is not among the tasks of {folder}: {', '.join(WAN_CONFIGS)}")
    config = WAN_CONFIGS[asked["task"]]
    pipe = getattr(wan, asked["class"])(config=config, checkpoint_dir=asked["checkpoint"], **asked["construct"])
    pipe.text_encoder = Encoder(pipe.text_encoder)
    return pipe


def transformers(pipe: Any) -> list[Any]:
    """The networks that denoise, under 2.1's name or 2.2's."""
    names = ("model", "high_noise_model", "low_noise_model")
    return [vars(pipe)[name] for name in names if name in vars(pipe)]


def run(pipe: Any, asked: dict[str, Any], target: str) -> dict[str, Any]:
    """One video; its arrays go to `target`, the rest is returned."""
    import numpy as np
    import torch

    cuda = torch.cuda.is_available()
    told = Told(torch.cuda.synchronize if cuda else lambda: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    pipe.text_encoder.told = told
    handles = [network.register_forward_hook(told.forward) for network in transformers(pipe)]
    decode = pipe.vae.decode

    def decoding(latents: Any) -> Any:
        told.first("latents", latents[0])
        told.stage("decode")
        return decode(latents)

    pipe.vae.decode = decoding
    try:
        with drawing(torch.from_numpy(asked["noise"])):
            video = pipe.generate(asked["prompt"], **asked["arguments"])
        told.stage("end")
    finally:
        del pipe.vae.decode
        for handle in handles:
            handle.remove()
    told.first("frames", video)
    np.savez(target, **told.arrays)
    peaks = {}
    if cuda:
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"stages": told.stages, "forwards": told.forwards, "peaks": peaks}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = pickle.loads(Path(sys.argv[2]).read_bytes())
    pipe = build(Path(sys.argv[1]), asked)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(run(pipe, asked, line.rstrip("\n"))), file=answers)


if __name__ == "__main__":
    main()
