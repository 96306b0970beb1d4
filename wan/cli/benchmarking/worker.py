"""One variant in a process of its own: it builds its pipeline once and runs whenever it is told to.

A process each, so that peak memory is the variant's own and switches that act on the whole process do not leak.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from wan.cli import env
from wan.cli.benchmarking.trial import Clock, Order, Ready, Runner, Seen, Setting, Trial, Variant
from wan.engine.errors import GenerationFailed, WanError

if TYPE_CHECKING:
    import torch

    from wan.cli.request import Wanted
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Plan
    from wan.engine.types import Step


class Ours:
    """This project's pipeline, built and called as a user's script would."""

    frames: torch.Tensor

    def __init__(
        self,
        wanted: Wanted,
        config: Any,
        plan: Plan,
        hardware: Hardware,
        noise: torch.Tensor | None,
        args: argparse.Namespace | None = None,
    ) -> None:
        import wan
        from wan.families import class_name

        self.args, self.options = args, dict[str, Any]()
        self.wanted, self.config, self.plan, self.noise = wanted, config, plan.describe(), noise
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

    def ask(self, asked: Mapping[str, Any]) -> None:
        """Make this from now on. Raises WanError."""
        from wan.cli.request import resolve

        assert self.args is not None
        self.wanted = resolve(argparse.Namespace(**{**vars(self.args), **asked}))
        self.options = {name: value for name, value in asked.items() if name in self.pipe.engine.plan.values()}

    def run(self, watch: bool) -> Trial:
        from wan.cli.benchmarking.noise import Start
        from wan.cli.benchmarking.watch import Watch
        from wan.engine.optimizations import Compile
        from wan.video import to_pixels

        engine, start = self.pipe.engine, Start(self.noise)
        seen = Watch(engine.device, inside=not engine.plan.get(Compile).compile)
        last: list[torch.Tensor] = []

        def keep(step: Step, latents: torch.Tensor) -> None:
            if watch and not last and start.latents is not None:
                seen.first_step(step, start.latents, latents)
            last[:] = [latents]

        with seen.over([engine.network(name) for name in engine.expert_names] if watch else []):
            self.clock.start()
            video = self._generate(keeper=start, observe=(keep,))
            report = self.pipe.report
            trial = self.clock.stop(
                last[0],
                forwards=sum(sum(each.done.values()) for each in report.forwards),
                steps={name: _pace(seconds) for name, seconds in report.step_seconds.items()},
            )
        self.frames = to_pixels(video).cpu()
        return replace(trial, seen=_arrays(seen)) if watch else trial

    def close(self) -> None: ...

    def _generate(self, **extras: Any) -> torch.Tensor:
        wanted = self.wanted
        inputs, arguments = wanted.inputs, dict(wanted.arguments)
        if inputs is not None:
            arguments |= inputs.beyond
            arguments |= inputs.prepare(self.pipe) if inputs.prepare is not None else {}
        video: torch.Tensor = self.pipe.generate(
            wanted.prompt, **arguments, shift=wanted.shift, sample_solver=wanted.solver, sampling_steps=wanted.steps,
            guide_scale=wanted.guide_scale, n_prompt=wanted.n_prompt, seed=wanted.seed, noise_device="cpu",
            **({"offload_model": None} | self.options), **extras,
        )  # fmt: skip
        return video


def _pace(seconds: Sequence[float]) -> float:
    from wan.cli.report import pace

    return pace(seconds)


def _arrays(seen: Any) -> Seen:
    texts = {branch: text.numpy() for branch, text in seen.texts.items()}
    velocity = None if seen.velocity is None else seen.velocity.cpu().numpy()
    return Seen(flop=seen.flop, parts=seen.parts, texts=texts, velocity=velocity)


def serve(connection: Connection, variant: Variant, words: Sequence[str], setting: Setting) -> None:
    """The worker: sends `Ready`, then for every `Order` until it gets None a `Trial` or the WanError that it met."""
    env.prepare()
    try:
        _serve(connection, variant, words, setting)
    except WanError as error:
        connection.send(error)
    except RuntimeError as error:
        connection.send(_out_of_memory(error))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has gone, or hears of Ctrl-C too and tells it


def _out_of_memory(error: RuntimeError) -> WanError:
    """What to say of it. Any other error is raised again."""
    from wan.engine.attempts import is_out_of_memory

    if not is_out_of_memory(error):
        raise error
    return GenerationFailed(f"out of memory: {str(error).splitlines()[0]}")


def _serve(connection: Connection, variant: Variant, words: Sequence[str], setting: Setting) -> None:
    import torch

    from wan.cli.benchmarking.power import Sampler

    if setting.threads:
        torch.set_num_threads(setting.threads)
    runner, ready, device = build(variant, words, setting)
    connection.send(ready)
    with closing(runner):
        while (order := connection.recv()) is not None:
            assert isinstance(order, Order)
            try:
                with Sampler(device) as sampler:
                    trial = obeyed(runner, order)
            except WanError as error:
                connection.send(error)  # another order may well be possible
                continue
            except RuntimeError as error:
                connection.send(_out_of_memory(error))
                continue
            connection.send(replace(trial, readings=sampler.readings(), missing=sampler.missing))


def obeyed(runner: Runner, order: Order) -> Trial:
    """What came of one order; its frames are in the file it names."""
    import numpy as np

    if order.asked:
        assert isinstance(runner, Ours)
        runner.ask(order.asked)
    before = time.process_time()
    trial = replace(runner.run(order.watch), cpu_seconds=time.process_time() - before)
    if order.keep is not None:
        np.save(order.keep, runner.frames.numpy())
    return trial


def build(variant: Variant, words: Sequence[str], setting: Setting) -> tuple[Runner, Ready, torch.device]:
    """The runner of a variant, loaded. Raises WanError."""
    import torch

    from wan.cli import environment
    from wan.cli.args import parse
    from wan.cli.benchmarking.ceilings import measure_ceilings
    from wan.cli.benchmarking.noise import read_noise
    from wan.cli.request import resolve
    from wan.engine.hardware import probe
    from wan.engine.optimizations import registry
    from wan.engine.plan import options

    args = parse([*words, *variant.words], options(registry()))
    wanted, hardware = resolve(args), probe(args.device)
    config = type(wanted.config)(wanted.config)
    if variant.dtype is not None:
        config.param_dtype = config.t5_dtype = getattr(torch, variant.dtype)
    ceilings = measure_ceilings(hardware.device, config.param_dtype)
    if hardware.is_cuda:
        torch.cuda.empty_cache()
    noise = None if setting.noise is None else read_noise(setting.noise)
    machine = {"device": environment.device(hardware), "versions": environment.versions()}
    versions = {"torch": str(torch.__version__)}
    runner: Runner
    if variant.runner == "upstream":
        from wan.cli.benchmarking.upstream import Upstream

        assert setting.upstream is not None
        runner = Upstream(setting.upstream, wanted, hardware, noise)
    elif variant.runner != "wan":
        import diffusers

        from wan.cli.benchmarking.rival import Rival

        versions["diffusers"] = diffusers.__version__
        runner = Rival(wanted, config, Clock(hardware.device), noise, compiled=variant.runner == "diffusers_compiled")
    else:
        runner = Ours(wanted, config, plan_of(args, variant.optimized, hardware), hardware, noise, args)
    ready = Ready(plan=runner.plan, hardware=str(hardware), versions=versions, machine=machine, ceilings=ceilings)
    return runner, ready, hardware.device


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
