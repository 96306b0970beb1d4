"""Loads the networks of a request the way the plan says and runs it: branches, noise, denoise, decode, shot by shot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.monitor import Monitor, Silent
from wan.engine.placement import Placement, Policy
from wan.engine.plan import Plan
from wan.engine.sampling.denoiser import Sequential
from wan.engine.sampling.guidance import Guidance
from wan.engine.sampling.loop import sample
from wan.engine.sampling.schedule import segments
from wan.engine.sampling.solvers import make_solver
from wan.engine.types import (
    Component,
    Denoiser,
    Denoising,
    Encoders,
    Family,
    Known,
    Progress,
    Request,
    Segment,
    Shot,
    Sink,
    Step,
)
from wan.engine.weights.stream import load_into

Trunk = Callable[..., Tensor]
TrunkWrapper = Callable[[Trunk, nn.Module, Segment], Trunk]
DenoiserWrapper = Callable[[Denoiser, nn.Module, Segment], Denoiser]
Observer = Callable[[Step, Tensor], None]

# Latent pixels decoded at a time: small videos go in one piece, which is several times faster on a CPU; at 480p it
# is one latent frame, as upstream. The VAE's result does not depend on it.
DECODE_PIXELS = 8192


class Decoder(Protocol):
    """What the engine asks of a VAE."""

    def decode_chunks(self, latents: Tensor, *, frames_per_chunk: int) -> Iterator[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one run needs besides the engine."""

    family: Family
    config: Any
    request: Request
    sink: Sink
    progress: Progress
    observe: tuple[Observer, ...] = ()
    on_latents: Callable[[Denoising], None] | None = None
    """Called with the finished latents before they are decoded: the place to keep them."""


class Engine:
    """The networks of one checkpoint, a plan, and the one way to run them. Built by `build_engine`."""

    def __init__(self, components: Sequence[Component], plan: Plan, hardware: Hardware, placement: Placement) -> None:
        self.plan = plan
        self.hardware = hardware
        self.device = hardware.device
        self.placement = placement
        self.progress: Progress = Silent()
        self.monitor = Monitor(self.progress)
        self.expert_names = tuple(c.name for c in components if c.is_expert)
        self._names = tuple(c.name for c in components)
        self._trunk_wrappers: list[TrunkWrapper] = []
        self._denoiser_wrappers: list[DenoiserWrapper] = []
        for component in components:
            placement.add(component.name, partial(self._load, component), Policy.RESIDENT)
        self._begin(plan)

    # What optimisations may do -------------------------------------------------------------------------------------

    def wrap_trunk(self, factory: TrunkWrapper) -> None:
        """Wrap `dit.trunk` in every segment of the coming run; the wrapper's state dies with the segment."""
        self._trunk_wrappers.append(factory)

    def wrap_denoiser(self, factory: DenoiserWrapper) -> None:
        """Wrap the denoiser in every segment of the coming run; the wrapper's state dies with the segment."""
        self._denoiser_wrappers.append(factory)

    def set_policy(self, name: str, policy: Policy) -> None:
        """Set how one network, or all "experts", is placed in the coming run; unknown names are ignored."""
        for each in self.expert_names if name == "experts" else (name,):
            if each in self._names:
                self.placement.set_policy(each, policy)

    # What pipelines do ---------------------------------------------------------------------------------------------

    def network(self, name: str) -> nn.Module:
        """A network by name ("dit", "high", "low", "vae", "text_encoder"), loaded if need be, where it is."""
        with torch.inference_mode(False):
            return self.placement.get(name)

    def load(self, names: Sequence[str] | None = None) -> None:
        """Load networks (default all) now instead of at first use."""
        for name in names or self._names:
            self.network(name)

    def run(self, job: Job, overrides: Mapping[str, Any] | None = None) -> None:
        """Make the video of `job.request`, writing its frames to `job.sink`.

        `overrides` change per-call options for this run. Raises NonFinite when sampling breaks.
        """
        self._begin(self._plan_for_call(overrides or {}))
        self.progress = job.progress
        self.monitor = Monitor(job.progress)
        carry: Tensor | None = None
        index = 0
        with torch.inference_mode():
            while (shot := job.family.next_shot(job.request, job.config, index, carry)) is not None:
                run = self._prepare(job, shot, index, carry)
                self._denoise(run, job)
                if job.on_latents is not None:
                    job.on_latents(run)
                carry = self._decode(run, job)
                index += 1

    # Inside --------------------------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> None:
        """Forget what the last run registered and let the plan act again."""
        self._trunk_wrappers.clear()
        self._denoiser_wrappers.clear()
        for name in self._names:
            self.placement.set_policy(name, Policy.RESIDENT)
        for optimization in plan.enabled():
            optimization.apply(self)

    def _plan_for_call(self, overrides: Mapping[str, Any]) -> Plan:
        given = {name: value for name, value in overrides.items() if value is not None}
        plan = self.plan.changed([type(o) for o in self.plan.optimizations], given, source="generate()")
        for before, now in zip(self.plan.optimizations, plan.optimizations, strict=True):
            if before != now and not now.per_call:
                names = ", ".join(sorted(name for name in given if hasattr(now, name)))
                raise IncompatibleOptions(
                    f"generate({names}=...) cannot be changed for one call: it acts while weights are loaded. "
                    "Pass it to the constructor."
                )
        if plan != self.plan:
            plan.check(self.hardware)
        return plan

    def _load(self, component: Component, landing: torch.device) -> nn.Module:
        """Meta module, converted, filled from the weight stream, finished. Never two copies in memory."""
        name = component.name
        self.progress.stage(f"load {name}")
        active = list(self.plan.enabled())
        with torch.inference_mode(False), torch.no_grad():
            module = component.build()
            _declare_dtypes(module, component)
            for optimization in active:
                optimization.convert(module, name)
            dtypes = {key: value.dtype for key, value in module.state_dict().items()}
            weights = component.weights(module)
            for optimization in active:
                weights = optimization.transform(weights, name)
            places = [place for o in active if (place := o.place(module, name)) is not None]
            place = places[0] if places else lambda key, tensor: landing
            load_into(module, weights, dtype=dtypes.get, place=place)
            module.eval().requires_grad_(False)
            for optimization in active:
                optimization.finish(module, name, self)
        return module

    @contextmanager
    def _use(self, name: str) -> Iterator[nn.Module]:
        # Parameters must be ordinary tensors, also when they are loaded or moved in the middle of a run.
        with torch.inference_mode(False):
            use = self.placement.use(name)
            module = use.__enter__()
        try:
            yield module
        finally:
            with torch.inference_mode(False):
                use.__exit__(None, None, None)

    @contextmanager
    def _encoder(self, name: str) -> Iterator[nn.Module]:
        with self._use(name) as module:
            self.progress.stage(f"encode with {name}")
            yield module

    def _prepare(self, job: Job, shot: Shot, index: int, carry: Tensor | None) -> Denoising:
        request = job.request
        encoders = Encoders(use=self._encoder, device=self.device, config=job.config)
        branches = job.family.branches(request, shot, encoders)
        steps = job.family.schedule(request, job.config)
        generator = torch.Generator(device=request.noise_device or self.device)
        generator.manual_seed(request.seed if shot.reseed is None else shot.reseed)
        # One sample without the batch axis, then the axis: the order of upstream's random numbers.
        noise = torch.randn(shot.latent_shape, dtype=torch.float32, device=generator.device, generator=generator)
        latents = noise.to(self.device)[None]
        if shot.known is not None:
            latents = shot.known.apply(latents, None)
            branches = {name: replace(branch, frozen=_frozen(shot.known)) for name, branch in branches.items()}
        return Denoising(
            request=request, shot=shot, index=index, branches=branches, steps=steps, latents=latents,
            solver=make_solver(request.solver, steps), generator=generator, carry=carry,
        )  # fmt: skip

    def _denoise(self, run: Denoising, job: Job) -> None:
        coefficients = job.family.coefficients(run.request, job.config)

        def record(step: Step, latents: Tensor) -> None:
            run.done, run.latents = step.index + 1, latents

        for segment in segments(run.steps, run.done):
            with self._use(segment.expert) as dit, self._seams(dit, segment) as denoiser:
                job.progress.stage("denoise", f"{len(segment.steps) - segment.start} steps with {segment.expert}")
                self.monitor.start(run.latents)
                predict = Guidance(denoiser, run.branches, coefficients)
                observe: tuple[Observer, ...] = (record, self.monitor, *job.observe)
                steps = segment.steps[segment.start :]
                run.latents = sample(predict, run.solver, run.latents, steps, run.shot.known, observe)
                self.monitor.flush()

    @contextmanager
    def _seams(self, dit: nn.Module, segment: Segment) -> Iterator[Denoiser]:
        """The denoiser of one segment, with the trunk and the denoiser wrapped as the plan asked."""
        trunk = cast("Trunk", dit.trunk)
        wrapped = trunk
        for wrap in self._trunk_wrappers:
            wrapped = wrap(wrapped, dit, segment)
        denoiser: Denoiser = Sequential(dit)  # type: ignore[arg-type]
        for wrap_denoiser in self._denoiser_wrappers:
            denoiser = wrap_denoiser(denoiser, dit, segment)
        if self._trunk_wrappers:
            dit.trunk = wrapped  # type: ignore[assignment]
        try:
            yield denoiser
        finally:
            if self._trunk_wrappers:
                dit.trunk = trunk  # type: ignore[assignment]

    def _decode(self, run: Denoising, job: Job) -> Tensor | None:
        shot = run.shot
        latents = run.latents[:, :, shot.keep]
        if shot.prefix is not None:
            latents = torch.cat([shot.prefix, latents], dim=2)
        per_chunk = max(1, DECODE_PIXELS // (latents.shape[3] * latents.shape[4]))
        tail: list[Tensor] = []
        with self._use("vae") as vae:
            job.progress.stage("decode")
            start = 0
            for chunk in cast("Decoder", vae).decode_chunks(latents, frames_per_chunk=per_chunk):
                frames = chunk[0].float().clamp_(-1, 1)
                frames, start = _trimmed(frames, start, shot.trim), start + frames.shape[1]
                if frames.shape[1]:
                    job.sink.write(frames)
                if shot.carry_frames:
                    tail = [torch.cat([*tail, frames], dim=1)[:, -shot.carry_frames :]]
        return tail[0] if tail else None


def build_engine(
    components: Sequence[Component], plan: Plan, hardware: Hardware, placement: Placement | None = None
) -> Engine:
    """An engine whose plan has been checked against this hardware. Networks load when first used."""
    plan.check(hardware)
    return Engine(components, plan, hardware, placement or Placement(hardware.device))


def _declare_dtypes(module: nn.Module, component: Component) -> None:
    """Give the meta tensors the dtypes their weights will be stored in; the weight stream follows them."""
    owners = dict(module.named_modules())
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        owner, _, name = key.rpartition(".")
        dtype = torch.float32 if component.float32(key) else component.dtype
        declared = torch.empty_like(tensor, dtype=dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            setattr(owners[owner], name, nn.Parameter(declared, requires_grad=False))
        else:
            owners[owner].register_buffer(name, declared)


def main_dtype(module: nn.Module) -> torch.dtype:
    """The dtype most of a module's floating parameters have."""
    count: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            count[parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0]


def _frozen(known: Known) -> Tensor:
    """[B, 1, T, H, W] mask of the latents that are given."""
    return known.mask if known.mask.shape[1] == 1 else known.mask.amin(dim=1, keepdim=True)


def _trimmed(frames: Tensor, start: int, trim: slice) -> Tensor:
    """The part of `frames`, which begin at frame `start` of the shot, that `trim` (non-negative) keeps."""
    first = max((trim.start or 0) - start, 0)
    last = frames.shape[1] if trim.stop is None else max(trim.stop - start, 0)
    return frames[:, first:last]
