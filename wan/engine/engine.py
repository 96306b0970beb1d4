"""The networks of a checkpoint, loaded the way the plan says, and what the plan's optimisations may do with them.

How videos are made with them is in `running`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.accounting import Expectation, Report
from wan.engine.adapting import Adapted
from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.monitor import Silent
from wan.engine.ops.float8 import Float8Linear
from wan.engine.placement import Placement, Policy
from wan.engine.plan import Optimization, Plan
from wan.engine.running import DenoiserWrapper, GroupRun, Hooks, Job, Sampling, SegmentWrapper, TrunkWrapper
from wan.engine.sampling.guidance import Post
from wan.engine.types import Coefficients, Component, Embeddings, Progress, Request, Step, Tiling
from wan.engine.weights.stream import load_into

__all__ = ["Engine", "Job", "build_engine", "main_dtype", "on_meta"]


class Engine:
    """The networks of one checkpoint, a plan, and the one way to run them. Built by `build_engine`."""

    def __init__(
        self, components: Sequence[Component], plan: Plan, hardware: Hardware, placement: Placement, model: str = ""
    ) -> None:
        self.plan = plan
        self.model = model
        """The published model this is one of, by the name of its configuration; what was measured on it goes by it."""
        self.hardware = hardware
        self.device = hardware.device
        self.placement = placement
        self.progress: Progress = Silent()
        self.report = Report()  # of the job that is being worked on, or was last
        self.embeddings: Embeddings | None = None
        self.expert_names = tuple(c.name for c in components if c.is_expert)
        self.kernels: dict[str, str] = {}
        """Expert -> its attention backend, where an optimisation chose one."""
        self.adapted: dict[str, Adapted] = {}
        """Expert -> what LoRAs keep beside its weights, where they are not merged."""
        self._names = tuple(c.name for c in components)
        self._hooks = Hooks()
        for component in components:
            placement.add(component.name, _loader(self, component), Policy.RESIDENT)
        self._begin(plan)  # refuses what cannot be and says where networks live; hooks are for runs
        self._hooks = Hooks()

    # What optimisations may do -------------------------------------------------------------------------------------

    def wrap_trunk(self, factory: TrunkWrapper) -> None:
        """Wrap `dit.trunk` in every segment of the coming run; the wrapper's state dies with the segment."""
        self._hooks.trunk_wrappers.append(factory)

    def wrap_denoiser(self, factory: DenoiserWrapper, *, outermost: bool = False) -> None:
        """Wrap the denoiser in every segment of the coming run; the wrapper's state dies with the segment.

        What is `outermost` is called once a step, whatever others make of the branches inside.
        """
        (self._hooks.step_wrappers if outermost else self._hooks.denoiser_wrappers).append(factory)

    def wrap_segment(self, wrapper: SegmentWrapper) -> None:
        """Enter `wrapper(dit, denoising)` round every segment of the coming run, for what acts on blocks' own seams."""
        self._hooks.segment_wrappers.append(wrapper)

    def change_noise(self, change: Callable[[Tensor, Request], Tensor]) -> None:
        """Change the noise [1, C, T, H, W] each shot of the coming run begins with."""
        self._hooks.noise.append(change)

    def sample_by(self, sampling: Sampling) -> None:
        """Take steps and solver of the coming run from `sampling`, not from family and request."""
        self._hooks.sampling = sampling

    def split_prompts(self, split: Callable[[str], Sequence[str]]) -> None:
        """Take a prompt of the coming run for several that follow each other, see `Denoising.scenes`."""
        self._hooks.prompts = split

    def expect_forwards(self, expectation: Expectation) -> None:
        """Say by how much the count of forwards may differ from one a branch and step in the coming run."""
        self._hooks.expectations.append(expectation)

    def resume_only(self, before: Callable[[Step], bool]) -> None:
        """Keep state in the coming run only where `before(next step)`: where that step runs every forward."""
        self._hooks.resumable.append(before)

    def weigh_steps(self, share: Callable[[Step], float]) -> None:
        """Say which share of a step's forwards is run in the coming run, so that the time left can be told."""
        self._hooks.shares.append(share)

    def wrap_coefficients(self, wrap: Callable[[Coefficients], Coefficients]) -> None:
        """Change how much of each guidance branch goes into a step of the coming run."""
        self._hooks.coefficients.append(wrap)

    def add_post(self, post: Post) -> None:
        """Change the guided velocity in the coming run, after those that were added before."""
        self._hooks.posts.append(post)

    def set_tiling(self, tiling: Tiling | None) -> None:
        """Encode and decode the coming run in tiles, None for whole frames."""
        self._hooks.tiling = tiling

    def set_frames_per_call(self, frames: int) -> None:
        """Decode so many latent frames at a time in the coming run; 0: as their size suggests."""
        self._hooks.frames_per_call = frames

    def during_run(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        """Hold a setting of the whole process during the coming run; leaving the context puts it back."""
        self._hooks.settings.append(setting)

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

    @contextmanager
    def use(self, name: str, device: str | None = None) -> Iterator[nn.Module]:
        """The network where it computes, while the context is open; see `Placement.use`."""
        # Parameters must be ordinary tensors, also when they are loaded or moved in the middle of a run.
        with torch.inference_mode(False):
            use = self.placement.use(name, device)
            module = use.__enter__()
        try:
            yield module
        finally:
            with torch.inference_mode(False):
                use.__exit__(None, None, None)

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
        hooks, self._hooks = self._hooks, Hooks()  # not kept: what is registered may hold the engine
        with torch.inference_mode(), ExitStack() as settings:
            for setting in hooks.settings:
                settings.enter_context(setting())
            return GroupRun(self, hooks, jobs).run()

    # Inside --------------------------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> None:
        """Forget what the last run registered and let the plan act again."""
        self._hooks = Hooks()
        for name in self._names:
            self.placement.set_policy(name, Policy.RESIDENT)
        for optimization in plan.enabled():
            optimization.apply(self)

    def _plan_for_call(self, overrides: Mapping[str, Any]) -> Plan:
        given = {name: value for name, value in overrides.items() if value is not None}
        plan = self.plan.changed([type(o) for o in self.plan.optimizations], given, source="generate()")
        for before, now in zip(self.plan.optimizations, plan.optimizations, strict=True):
            if before != now and not now.follows(before):
                names = ", ".join(sorted(name for name in given if hasattr(now, name))) or ", ".join(sorted(given))
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
            module = _declared(component)
            weights = component.weights(module)  # before the module takes another form than the file's
            for optimization in active:
                optimization.convert(module, name)
            dtypes = {key: value.dtype for key, value in module.state_dict().items()}
            for optimization in active:
                weights = optimization.transform(weights, name)
            homes: dict[str, Tensor | torch.device] = {}
            for optimization in active:
                homes.update(optimization.place(module, name, self))
            load_into(module, weights, dtype=dtypes.get, place=lambda key, tensor: homes.get(key, landing))
            module.eval().requires_grad_(False)
            for optimization in active:
                optimization.finish(module, name, self)
        return module


def _loader(engine: Engine, component: Component) -> Callable[[torch.device], nn.Module]:
    """Loads `component` for `engine` without holding it, so that an engine nobody needs any more goes at once."""
    owner = weakref.ref(engine)

    def load(landing: torch.device) -> nn.Module:
        alive = owner()
        assert alive is not None, "a network is loaded through its engine"
        return alive._load(component, landing)

    return load


def build_engine(
    components: Sequence[Component],
    plan: Plan,
    hardware: Hardware,
    placement: Placement | None = None,
    *,
    model: str = "",
) -> Engine:
    """An engine whose plan has been checked against this hardware. Networks load when first used."""
    plan.check(hardware)
    for optimization in plan.enabled():
        for component in components:
            optimization.check_component(component)
    return Engine(components, plan, hardware, placement or Placement(hardware.device), model)


def on_meta(component: Component, active: Iterable[Optimization]) -> nn.Module:
    """The component's module on the meta device, in the form and the dtypes its weights are stored in."""
    module = _declared(component)
    for optimization in active:
        optimization.convert(module, component.name)
    return module


def _declared(component: Component) -> nn.Module:
    """Its module, whose meta tensors have the dtypes the weights will be stored in; their stream follows them."""
    module = component.build()
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
    return module


def main_dtype(module: nn.Module) -> torch.dtype:
    """The dtype most of a module's floating parameters have, or are made in where they are kept in 8 bits."""
    count: Counter[torch.dtype] = Counter()
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                count[layer.dtype if isinstance(layer, Float8Linear) else parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0]
