"""The task's class in `wan`, built and called with upstream's arguments by upstream's names.

The class is looked up when it is needed, so whoever replaces `wan.WanT2V` is called. What goes beyond upstream's
signatures (sink, keeper, options by name) is passed only to a class that takes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wan.engine.errors import IncompatibleOptions

if TYPE_CHECKING:
    from torch import Tensor

    from wan.cli.generate import Job
    from wan.cli.report import Terminal
    from wan.engine.plan import Plan


def build(job: Job, terminal: Terminal) -> Any:
    """An instance of the task's class for `job`. Raises IncompatibleOptions where it lacks an argument that matters."""
    import wan
    from wan.families import class_name

    if job.budget is not None:
        job.budget.enforce(job.hardware)
    wanted, values = job.wanted, plan_values(job.plan)
    pipeline_class = getattr(wan, class_name(wanted.task))
    beyond = {
        "optimizations": (job.plan, _beyond_upstream(job)),
        "device": (job.device, job.device is not None),
        "load_format": (wanted.load_format, wanted.load_format != "auto"),
        "files": (wanted.files, bool(wanted.files)),
        "progress": (terminal, False),
        "embeddings": (job.embeddings, False),
    }
    if wanted.inputs is not None:
        beyond |= {name: (value, True) for name, value in wanted.inputs.construct.items()}
    return pipeline_class(
        config=wanted.config,
        checkpoint_dir=None if wanted.checkpoint is None else str(wanted.checkpoint),
        device_id=job.hardware.device.index or 0,
        rank=job.hardware.rank,
        t5_fsdp=bool(values.get("t5_fsdp")),
        dit_fsdp=bool(values.get("dit_fsdp")),
        use_sp=(values.get("ulysses_size") or 1) > 1,
        t5_cpu=bool(values.get("t5_cpu")),
        convert_model_dtype=bool(values.get("convert_model_dtype")),
        **_accepted(pipeline_class, beyond),
    )


def call(pipeline: Any, job: Job, **extras: Any) -> Tensor | None:
    """`pipeline.generate` for `job`; `extras` go beyond upstream's arguments."""
    wanted, inputs, arguments = job.wanted, job.wanted.inputs, dict(job.wanted.arguments)
    beyond = {"noise_device": (wanted.noise_device, True)} if wanted.noise_device else {}
    if inputs is not None:
        beyond |= {name: (value, True) for name, value in inputs.beyond.items()}
        arguments |= inputs.prepare(pipeline) if inputs.prepare is not None else {}
    negative = {"n_prompt": wanted.n_prompt} if wanted.n_prompt else {}
    # The prompt comes first, but where upstream's class has something else there.
    first = () if "input_prompt" in arguments else (wanted.prompt,)
    arguments |= {} if first else {"input_prompt": wanted.prompt}
    video: Tensor | None = pipeline.generate(
        *first,
        **arguments,
        shift=wanted.shift,
        sample_solver=wanted.solver,
        sampling_steps=wanted.steps,
        guide_scale=wanted.guide_scale,
        seed=wanted.seed,
        offload_model=bool(plan_values(job.plan).get("offload_model")),
        **_changed(pipeline, job.plan),
        **negative,
        **_accepted(pipeline.generate, beyond),
        **extras,
    )
    return video


def streams(pipeline: Any) -> bool:
    """True when `pipeline` is ours and can write into a sink, and nobody replaced the writers."""
    from wan.pipeline import WanPipeline
    from wan.utils import utils

    ours = all(function.__module__ == utils.__name__ for function in (utils.save_video, utils.save_image))
    parameters = inspect.signature(pipeline.generate).parameters.values()
    return ours and isinstance(pipeline, WanPipeline) and any(p.kind is p.VAR_KEYWORD for p in parameters)


def plan_values(plan: Plan) -> dict[str, Any]:
    """Every option of the plan by name."""
    return {name: value for optimization in plan.optimizations for name, value in vars(optimization).items()}


def _changed(pipeline: Any, plan: Plan) -> dict[str, Any]:
    """Per-call options that are not those `pipeline` was built with: of jobs in a queue."""
    from wan.pipeline import WanPipeline

    if not isinstance(pipeline, WanPipeline):
        return {}
    built = pipeline.engine.plan.values()
    changed = {name: value for name, value in plan.values().items() if name in built and value != built[name]}
    return {name: value for name, value in changed.items() if value is not None and name != "offload_model"}


MEMORY_SAVERS = {
    "offload_model": "--offload_model True", "vae_cpu": "--vae_cpu", "convert_model_dtype": "--convert_model_dtype",
    "vae_tiling": "--vae_tiling", "stream_t5": "--stream_t5", "block_swap": "--block_swap auto",
    "ffn_rows": "--ffn_rows 8192",
}  # fmt: skip
"""Option -> what to add to the command where it is off."""


def memory_advice(plan: Plan) -> str:
    """What to try when memory ran out, leaving out what is on already."""
    values = plan_values(plan)
    planned = any(why.startswith("budget") for why in plan.reasons.values())
    there = {name for name in MEMORY_SAVERS.keys() & values if not values[name]}
    there -= {"stream_t5"} if values.get("t5_cpu") else set()
    choose = ["a smaller --vram_budget" if planned else "--vram_budget GB, which chooses what is needed"]
    off = [flag for name, flag in MEMORY_SAVERS.items() if name in there]
    return "try " + ", ".join([*choose, *off, "a smaller --size", "fewer --frame_num"])


def _beyond_upstream(job: Job) -> bool:
    """True when the plan says something that upstream's own arguments cannot."""
    own = {"t5_fsdp", "dit_fsdp", "ulysses_size", "t5_cpu", "convert_model_dtype", "offload_model", "attention"}
    plain = plan_values(job.plain)
    return any(value != plain[name] for name, value in plan_values(job.plan).items() if name not in own)


def _accepted(function: Callable[..., Any], extras: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
    """Those of `extras` (name -> value, whether it must arrive) that `function` takes; upstream's classes take none."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    passed = {}
    for name, (value, needed) in extras.items():
        if (takes_any or name in parameters) and value is not None:
            passed[name] = value
        elif needed:
            what = getattr(function, "__qualname__", str(function))
            raise IncompatibleOptions(f"{what} does not take {name}={value!r}: leave the flags out that ask for it")
    return passed
