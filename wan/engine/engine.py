"""Loads the networks the way the plan says and runs requests: branches, noise, denoise, decode, shot by shot.

Requests that come together share the networks: every stage is done for all of them before the next one begins, so
that a second expert is brought in once for a group and not once for a video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from wan.engine.accounting import Expectation, Forwards, Report, Trunk, planned_forwards
from wan.engine.decoding import Decode
from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.monitor import Monitor, Silent
from wan.engine.placement import Placement, Policy
from wan.engine.plan import Plan
from wan.engine.sampling.denoiser import Sequential
from wan.engine.sampling.guidance import Guidance
from wan.engine.sampling.loop import sample
from wan.engine.sampling.noise import first_latents
from wan.engine.sampling.schedule import segments
from wan.engine.sampling.solvers import make_solver
from wan.engine.types import (
    Component,
    Denoiser,
    Denoising,
    Embeddings,
    Encoders,
    Family,
    Keeper,
    Known,
    Progress,
    Request,
    Segment,
    Shot,
    Sink,
    Step,
    Tiling,
)
from wan.engine.weights.stream import load_into

TrunkWrapper = Callable[[Trunk, nn.Module, Segment], Trunk]
DenoiserWrapper = Callable[[Denoiser, nn.Module, Segment], Denoiser]
Observer = Callable[[Step, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one run needs besides the engine."""

    family: Family
    config: Any
    request: Request
    sink: Sink
    progress: Progress
    observe: tuple[Observer, ...] = ()
    keeper: Keeper | None = None
    done: Callable[[], None] | None = None
    """Called when the last frames are in the sink, before other jobs of a group decode theirs."""
    report: Report = field(default_factory=Report)
    """Filled by the run."""


@dataclass
class _Ongoing:
    """One job under way: its shot, and whether the group lost it."""

    job: Job
    index: int = 0
    shot: Shot | None = None
    run: Denoising | None = None
    latents: Tensor | None = None
    carry: Tensor | None = None
    generator: torch.Generator | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    forwards: Forwards | None = None
    failure: Exception | None = None

    def segments(self) -> list[Segment]:
        return [] if self.run is None or self.failure else segments(self.run.steps, self.run.done)


class Engine:
    """The networks of one checkpoint, a plan, and the one way to run them. Built by `build_engine`."""

    def __init__(self, components: Sequence[Component], plan: Plan, hardware: Hardware, placement: Placement) -> None:
        self.plan = plan
        self.hardware = hardware
        self.device = hardware.device
        self.placement = placement
        self.progress: Progress = Silent()
        self.report = Report()  # of the job that is being worked on, or was last
        self.embeddings: Embeddings | None = None
        self.expert_names = tuple(c.name for c in components if c.is_expert)
        self.kernels: dict[str, str] = {}
        """Expert -> its attention backend, where an optimisation chose one."""
        self._names = tuple(c.name for c in components)
        self._trunk_wrappers: list[TrunkWrapper] = []
        self._denoiser_wrappers: list[DenoiserWrapper] = []
        self._expectations: list[Expectation] = []
        self._resumable: list[Callable[[Step], bool]] = []
        self._tiling: Tiling | None = None
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

    def expect_forwards(self, expectation: Expectation) -> None:
        """Say by how much the count of forwards may differ from one a branch and step in the coming run."""
        self._expectations.append(expectation)

    def resume_only(self, before: Callable[[Step], bool]) -> None:
        """Keep state in the coming run only where `before(next step)`: where that step runs every forward."""
        self._resumable.append(before)

    def set_tiling(self, tiling: Tiling | None) -> None:
        """Decode the coming run in tiles, None for whole frames."""
        self._tiling = tiling

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
        if (failure := self.run_group([job], overrides)[0]) is not None:
            raise failure

    def run_group(self, jobs: Sequence[Job], overrides: Mapping[str, Any] | None = None) -> list[Exception | None]:
        """Make several videos, each expert's part of all of them before the next expert's.

        Every video is the one `run` would make alone. A job that fails is left out of the rest; its exception is
        returned in its place. Sinks are not closed.
        """
        self._begin(self._plan_for_call(overrides or {}))
        ongoing = [_Ongoing(job) for job in jobs]
        with torch.inference_mode():
            active = [each for each in ongoing if self._guarded(self._next_shot, each)]
            while active:
                for each in active:
                    self._guarded(self._prepare, each)
                while waiting := [each for each in active if each.segments()]:
                    self._denoise_expert(waiting)
                active = [each for each in active if self._guarded(self._finish_shot, each)]
        return [each.failure for each in ongoing]

    # Inside --------------------------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> None:
        """Forget what the last run registered and let the plan act again."""
        self._trunk_wrappers.clear()
        self._denoiser_wrappers.clear()
        self._expectations.clear()
        self._resumable.clear()
        self._tiling = None
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
    def _use(self, name: str, device: str | None = None) -> Iterator[nn.Module]:
        # Parameters must be ordinary tensors, also when they are loaded or moved in the middle of a run.
        with torch.inference_mode(False):
            use = self.placement.use(name, device)
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

    def _guarded(self, act: Callable[[_Ongoing], bool | None], each: _Ongoing) -> bool:
        """`act(each)`, unless the job failed before; what it raises is kept, so that the rest of a group goes on."""
        if each.failure is not None:
            return False
        self.progress, self.report = each.job.progress, each.job.report
        try:
            return act(each) is not False
        except Exception as failure:  # whatever it is, the others of the group must not suffer from it
            each.failure, each.run, each.latents = failure, None, None
            return False

    def _next_shot(self, each: _Ongoing) -> bool:
        """Whether there is another shot. Without one the job is done."""
        each.shot = each.job.family.next_shot(each.job.request, each.job.config, each.index, each.carry)
        if each.shot is None and each.job.done is not None:
            each.job.done()
        return each.shot is not None

    def _prepare(self, each: _Ongoing) -> None:
        """Everything a denoise starts from; or the latents, where they were finished before."""
        job, shot, keeper = each.job, cast("Shot", each.shot), each.job.keeper
        request = job.request
        encoders = Encoders(
            use=self._encoder, where=self.placement.device_of, device=self.device, config=job.config,
            embeddings=self.embeddings, memo=each.memo,
        )  # fmt: skip
        each.run, each.latents = None, keeper.finished(each.index) if keeper else None
        # Also of a shot that is only decoded: the next one's noise comes after it.
        each.generator, latents = first_latents(request, shot, each.generator, self.device)
        shot = each.shot = replace(shot, prefix=job.family.prefix(request, shot, encoders))
        if each.latents is not None:
            each.latents = each.latents.to(self.device)
            return
        branches = job.family.branches(request, shot, encoders)
        shot = each.shot = replace(shot, known=job.family.known(request, shot, encoders))
        steps = job.family.schedule(request, job.config)
        if shot.known is not None:
            latents = shot.known.apply(latents, None)
            branches = {name: replace(branch, frozen=_frozen(shot.known)) for name, branch in branches.items()}
        run = Denoising(
            request=request, shot=shot, index=each.index, branches=branches, steps=steps, latents=latents,
            solver=make_solver(request.solver, steps), generator=each.generator, carry=each.carry,
        )  # fmt: skip
        if keeper:
            keeper.restore(run)
        coefficients = job.family.coefficients(request, job.config)
        each.forwards = Forwards(planned_forwards(steps[run.done :], coefficients, self._expectations))
        job.report.forwards.append(each.forwards)
        each.run = run

    def _denoise_expert(self, waiting: Sequence[_Ongoing]) -> None:
        """All that the expert of the first job's next step has to do, in one stay for every job that waits for it."""
        expert = waiting[0].segments()[0].expert
        with ExitStack() as stay:
            for each in waiting:
                while each.segments() and each.segments()[0].expert == expert:
                    self._guarded(partial(self._denoise_segment, stay), each)

    def _denoise_segment(self, stay: ExitStack, each: _Ongoing) -> None:
        job, run, forwards = each.job, cast("Denoising", each.run), cast("Forwards", each.forwards)
        segment = each.segments()[0]
        monitor = Monitor(job.progress, job.report.step_seconds)

        def record(step: Step, latents: Tensor) -> None:
            run.done, run.latents = step.index + 1, latents
            if job.keeper is not None:
                ahead = run.steps[run.done : run.done + 1]
                job.keeper.stepped(run, all(before(step) for before in self._resumable for step in ahead))

        dit = stay.enter_context(self._use(segment.expert))
        with self._seams(dit, segment, forwards) as denoiser:
            job.progress.stage("denoise", f"{len(segment.steps) - segment.start} steps with {segment.expert}")
            job.report.kernels[segment.expert] = self.kernels.get(segment.expert, "sdpa")
            monitor.start(run.latents)
            predict = Guidance(denoiser, run.branches, job.family.coefficients(run.request, job.config))
            observe: tuple[Observer, ...] = (monitor, record, *job.observe)
            steps = segment.steps[segment.start :]
            run.latents = sample(predict, run.solver, run.latents, steps, run.shot.known, observe)
            monitor.flush()

    def _finish_shot(self, each: _Ongoing) -> bool:
        job, latents = each.job, each.latents
        if latents is None:
            assert each.run is not None and each.forwards is not None
            if job.keeper is not None:
                job.keeper.denoised(each.run)
            each.forwards.check()
            latents = each.run.latents
        decode = Decode(
            use=partial(self._use, "vae"), shot=cast("Shot", each.shot), latents=latents, sink=job.sink,
            progress=job.progress, report=job.report, earlier=each.carry,
        )  # fmt: skip
        carry = decode.run(self._tiling)
        each.carry = None if carry is None else carry.to(self.device)
        each.run, each.latents, each.index = None, None, each.index + 1
        return self._next_shot(each)

    @contextmanager
    def _seams(self, dit: nn.Module, segment: Segment, forwards: Forwards) -> Iterator[Denoiser]:
        """The denoiser of one segment, with the trunk and the denoiser wrapped as the plan asked."""
        trunk = cast("Trunk", dit.trunk)
        wrapped = forwards.counting(trunk)
        for wrap in self._trunk_wrappers:
            wrapped = wrap(wrapped, dit, segment)
        denoiser: Denoiser = Sequential(dit)  # type: ignore[arg-type]
        for wrap_denoiser in self._denoiser_wrappers:
            denoiser = wrap_denoiser(denoiser, dit, segment)
        dit.trunk = wrapped  # type: ignore[assignment]
        try:
            yield denoiser
        finally:
            dit.trunk = trunk  # type: ignore[assignment]


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
