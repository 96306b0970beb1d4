"""Who is timed: our networks as a checkpoint would make them, the original's operations, diffusers; random weights.

All of them hold one set of weights, so that two transformers of 14B fit where one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from limits import reference
from limits.book import FAULTS, Act
from torch import Tensor, nn

from wan.cli.benchmarking.rival import FLOAT32_MODULES
from wan.components import dummy_components
from wan.configs import WAN_CONFIGS
from wan.engine import roofline
from wan.engine.engine import build_engine
from wan.engine.hardware import Hardware
from wan.engine.ops import attention as backends
from wan.engine.ops.op import computed_by
from wan.engine.ops.providers import choose
from wan.engine.optimizations import registry
from wan.engine.plan import Plan
from wan.engine.swapping import Swap, homes_of
from wan.engine.types import Condition
from wan.engine.weights.keymap import DIFFUSERS_DIT, diffusers_vae, diffusers_vae22
from wan.layouts.library import transformer_config, vae_config
from wan.modules.blocks import call_block
from wan.modules.vae_config import VAEConfig
from wan.sizes import models_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task at a size, and how a row names it. A `brief` one leaves out what another size of it tells as well."""

    key: str
    task: str
    width: int
    height: int
    frames: int
    brief: bool = False


def network(task: str, hardware: Hardware, name: str | None = None, **options: Any) -> Any:
    """A network of a task with random weights, made and finished as a run with these options makes it."""
    components = dummy_components(WAN_CONFIGS[task])
    engine = build_engine(components, Plan.of(registry(), options), hardware)
    return engine.network(name or engine.expert_names[-1])


class Forwards:
    """One forward of a case's transformer: what goes in, what it costs, and who may compute it."""

    def __init__(self, case: Case, hardware: Hardware, **options: Any) -> None:
        self.case, self.hardware = case, hardware
        config = WAN_CONFIGS[case.task]
        self.dit = network(case.task, hardware, **options)
        stride = config.vae_stride
        shape = (
            1,
            self.dit.in_dim,
            (case.frames - 1) // stride[0] + 1,
            case.height // stride[1],
            case.width // stride[2],
        )
        self.latents = torch.randn(shape, device=hardware.device)
        self.text = torch.randn(1, min(200, self.dit.text_len), self.dit.text_dim, device=hardware.device)
        self.time = torch.tensor([999.0], device=hardware.device)
        self.models = models_of(dummy_components(WAN_CONFIGS[case.task]))
        self.resize(case)

    def resize(self, case: Case) -> None:
        """Another size, with the same weights."""
        self.case = case
        frames, rows, columns = latent_size(case)
        self.latents = torch.randn(1, self.dit.in_dim, frames, rows, columns, device=self.hardware.device)
        self.flop = roofline.forward(self.models.transformer, frames * (rows // 2) * (columns // 2)).total

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Three latent frames at most: enough to compare values, in a fraction of the time."""
        whole = self.latents
        self.latents = whole[:, :, :3].contiguous()
        try:
            yield
        finally:
            self.latents = whole

    def ours(self, time: Tensor | None = None) -> Tensor:
        condition = Condition(context=self.text)
        return self.dit.velocity(self.latents, self.time if time is None else time, condition)

    def original(self, backend: str) -> Tensor:
        return reference.velocity(self.dit, self.latents, self.time, self.text, self._attend(backend))

    def _attend(self, backend: str) -> Callable[..., Tensor]:
        half = self.dit.patch_embedding.weight.dtype
        return backends.choose(backend, self.hardware, half, self.dit.dim // self.dit.num_heads)[1]

    @contextmanager
    def attending(self, backend: str) -> Iterator[None]:
        """Our DiT with this backend everywhere."""
        attend = self._attend(backend)
        layers = [layer for layer in self.dit.modules() if "attend" in vars(layer)]
        before = [layer.attend for layer in layers]
        try:
            for layer in layers:
                layer.attend = attend
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer.attend = was

    @contextmanager
    def compiled(self, backend: str = "inductor") -> Iterator[None]:
        """Our DiT with compiled blocks, through the seam that `--compile` leaves uncompiled."""
        before = self.dit.run_block
        self.dit.run_block = torch.compile(call_block, fullgraph=True, backend=backend)
        try:
            yield
        finally:
            self.dit.run_block = before

    @contextmanager
    def swapped(self, prefetch: int = 2) -> Iterator[None]:
        """Our DiT with all blocks in pinned memory; they stay there."""
        homes = homes_of(self.dit, list(self.dit.blocks), pin=True)
        for key, parameter in self.dit.named_parameters():
            home = homes.get(key)
            if isinstance(home, Tensor):
                parameter.data = home.copy_(parameter.data)
        swap = Swap(list(self.dit.blocks), self.hardware.device, prefetch=prefetch)
        before = self.dit.run_block
        self.dit.run_block = swap.wrap(before)
        try:
            yield
        finally:
            self.dit.run_block = before
            swap.release()

    def kernels(self) -> AbstractContextManager[None]:
        """Our fused kernels, where any works here."""
        chosen = choose("auto", self.hardware)
        return computed_by({op: kernel for op, (_, kernel) in chosen.items()}) if chosen else nullcontext()

    def rival(self) -> Any:
        """diffusers' transformer on the same tensors."""
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            model = WanTransformer3DModel(**transformer_config(self.dit.config))
        state = {}
        for key, tensor in self.dit.state_dict().items():
            theirs = DIFFUSERS_DIT.to_theirs(key)
            state[theirs] = tensor.float() if FLOAT32_MODULES & set(theirs.split(".")) else tensor
        model.load_state_dict(state, strict=True, assign=True)
        rope = model.rope  # its tables are no weights, so they are still on meta
        model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(self.hardware.device)
        return model.eval().requires_grad_(False)

    def of_rival(self, model: Any) -> Act:
        dtype = self.dit.patch_embedding.weight.dtype
        missing = self.text.new_zeros(1, self.dit.text_len - self.text.shape[1], self.dit.text_dim)
        text = torch.cat([self.text, missing], 1).to(dtype)

        def run() -> Tensor:
            made = model(
                hidden_states=self.latents.to(dtype), timestep=self.time, encoder_hidden_states=text, return_dict=False
            )
            return made[0].float()

        return run


def latent_size(case: Case) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents."""
    time, row, column = WAN_CONFIGS[case.task].vae_stride
    return (case.frames - 1) // time + 1, case.height // row, case.width // column


def inside(context: Callable[[], AbstractContextManager[Any]], act: Act) -> Act:
    """The act within a context that is opened for it."""

    def run() -> Any:
        with context():
            return act()

    return run


def usable(model: Callable[[], Any]) -> Any:
    """A rival, or None where its package is not here or refuses."""
    try:
        return model()
    except FAULTS as error:
        print(f"left out: {error}", flush=True)
        return None


def rival_vae(ours: nn.Module, dtype: torch.dtype) -> Any:
    """diffusers' VAE with the weights of ours."""
    from diffusers import AutoencoderKLWan

    sizes: VAEConfig = ours.config  # type: ignore[assignment]
    blocks = sizes.num_res_blocks
    names = diffusers_vae22(blocks) if sizes.grouped else diffusers_vae(len(sizes.dim_mult), blocks)
    with torch.device("meta"):
        model = AutoencoderKLWan(**vae_config(sizes))
    state = {names.to_theirs(key): value.to(dtype) for key, value in ours.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
