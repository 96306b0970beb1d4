"""Upstream's Animate class, Wan 2.2: a character moves as somebody in a video does, or takes their place in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wan.conditioning.character import open_sources
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.optimizations import LoRA
from wan.engine.types import Request
from wan.families.animate import AnimateInputs
from wan.pipeline import WanPipeline, resolve_seed, scale_pair

if TYPE_CHECKING:
    from wan.modules.clip import CLIPModel

OVERLAPS = (1, 5)
"""How many frames of a clip may be the last of the clip before: what the model was trained with."""


class WanAnimate(WanPipeline):
    """Video of a character that moves as given. See `WanPipeline` for the constructor.

    `use_relighting_lora` merges the checkpoint's LoRA that lights the character as the video it is put into.
    """

    kind = "animate"

    def __init__(
        self, config: Any, checkpoint_dir: str | Path | None, device_id: int = 0, rank: int = 0, t5_fsdp: bool = False,
        dit_fsdp: bool = False, use_sp: bool = False, t5_cpu: bool = False, init_on_cpu: bool = True,
        convert_model_dtype: bool = False, use_relighting_lora: bool = False, **extras: Any,
    ) -> None:  # fmt: skip
        self._light: tuple[str, ...] = (relighting_lora(config, checkpoint_dir),) if use_relighting_lora else ()
        if use_relighting_lora:
            plan = extras.get("optimizations")
            extras["lora"] = self._lit(extras.get("lora") or (plan.get(LoRA).lora if plan is not None else ()))
        super().__init__(
            config, checkpoint_dir, device_id, rank, t5_fsdp, dit_fsdp, use_sp, t5_cpu, init_on_cpu,
            convert_model_dtype, **extras,
        )  # fmt: skip

    def generate(
        self,
        src_root_path: str | os.PathLike[str],
        replace_flag: bool = False,
        clip_len: int = 77,
        refert_num: int = 1,
        shift: float = 5.0,
        sample_solver: str = "dpm++",
        sampling_steps: int = 20,
        guide_scale: float | tuple[float, float] = 1,
        input_prompt: str = "",
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        noise_device: str | None = None,
        **extras: Any,
    ) -> Tensor | None:
        """A video [3, N, H, W] in -1..1 of the length and size of src_pose.mp4, or None when a `sink` took the frames.

        `src_root_path` is the folder that Wan's preprocessing made. With `replace_flag` the character takes the place
        of the person that its mask cuts out. Clips of `clip_len` frames begin with the last `refert_num` (1 or 5) of
        the one before. `input_prompt` "" is the config's; the rest is as in `WanT2V.generate`. Raises BadRequest.
        """
        check_overlap(refert_num, clip_len)
        sources = open_sources(
            src_root_path, replace=replace_flag, face_size=self.config.face_size, stride=self.vae_stride,
            patch=self.patch_size,
        )  # fmt: skip
        width, height = sources.size
        request = Request(
            task="animate", prompt=input_prompt or self.config.prompt,
            negative_prompt=n_prompt or self.sample_neg_prompt, height=height, width=width,
            num_frames=sources.frames, steps=sampling_steps, shift=shift, solver=sample_solver,
            guide_scale=scale_pair(guide_scale), seed=resolve_seed(seed), noise_device=noise_device,
            inputs=AnimateInputs(sources=sources, clip_len=clip_len, overlap=refert_num),
        )  # fmt: skip
        if "lora" in extras:
            extras["lora"] = self._lit(extras["lora"])
        return self.run(request, offload_model=offload_model, **extras)

    def _lit(self, others: str | Sequence[str]) -> tuple[str, ...]:
        """The LoRAs of the constructor or of a call, with the one for light where it was asked for."""
        return *self._light, *((others,) if isinstance(others, str) else others)

    @property
    def noise_model(self) -> nn.Module:
        """Upstream's name of `model`."""
        return self.model

    @property
    def clip(self) -> CLIPModel:
        """Upstream's wrapper over the engine's CLIP: `.visual(videos)`, `.model`."""
        from wan.modules.clip import CLIPModel

        return CLIPModel.of(self.engine.network("clip"))


def relighting_lora(config: Any, checkpoint_dir: str | Path | None) -> str:
    """Where the relighting LoRA lies. Raises BadCheckpoint where it is not."""
    path = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser() / config.lora_checkpoint
    if path is None or not path.is_file():
        where = "no checkpoint folder is given" if path is None else f"{str(path)!r} does not exist"
        raise BadCheckpoint(
            f"--use_relighting_lora: {where}; download {config.lora_checkpoint} of Wan2.2-Animate-14B into --ckpt_dir"
        )
    return str(path)


def check_overlap(refert_num: int, clip_len: int) -> None:
    """Raise BadRequest for an overlap that the model was not trained with."""
    if refert_num not in OVERLAPS:
        raise BadRequest(f"--refert_num {refert_num!r}: clips overlap by 1 frame or 5 here; 1 is the default")
    if clip_len <= refert_num:
        raise BadRequest(
            f"--frame_num {clip_len!r}: a clip must be longer than the {refert_num} frames it shares with the one "
            "before; 77 is the default"
        )
