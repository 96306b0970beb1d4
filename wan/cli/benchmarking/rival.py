"""diffusers' `WanPipeline` on the weights of one of our checkpoint folders, doing the same work step by step.

Same networks (keys mapped one to one), noise, timesteps, guidance and dtype, so that times can be compared and latents
must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wan.cli.benchmarking.trial import Clock, Trial
from wan.components import Checkpoint
from wan.engine.sampling.schedule import SPACINGS, shifted
from wan.engine.types import Component
from wan.engine.weights.keymap import DIFFUSERS_DIT, TRANSFORMERS_T5, KeyMap, diffusers_vae
from wan.layouts.library import text_encoder_config, transformer_config, vae_config
from wan.pipeline import scale_pair
from wan.video import to_pixels

if TYPE_CHECKING:
    from wan.cli.request import Wanted

FLOAT32_MODULES = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
"""What diffusers itself keeps in float32 when it loads a checkpoint in another dtype."""


class Rival:
    """A loaded `WanPipeline` behind the benchmark's interface. `compiled` is diffusers' own way to compile blocks."""

    frames: Tensor

    def __init__(self, wanted: Wanted, config: Any, clock: Clock, noise: Tensor | None, *, compiled: bool) -> None:
        self.wanted, self.config, self.clock, self.noise = wanted, config, clock, noise
        self.plan = "WanPipeline with compile_repeated_blocks" if compiled else "WanPipeline as it comes"
        self.pipe = build_pipeline(wanted, config, clock)
        if compiled:
            for model in filter(None, (self.pipe.transformer, self.pipe.transformer_2)):
                model.compile_repeated_blocks(fullgraph=True)

    def run(self, watch: bool) -> Trial:
        """`watch` shows nothing here."""
        wanted, config = self.wanted, self.config
        low, high = scale_pair(wanted.guide_scale)
        time_stride, row_stride, column_stride = config.vae_stride
        frames = (wanted.num_frames - 1) // time_stride + 1
        shape = (config.get("z_dim", 16), frames, wanted.height // row_stride, wanted.width // column_stride)
        finished: list[Tensor] = []

        def on_step(pipe: Any, index: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            if index + 1 == wanted.steps:
                finished.append(values["latents"])
                self.clock.stage("decode")
            return {}

        self.clock.start()
        generator = torch.Generator().manual_seed(wanted.seed)
        noise = torch.randn(shape, generator=generator)[None] if self.noise is None else self.noise
        with torch.inference_mode():
            made = self.pipe(
                prompt=wanted.prompt,
                negative_prompt=wanted.n_prompt or config.sample_neg_prompt,
                height=wanted.height,
                width=wanted.width,
                num_frames=wanted.num_frames,
                num_inference_steps=wanted.steps,
                guidance_scale=high,
                guidance_scale_2=low if "boundary" in config else None,
                latents=noise.to(self.clock.device),
                output_type="pt",
                callback_on_step_end=on_step,
                max_sequence_length=config.text_len,
            )
        trial = self.clock.stop(finished[-1])
        self.frames = to_pixels(made.frames[0].movedim(1, 0) * 2 - 1).cpu()
        return trial

    def close(self) -> None: ...


def build_pipeline(wanted: Wanted, config: Any, clock: Clock) -> Any:
    """The pipeline with all networks on the clock's device."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    checkpoint = Checkpoint(wanted.checkpoint, config, wanted.files)
    parts = {component.name: component for component in checkpoint.components()}
    two = "high" in parts

    class SameNoiseLevels(UniPCMultistepScheduler):
        """Visits the noise levels of the original code; diffusers' own differ from them in the fourth digit."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
            import numpy as np

            levels: Any = np.linspace(SPACINGS["unipc"].first, 0, num_inference_steps + 1)[:-1]
            super().set_timesteps(device=device, sigmas=shifted(levels, wanted.shift))

    class TimedPipeline(WanPipeline):
        """Says when the text is encoded."""

        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            embeddings = super().encode_prompt(*args, **kwargs)
            clock.stage("denoise")
            return embeddings

    # Class names are looked up in diffusers' own table by the pipeline's loader, which must not be reached here.
    SameNoiseLevels.__name__, TimedPipeline.__name__ = "UniPCMultistepScheduler", "WanPipeline"
    pipe = TimedPipeline(
        tokenizer=checkpoint.tokenizer().tokenizer,
        text_encoder=text_encoder(parts["text_encoder"]),
        vae=vae(parts["vae"]),
        scheduler=SameNoiseLevels(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, solver_type="bh2"
        ),
        transformer=transformer(parts["high" if two else "dit"]),
        transformer_2=transformer(parts["low"]) if two else None,
        boundary_ratio=config.boundary if two else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(clock.device)


def transformer(component: Component) -> nn.Module:
    """diffusers' DiT with the weights of ours."""
    from diffusers import WanTransformer3DModel

    ours: Any = component.build()
    with torch.device("meta"):
        model = WanTransformer3DModel(**transformer_config(ours.config))
    fill(model, component, ours, DIFFUSERS_DIT)
    rope = model.rope  # its tables are no weights, so they are still on meta
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return model.eval()


def vae(component: Component) -> nn.Module:
    """diffusers' VAE 2.1 with the weights of ours."""
    from diffusers import AutoencoderKLWan

    ours: Any = component.build()
    sizes = ours.config
    with torch.device("meta"):
        model = AutoencoderKLWan(**vae_config(sizes))
    fill(model, component, ours, diffusers_vae(len(sizes.dim_mult), sizes.num_res_blocks))
    return model.eval()


def text_encoder(component: Component) -> nn.Module:
    """transformers' umT5 encoder with the weights of ours."""
    from transformers import UMT5Config, UMT5EncoderModel

    ours: Any = component.build()
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**text_encoder_config(ours)))
    fill(model, component, ours, TRANSFORMERS_T5)
    return model.eval()


def fill(model: nn.Module, component: Component, ours: nn.Module, names: KeyMap) -> None:
    """Load the component's weights into `model` under its own names, strictly."""
    state: dict[str, Tensor] = {}
    for key, tensor in component.weights(ours):
        theirs = names.to_theirs(key)
        keep = FLOAT32_MODULES & set(theirs.split("."))
        state[theirs] = tensor.to(torch.float32 if keep else component.dtype)
    _tie(state, model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)


def _tie(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """transformers lists the token embedding twice."""
    if "encoder.embed_tokens.weight" in wanted and "shared.weight" in state:
        state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
