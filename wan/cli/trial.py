"""One variant of a benchmark in a process of its own: it builds its pipeline once and runs whenever it is told to.

A process each, so that peak memory is the variant's own and switches that act on the whole process do not leak.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal, Protocol

from wan.cli import env
from wan.cli.memory import peak_bytes, reset_peak
from wan.engine.errors import WanError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from wan.cli.request import Wanted
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Plan
    from wan.engine.types import Step

STAGES = {"encode": "text", "denoise": "denoise", "decode": "decode"}
"""First word of an engine's stage -> column of the report."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is timed. `dtype` None is the task's own; `optimized` False switches off all but where networks live."""

    name: str
    runner: Literal["wan", "diffusers"] = "wan"
    optimized: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a worker says when its networks are loaded."""

    plan: str
    hardware: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One timed run, prompt to frames in memory. `stages` are the seconds of text, denoise and decode."""

    seconds: float
    stages: dict[str, float]
    peak_bytes: int
    latents: np.ndarray[Any, Any]


@dataclass
class Clock:
    """A `Progress` that times stages; on a GPU it waits for the device where one stage ends and the next begins."""

    device: torch.device
    stages: dict[str, float] = field(default_factory=dict)
    _current: str = ""
    _since: float = 0.0

    def start(self) -> None:
        """A run begins."""
        self.stages, self._current = {}, "text"
        reset_peak(self.device)
        self._since = self._now()

    def stage(self, name: str, detail: str = "") -> None:
        """The current stage ends and `name` begins."""
        now = self._now()
        self.stages[self._current] = self.stages.get(self._current, 0.0) + now - self._since
        self._current, self._since = STAGES.get(name.partition(" ")[0], name), now

    def step(self, step: Step, seconds: float, share: float, ahead: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self, latents: torch.Tensor) -> Trial:
        """The run is over; `latents` are the finished ones."""
        self.stage("end")
        return Trial(
            seconds=sum(self.stages.values()),
            stages=self.stages,
            peak_bytes=peak_bytes(self.device) or 0,
            latents=latents.detach().float().cpu().numpy().copy(),
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Runner(Protocol):
    """A pipeline with its networks loaded."""

    plan: str

    def run(self) -> Trial: ...


class Ours:
    """This project's pipeline, built and called as a user's script would."""

    def __init__(self, wanted: Wanted, config: Any, plan: Plan, hardware: Hardware) -> None:
        import wan
        from wan.families import class_name

        self.wanted, self.config, self.plan = wanted, config, plan.describe()
        self.clock = Clock(hardware.device)
        self.pipe = getattr(wan, class_name(wanted.task))(
            config,
            wanted.checkpoint,
            optimizations=plan,
            device=hardware.device,
            load_format=wanted.load_format,
            files=wanted.files,
            progress=self.clock,
        )
        self.pipe.engine.load()

    def run(self) -> Trial:
        wanted = self.wanted
        inputs, arguments = wanted.inputs, dict(wanted.arguments)
        if inputs is not None:
            arguments |= inputs.beyond
            arguments |= inputs.prepare(self.pipe) if inputs.prepare is not None else {}
        last: list[torch.Tensor] = []

        def keep(step: Step, latents: torch.Tensor) -> None:
            last[:] = [latents]

        self.clock.start()
        self.pipe.generate(
            wanted.prompt, **arguments, shift=wanted.shift, sample_solver=wanted.solver, sampling_steps=wanted.steps,
            guide_scale=wanted.guide_scale, n_prompt=wanted.n_prompt, seed=wanted.seed, noise_device="cpu",
            observe=(keep,), offload_model=None,
        )  # fmt: skip
        return self.clock.stop(last[0])


def serve(connection: Connection, variant: Variant, args: argparse.Namespace, threads: int | None) -> None:
    """The worker: sends `Ready`, then a `Trial` for every True it receives; a WanError instead where one is raised."""
    env.prepare()
    try:
        import torch

        if threads:
            torch.set_num_threads(threads)
        runner, ready = build(variant, args)
        connection.send(ready)
        while connection.recv():
            connection.send(runner.run())
    except WanError as error:
        connection.send(error)
    except EOFError:
        pass  # the parent has gone


def build(variant: Variant, args: argparse.Namespace) -> tuple[Runner, Ready]:
    """The runner of a variant, loaded. Raises WanError."""
    import torch

    from wan.cli.request import resolve
    from wan.engine.hardware import probe

    wanted = resolve(args)
    hardware = probe(args.device)
    config = type(wanted.config)(wanted.config)
    if variant.dtype is not None:
        config.param_dtype = config.t5_dtype = getattr(torch, variant.dtype)
    versions = {"torch": str(torch.__version__)}
    runner: Runner
    if variant.runner == "diffusers":
        import diffusers

        from wan.cli.rival import Rival

        versions["diffusers"] = diffusers.__version__
        runner = Rival(wanted, config, Clock(hardware.device))
    else:
        runner = Ours(wanted, config, plan_of(args, variant.optimized, hardware), hardware)
    return runner, Ready(plan=runner.plan, hardware=str(hardware), versions=versions)


def plan_of(args: argparse.Namespace, optimized: bool, hardware: Hardware) -> Plan:
    """The plan of the flags and the preset; not `optimized`, the part of it that says where networks live."""
    from wan.cli.presets import make_plan
    from wan.engine.optimizations import registry
    from wan.engine.options import options_of
    from wan.engine.plan import Order, Plan

    known = registry()
    plan = make_plan(args, known, hardware, "auto")
    if optimized:
        return plan
    placed = [o for o in plan.optimizations if o.order == Order.PLACEMENT]
    values = {option.name: getattr(o, option.name) for o in placed for option in options_of(type(o))}
    return Plan.of(known, values)
