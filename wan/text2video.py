"""Upstream's text-to-video class, 2.1's and 2.2's: one expert or two by config."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wan.engine.types import Request
from wan.pipeline import WanPipeline, resolve_seed, scale_pair


class WanT2V(WanPipeline):
    """Text to video. See `WanPipeline` for the constructor."""

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        noise_device: str | None = None,
        **extras: Any,
    ) -> Tensor | None:
        """A video [3, N, H, W] in -1..1, or None when a `sink` took the frames.

        `size` is (width, height), `guide_scale` one number or (low-noise, high-noise), `n_prompt` "" means the
        config's negative prompt, `seed` -1 a random one. `noise_device` "cpu" makes seeds agree across cards.
        `extras` are those of `WanPipeline.run` (`sink`, `keeper`, `group`, ...) and per-call options by name
        (`use_batched_cfg=True`, `vae_cpu=True`). Raises BadRequest.
        """
        width, height = size
        request = Request(
            task="t2v",
            prompt=input_prompt,
            negative_prompt=n_prompt or self.sample_neg_prompt,
            height=height,
            width=width,
            num_frames=frame_num,
            steps=sampling_steps,
            shift=shift,
            solver=sample_solver,
            guide_scale=scale_pair(guide_scale),
            seed=resolve_seed(seed),
            noise_device=noise_device,
        )
        return self.run(request, offload_model=offload_model, **extras)
