"""Makes the videos of a group of jobs with an engine's networks: branches, noise, denoise, decode, shot by shot.

Every stage is done for all jobs before the next one begins, so that a second expert is brought in once for a group
and not once for a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wan.engine.accounting import Expectation, Forwards, Report, Trunk, planned_forwards
from wan.engine.attempts import Attempt, attempts, first_that_fits, is_out_of_memory
from wan.engine.decoding import Decode
from wan.engine.monitor import Monitor
from wan.engine.sampling.denoiser import Sequential
from wan.engine.sampling.guidance import Guidance, Post
from wan.engine.sampling.loop import sample
from wan.engine.sampling.noise import first_latents
from wan.engine.sampling.schedule import segments
from wan.engine.sampling.solvers import Solver, make_solver
from wan.engine.types import (
    Coefficients,
    Denoiser,
    Denoising,
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

if TYPE_CHECKING:
    from wan.engine.engine import Engine

TrunkWrapper = Callable[[Trunk, nn.Module, Segment], Trunk]
DenoiserWrapper = Callable[[Denoiser, nn.Module, Segment], Denoiser]
Made = TypeVar("Made")
SegmentWrapper = Callable[[nn.Module, Denoising], AbstractContextManager[None]]
Observer = Callable[[Step, Tensor], None]
Sampling = Callable[["Job", int], tuple[tuple[Step, ...], Solver]]
"""(job, number of the shot) -> its steps, and a new solver for them."""


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


def plain_sampling(job: Job, shot: int) -> tuple[tuple[Step, ...], Solver]:
    """The family's steps, and the solver that the request names."""
    steps = job.family.schedule(job.request, job.config)
    return steps, make_solver(job.request.solver, steps)


@dataclass
class Hooks:
    """What optimisations registered for one run; the methods of `Engine` say what each does."""

    trunk_wrappers: list[TrunkWrapper] = field(default_factory=list)
    denoiser_wrappers: list[DenoiserWrapper] = field(default_factory=list)
    step_wrappers: list[DenoiserWrapper] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    resumable: list[Callable[[Step], bool]] = field(default_factory=list)
    shares: list[Callable[[Step], float]] = field(default_factory=list)
    coefficients: list[Callable[[Coefficients], Coefficients]] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    segment_wrappers: list[SegmentWrapper] = field(default_factory=list)
    settings: list[Callable[[], AbstractContextManager[None]]] = field(default_factory=list)
    noise: list[Callable[[Tensor, Request], Tensor]] = field(default_factory=list)
    sampling: Sampling = plain_sampling
    prompts: Callable[[str], Sequence[str]] = lambda prompt: [prompt]
    tiling: Tiling | None = None
    frames_per_call: int = 0

    def share(self, step: Step) -> float:
        """What part of `step`'s forwards is run, as far as is known."""
        return min((share(step) for share in self.shares), default=1.0)


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
    coding: list[Attempt] = field(default_factory=list)
    """Ways to encode, from the one that memory sufficed for last."""
    forwards: Forwards | None = None
    failure: Exception | None = None

    def segments(self) -> list[Segment]:
        return [] if self.run is None or self.failure else segments(self.run.steps, self.run.done)


class GroupRun:
    """Jobs that are made together by one engine; see `Engine.run_group`."""

    def __init__(self, engine: Engine, hooks: Hooks, jobs: Sequence[Job]) -> None:
        self.engine = engine
        self.hooks = hooks
        self.ongoing = [_Ongoing(job) for job in jobs]
        self._encoding = ""
        """The encoder that was asked for last."""

    def run(self) -> list[Exception | None]:
        """Make all videos; why each one failed."""
        active = [each for each in self.ongoing if self._guarded(self._next_shot, each)]
        while active:
            for each in active:
                self._guarded(self._prepare, each)
            while waiting := [each for each in active if each.segments()]:
                self._denoise_expert(waiting)
            active = [each for each in active if self._guarded(self._finish_shot, each)]
        return [each.failure for each in self.ongoing]

    @contextmanager
    def _encoder(self, way: Attempt, name: str) -> Iterator[nn.Module]:
        self._encoding, is_vae = name, name == "vae"
        if is_vae:
            self.engine.report.encode = str(way)
        with self.engine.use(name, way.device if is_vae else None) as module:
            self.engine.progress.stage(f"encode with {name}")
            yield module

    def _encoded(self, each: _Ongoing, ask: Callable[[Encoders], Made]) -> Made:
        """What `ask` makes with the encoders, in the first way for which memory suffices to encode frames."""

        def attempt(way: Attempt) -> Made:
            encoders = Encoders(
                use=partial(self._encoder, way), where=self.engine.placement.device_of,
                device=self.engine.device, config=each.job.config, embeddings=self.engine.embeddings,
                tiling=way.tiling, memo=each.memo,
            )  # fmt: skip
            made = ask(encoders)
            each.coding = each.coding[each.coding.index(way) :]
            return made

        return first_that_fits(
            each.coding, attempt, doing="encoding", progress=each.job.progress,
            lacks=lambda error: self._encoding == "vae" and is_out_of_memory(error),
        )  # fmt: skip

    def _guarded(self, act: Callable[[_Ongoing], bool | None], each: _Ongoing) -> bool:
        """`act(each)`, unless the job failed before; what it raises is kept, so that the rest of a group goes on."""
        if each.failure is not None:
            return False
        self.engine.progress, self.engine.report = each.job.progress, each.job.report
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
        each.coding = each.coding or attempts(self.hooks.tiling, max(shot.latent_shape[2:]))
        each.run, each.latents = None, keeper.finished(each.index) if keeper else None
        # Also of a shot that is only decoded: the next one's noise comes after it.
        each.generator, latents = first_latents(request, shot, each.generator, self.engine.device)
        prefix, branches, known = job.family.prefix, job.family.branches, job.family.known
        shot = each.shot = replace(shot, prefix=self._encoded(each, partial(prefix, request, shot)))
        if each.latents is not None:
            each.latents = each.latents.to(self.engine.device)
            return
        for change in self.hooks.noise:
            latents = change(latents, request)
        asked = [replace(request, prompt=part) for part in self.hooks.prompts(request.prompt)]
        scenes = [self._encoded(each, partial(branches, part, shot)) for part in asked]
        shot = each.shot = replace(shot, known=self._encoded(each, partial(known, request, shot)))
        steps, solver = self.hooks.sampling(job, each.index)
        if shot.known is not None:
            latents, frozen = shot.known.apply(latents, None), _frozen(shot.known)
            scenes = [{name: replace(branch, frozen=frozen) for name, branch in each.items()} for each in scenes]
        run = Denoising(
            request=request, shot=shot, index=each.index, branches=scenes[0], steps=steps, latents=latents,
            solver=solver, generator=each.generator, carry=each.carry,
            scenes=tuple(scenes) if len(scenes) > 1 else (),
        )  # fmt: skip
        if keeper:
            keeper.restore(run)
        planned = planned_forwards(steps[run.done :], self._coefficients(job), self.hooks.expectations)
        each.forwards = Forwards(planned, plain=0 if run.done else _plain_count(job))
        job.report.forwards.append(each.forwards)
        each.run = run

    def _coefficients(self, job: Job) -> Coefficients:
        coefficients = job.family.coefficients(job.request, job.config)
        for wrap in self.hooks.coefficients:
            coefficients = wrap(coefficients)
        return coefficients

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
        monitor = Monitor(job.progress, job.report.step_seconds, run.steps, self.hooks.share)

        def record(step: Step, latents: Tensor) -> None:
            run.done, run.latents = step.index + 1, latents
            if job.keeper is not None:
                ahead = run.steps[run.done : run.done + 1]
                job.keeper.stepped(run, all(before(step) for before in self.hooks.resumable for step in ahead))

        dit = stay.enter_context(self.engine.use(segment.expert))
        with self._seams(dit, run, segment, forwards) as denoiser:
            job.progress.stage("denoise", f"{len(segment.steps) - segment.start} steps with {segment.expert}")
            job.report.kernels[segment.expert] = self.engine.kernels.get(segment.expert, "sdpa")
            monitor.start(run.latents)
            predict = Guidance(denoiser, run.branches, self._coefficients(job), self.hooks.posts)
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
            use=partial(self.engine.use, "vae"), shot=cast("Shot", each.shot), latents=latents, sink=job.sink,
            progress=job.progress, report=job.report, earlier=each.carry,
            frames_per_call=self.hooks.frames_per_call,
        )  # fmt: skip
        carry = decode.run(self.hooks.tiling)
        each.carry = None if carry is None else carry.to(self.engine.device)
        each.run, each.latents, each.index = None, None, each.index + 1
        return self._next_shot(each)

    @contextmanager
    def _seams(self, dit: nn.Module, run: Denoising, segment: Segment, forwards: Forwards) -> Iterator[Denoiser]:
        """The denoiser of one segment, with the trunk and the denoiser wrapped as the plan asked."""
        trunk = cast("Trunk", dit.trunk)
        alone = not self.hooks.trunk_wrappers and trunk == dit.plain_trunk
        wrapped = forwards.counting(trunk, give_away=alone)
        for wrap in self.hooks.trunk_wrappers:
            wrapped = wrap(wrapped, dit, segment)
        denoiser: Denoiser = Sequential(dit)  # type: ignore[arg-type]
        for wrap_denoiser in (*self.hooks.denoiser_wrappers, *self.hooks.step_wrappers):
            denoiser = wrap_denoiser(denoiser, dit, segment)
        dit.trunk = wrapped  # type: ignore[assignment]
        try:
            with ExitStack() as inside:
                for wrap_segment in self.hooks.segment_wrappers:
                    inside.enter_context(wrap_segment(dit, run))
                yield denoiser
        finally:
            dit.trunk = trunk  # type: ignore[assignment]


def _plain_count(job: Job) -> int:
    """Forwards of a shot as the request has it, whatever optimisations make of it."""
    coefficients = job.family.coefficients(job.request, job.config)
    planned = planned_forwards(job.family.schedule(job.request, job.config), coefficients)
    return sum(most for _, most in planned.values())


def _frozen(known: Known) -> Tensor:
    """[B, 1, T, H, W] mask of the latents that are given."""
    return known.mask if known.mask.shape[1] == 1 else known.mask.amin(dim=1, keepdim=True)
