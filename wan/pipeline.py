"""The one pipeline. Facades such as `WanT2V` only give upstream's signatures to it."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from wan.components import Checkpoint, dummy_components
from wan.conditioning.geometry import check_video
from wan.engine.accounting import Report
from wan.engine.engine import Engine, Job, build_engine
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import probe
from wan.engine.monitor import Silent
from wan.engine.optimizations import LoRA, registry
from wan.engine.plan import Plan
from wan.engine.sampling.recipes import is_distilled
from wan.engine.sampling.solvers import SOLVERS
from wan.engine.types import Embeddings, Keeper, Progress, Request, Sink, Step
from wan.engine.weights.quantised import QuantisedFile
from wan.families import family_of
from wan.layouts import CheckpointFiles
from wan.modules.t5 import T5EncoderModel
from wan.modules.vae2_1 import Wan2_1_VAE
from wan.modules.vae2_2 import Wan2_2_VAE
from wan.video import TensorSink

if TYPE_CHECKING:
    from wan.modules.tokenizers import HuggingfaceTokenizer
    from wan.modules.vae import WanVAE, WanVAEModel


@dataclass
class Group:
    """Requests that are made together; they share their per-call options."""

    jobs: list[Job] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)

    def add(self, job: Job, options: Mapping[str, Any]) -> None:
        """Raises BadRequest when `options` differ from those of the group."""
        if self.jobs and options != self.options:
            raise BadRequest(f"one group has one set of options: {dict(options)!r} after {dict(self.options)!r}")
        self.jobs.append(job)
        self.options = options


class WanPipeline:
    """Loads a checkpoint folder and makes videos from requests.

    Arguments are upstream's (2.1's and 2.2's, in their positional order); `use_usp` is 2.1's name of `use_sp`.
    Keyword-only additions: `optimizations` (a whole `Plan`) or options by name (`use_batched_cfg=True`,
    `vae_cpu=True`), `device` (default: `cuda:{device_id}`, or the CPU where there is no CUDA), `load_format`
    ("auto", or "dummy" for random weights of the real sizes), `files` (in place of what the folder holds), `progress`,
    `embeddings` (a `wan.embeddings.EmbeddingCache`; default: texts are encoded every time).
    Networks load at first use; the files' headers are read here. Raises BadCheckpoint and IncompatibleOptions.
    """

    kind = "t2v"
    """First part of the names of the tasks whose checkpoints it loads."""

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path | None,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_sp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        convert_model_dtype: bool = False,
        *,
        use_usp: bool | None = None,
        optimizations: Plan | None = None,
        device: str | torch.device | None = None,
        load_format: str = "auto",
        files: CheckpointFiles | None = None,
        progress: Progress | None = None,
        embeddings: Embeddings | None = None,
        **options: Any,
    ) -> None:
        _refuse_parallel(t5_fsdp=t5_fsdp, dit_fsdp=dit_fsdp, use_sp=bool(use_sp or use_usp))
        self.config = config
        self.rank = rank
        self.t5_cpu = t5_cpu
        self.init_on_cpu = init_on_cpu
        self.sp_size = 1
        self.progress: Progress = progress or Silent()
        known = registry()
        named = (checkpoint_dir, *((files.dit, files.dit_low) if files else ()))
        switches = {
            "few_step_distilled": is_distilled(named) or None,
            "t5_cpu": t5_cpu or None,
            "convert_model_dtype": convert_model_dtype or None,
        }
        plan = Plan.of(known, {}).changed(
            known, (optimizations.own_values() if optimizations else {}), source="optimizations"
        )
        plan = plan.changed(known, switches | options)
        hardware = probe(device, device_id)
        if load_format not in ("auto", "dummy"):
            raise BadRequest(f"load_format={load_format!r} is unknown; use 'auto' or 'dummy'")
        if load_format == "auto" and checkpoint_dir is None and not files:
            raise BadRequest("checkpoint_dir is missing: pass the folder of the checkpoint, or load_format='dummy'")
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.folder, self.load_format = folder, load_format
        # A class may take the checkpoint of another task, which its config tells.
        chosen = replace(files or CheckpointFiles(), loras=tuple(plan.get(LoRA).named))
        checkpoint = Checkpoint(folder, config, chosen, config.get("model_type", self.kind))
        components = dummy_components(config) if load_format == "dummy" else checkpoint.components()
        if load_format != "dummy":
            check_weights(checkpoint, plan)
            _tell_8_bits(checkpoint)
        self.engine: Engine = build_engine(components, plan, hardware, model=config["__name__"])
        self.engine.progress = self.progress
        self.engine.embeddings = embeddings

    def run(
        self,
        request: Request,
        *,
        sink: Sink | None = None,
        keeper: Keeper | None = None,
        observe: tuple[Callable[[Step, Tensor], None], ...] = (),
        done: Callable[[], None] | None = None,
        group: Group | None = None,
        **options: Any,
    ) -> Tensor | None:
        """Make one video; `options` override per-call options of the plan for this call.

        Returns float32 [3, N, H, W] in -1..1 on the device, or None when `sink` took the frames. `observe` callbacks
        get (step, latents [1, C, T, H, W]) after every step; `keeper` keeps state and latents (`wan.runs.Run`); `done`
        is called when `sink` has all frames.
        With `group` nothing is made yet: the request joins those that `run_group` makes together.
        """
        check_request(request, self.config)
        target = sink or TensorSink()
        job = Job(
            family=family_of(request.task), config=self.config, request=request, sink=target, progress=self.progress,
            observe=observe, keeper=keeper, done=done, report=Report(),
        )  # fmt: skip
        if group is not None:
            group.add(job, options)
            return None
        self.engine.run(job, options)
        if not isinstance(target, TensorSink):
            return None
        # What is returned must be an ordinary tensor that callers may change in place.
        return target.result.clone() if target.result.is_inference() else target.result

    def run_group(self, group: Group) -> list[Exception | None]:
        """Make all videos of `group`, each expert's part of all before the next expert's; why each one failed."""
        return self.engine.run_group(group.jobs, group.options)

    @property
    def report(self) -> Report:
        """What the last run did and took; inside a group, of the video at work."""
        return self.engine.report

    # Upstream's attributes -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def param_dtype(self) -> torch.dtype:
        return self.config.param_dtype

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @property
    def boundary(self) -> float | None:
        return self.config.get("boundary")

    @property
    def vae_stride(self) -> tuple[int, int, int]:
        return self.config.vae_stride

    @property
    def patch_size(self) -> tuple[int, int, int]:
        return self.config.patch_size

    @property
    def sample_neg_prompt(self) -> str:
        return self.config.sample_neg_prompt

    @property
    def model(self) -> nn.Module:
        """The DiT of a one-expert model."""
        return self.engine.network("dit")

    @model.setter
    def model(self, module: nn.Module) -> None:
        self.engine.placement.set("dit", module)

    @property
    def high_noise_model(self) -> nn.Module:
        """The high-noise expert of a two-expert model."""
        return self.engine.network("high")

    @high_noise_model.setter
    def high_noise_model(self, module: nn.Module) -> None:
        self.engine.placement.set("high", module)

    @property
    def low_noise_model(self) -> nn.Module:
        """The low-noise expert of a two-expert model."""
        return self.engine.network("low")

    @low_noise_model.setter
    def low_noise_model(self, module: nn.Module) -> None:
        self.engine.placement.set("low", module)

    @property
    def vae(self) -> WanVAE:
        """Upstream's wrapper over the engine's VAE: `.encode(list)`, `.decode(list)`, `.model`."""
        module = cast("WanVAEModel", self.engine.network("vae"))
        kind = Wan2_2_VAE if module.stride[1] == 16 else Wan2_1_VAE
        return kind.from_model(module)

    @vae.setter
    def vae(self, value: Any) -> None:
        self.engine.placement.set("vae", getattr(value, "model", value))

    @property
    def text_encoder(self) -> T5EncoderModel:
        """Upstream's wrapper over the engine's text encoder: `(texts, device) -> list`, `.model`, `.tokenizer`."""
        module = self.engine.network("text_encoder")
        return T5EncoderModel.of(module, cast("HuggingfaceTokenizer", module.tokenizer))

    @text_encoder.setter
    def text_encoder(self, value: T5EncoderModel) -> None:
        value.model.tokenizer = value.tokenizer  # type: ignore[assignment]
        self.engine.placement.set("text_encoder", value.model)
        self.engine.embeddings = None  # what is kept was made by the encoder of the checkpoint


def check_request(request: Request, config: Any) -> None:
    """Raise BadRequest if this cannot be made; nothing is loaded."""
    check_video(
        request.height,
        request.width,
        family_of(request.task).shot_frames(request),
        stride=tuple(config.vae_stride),
        patch=tuple(config.patch_size),
    )
    if request.solver not in SOLVERS:
        raise BadRequest(f"solver {request.solver!r} is unknown; use {', '.join(SOLVERS)}")
    if request.steps < 1:
        raise BadRequest(f"sampling steps = {request.steps!r}: at least 1 is needed")
    if not request.shift > 0:
        raise BadRequest(f"shift = {request.shift!r}: it must be greater than 0")


def resolve_seed(seed: int) -> int:
    """`seed`, or a random one when it is negative."""
    return seed if seed >= 0 else random.randint(0, sys.maxsize)


def scale_pair(guide_scale: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) guidance scales; one number serves both experts."""
    if isinstance(guide_scale, int | float):
        return float(guide_scale), float(guide_scale)
    low, high = guide_scale
    return float(low), float(high)


def check_weights(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise BadCheckpoint unless what the plan does to the transformers' weights fits them. Reads headers alone."""
    for part in checkpoint.places.experts:
        for optimization in plan.enabled():
            optimization.check_weights(checkpoint.network(part).shapes, part)


def _tell_8_bits(checkpoint: Checkpoint) -> None:
    """Say which files hold weights in 8 bits, and how; it is seen in them, no flag says it."""
    for part in checkpoint.places.experts + ("text_encoder",):
        network = checkpoint.network(part)
        weights, flag = network.stored(), "--t5_fp8" if part == "text_encoder" else "--fp8"
        if isinstance(weights, QuantisedFile) and (told := weights.told()):
            logging.getLogger(__name__).info(
                "%s: %s has %s; %s keeps those of blocks so, others are widened while they are read",
                part, network.path.name, told, flag,
            )  # fmt: skip


def _refuse_parallel(**switches: bool) -> None:
    for name, on in switches.items():
        if on:
            raise IncompatibleOptions(
                f"{name}={on!r} needs several GPUs, which this version cannot use yet; leave it off"
            )
