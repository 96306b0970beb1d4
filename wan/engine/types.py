"""The nouns of the engine: what flows between pipeline, families, sampling and model.

Letters used throughout: B batch, C channels, T/H/W latent frames/height/width, L tokens, S text tokens, D width,
N heads. `t` is a timestep in 0..1000, `sigma` a noise level in 0..1; they are never mixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest

if TYPE_CHECKING:
    from wan.engine.sampling.solvers import Solver

_MISSING = dataclasses.MISSING


def tensor(*, time: int | None = None, rate: int = 1, first: int = 0, default: Any = _MISSING) -> Any:
    """A `Condition` field: a tensor with the batch in dim 0.

    `time` is the dim that follows time, None for none. `rate` entries belong to one latent frame; with `first` > 0
    the first `first` entries alone belong to latent frame 0.
    """
    return field(default=default, metadata={"tensor": True, "time": time, "rate": rate, "first": first})


def token(*, dim: int, default: Any = _MISSING) -> Any:
    """A `BlockInputs` field whose dim `dim` runs over tokens; sequence parallelism shards by this declaration."""
    return field(default=default, metadata={"token": dim})


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One guidance branch. Families subclass it to add tensors; batching and windows work from the declarations."""

    context: Tensor = tensor()
    """[B, S, D_text] text embeddings, zero-padded to the model's text length."""
    channels: Tensor | None = tensor(time=2, default=None)
    """[B, C_y, T, H, W], concatenated to the latents."""
    frozen: Tensor | None = tensor(time=2, default=None)
    """[B, 1, T, H, W], 1 where latents are known: those tokens get timestep 0."""
    memo: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict, repr=False, compare=False)

    def once(self, owner: str, fn: Callable[[], Tensor], *, time: int | None = None) -> Tensor:
        """`fn()`, computed at the first call for `owner` and kept while this condition lives.

        `owner` must name the expert too when experts give different values. Entries with `time` None do not depend
        on the frames and are shared with `window`s of this condition.
        """
        if owner not in self.memo:
            self.memo[owner] = (fn(), time)
        return self.memo[owner][0]

    def window(self, frames: Sequence[int]) -> Self:
        """The condition of some latent frames only."""
        changes: dict[str, Any] = {}
        for f in _tensor_fields(self):
            value, dim = getattr(self, f.name), f.metadata["time"]
            if value is not None and dim is not None:
                index = _entries(frames, f.metadata["rate"], f.metadata["first"])
                changes[f.name] = value.index_select(dim, torch.tensor(index, device=value.device))
        shared = {owner: entry for owner, entry in self.memo.items() if entry[1] is None}
        return dataclasses.replace(self, memo=shared, **changes)

    def share_memo(self, whole: Self) -> None:
        """Give what this window computed, as far as it does not depend on its frames, to its other windows too."""
        whole.memo.update((owner, entry) for owner, entry in self.memo.items() if entry[1] is None)

    @classmethod
    def cat(cls, items: Sequence[Self]) -> Self:
        """All `items` stacked along the batch. Raises ValueError where one lacks a tensor the others have."""
        changes: dict[str, Any] = {}
        for f in _tensor_fields(items[0]):
            values = [getattr(item, f.name) for item in items]
            if any(value is None for value in values):
                if any(value is not None for value in values):
                    raise ValueError(
                        f"conditions differ: some have {f.name!r} and some do not, so they cannot be batched"
                    )
                continue
            changes[f.name] = torch.cat(values)
        return dataclasses.replace(items[0], memo={}, **changes)

    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shape of every tensor; conditions of equal shapes can be batched."""
        values = (getattr(self, f.name) for f in _tensor_fields(self))
        return tuple(None if value is None else tuple(value.shape) for value in values)


def _tensor_fields(condition: Condition) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(condition) if f.metadata.get("tensor")]


def _entries(frames: Sequence[int], rate: int, first: int) -> list[int]:
    """Positions along a time dim that belong to these latent frames."""
    if not first:
        return [frame * rate + i for frame in frames for i in range(rate)]
    entries: list[int] = []
    for frame in frames:
        entries += range(first) if frame == 0 else range(first + (frame - 1) * rate, first + frame * rate)
    return entries


@dataclass(frozen=True)
class Step:
    """One solver step. `frame_t` overrides `t` per latent frame; `window` names the latent frames of a window.

    `lora` are factors of the LoRAs' strengths: none for 1, one for all of them, or one for each.
    """

    index: int
    count: int
    t: float
    sigma: float
    sigma_next: float
    expert: str = "dit"
    phase: int = 0
    frame_t: tuple[float, ...] | None = None
    window: tuple[int, ...] = ()
    lora: tuple[float, ...] = ()

    def lora_factor(self, number: int) -> float:
        """How much of its strength the LoRA with this number, of those that change the expert, has in this step."""
        return self.lora[number if len(self.lora) > 1 else 0] if self.lora else 1.0


class Denoiser(Protocol):
    """All branches of one step at once: latents [B, C, T, H, W] in, one velocity of that shape per branch out."""

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Known:
    """Latents that are given, not sampled. `mask` is 1 where they are known and broadcasts to the latents."""

    latents: Tensor
    mask: Tensor

    def apply(self, latents: Tensor, step: Step | None) -> Tensor:
        """`latents` with the known part put back; `step` None means the initial noise."""
        return (1 - self.mask) * latents + self.mask * self.latents


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one expert and phase. `start` steps of it are already done (resume)."""

    expert: str
    steps: tuple[Step, ...]
    phase: int = 0
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One denoise-and-decode; most requests have one.

    `keep` selects the latents to decode, `prefix` latents are put before them, `trim` selects the frames kept,
    `anchor` leading frames belong to every window, `reseed` None lets the generator run on, and the next shot needs
    the last `carry_frames` frames of the video so far. `index` is the number of the shot, `before` the frames
    [3, n, H, W] it goes on from.
    """

    latent_shape: tuple[int, int, int, int]
    known: Known | None = None
    reseed: int | None = None
    anchor: int = 0
    index: int = 0
    before: Tensor | None = None
    keep: slice = field(default_factory=lambda: slice(None))
    prefix: Tensor | None = None
    trim: slice = field(default_factory=lambda: slice(None))
    carry_frames: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. Everything that changes pixels is here; how it runs is the `Plan`.

    `guide_scale` is (low-noise, high-noise), `seed` is resolved (never -1), `inputs` the family's own dataclass.
    """

    task: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    steps: int
    shift: float
    solver: str
    guide_scale: tuple[float, float]
    seed: int
    noise_device: str | None = None
    inputs: Any = None


@dataclass
class Denoising:
    """The whole state of one denoise; `state` and `load` are what crash-resume saves and restores."""

    request: Request
    shot: Shot
    index: int
    branches: dict[str, Condition]
    steps: tuple[Step, ...]
    latents: Tensor
    solver: Solver
    generator: torch.Generator
    done: int = 0
    carry: Tensor | None = None
    scenes: tuple[dict[str, Condition], ...] = ()
    """The branches of each part of a prompt that changes over the video; empty where it does not."""

    def state(self) -> dict[str, Tensor]:
        """Tensors only, so that it can be stored as safetensors."""
        own = {
            "latents": self.latents,
            "done": torch.tensor([self.done]),
            "index": torch.tensor([self.index]),
            "generator": self.generator.get_state(),
        }
        return own | {f"solver.{key}": value for key, value in self.solver.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.latents = state["latents"].to(self.latents.device)
        self.done = int(state["done"])
        self.generator.set_state(state["generator"].cpu())
        prefix, device = "solver.", self.latents.device
        history = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.solver.load({key: value.to(device) for key, value in history.items()})


class Sink(Protocol):
    """Where frames go: a video encoder, or a tensor for callers of the API. Frames are [3, n, H, W] in -1..1."""

    def write(self, frames: Tensor) -> None: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


class Keeper(Protocol):
    """Keeps what a run has reached, so that a crash loses little. `wan.runs.Run` keeps it on disk."""

    def finished(self, shot: int) -> Tensor | None:
        """Latents [1, C, T, H, W] of a shot that was denoised before: it is only decoded. None to denoise it."""

    def restore(self, run: Denoising) -> None:
        """Put a freshly prepared denoise where its kept state left off, if there is one."""

    def stepped(self, run: Denoising, resumable: bool) -> None:
        """A step is done; `resumable` says that a run continued from here would take the same forwards."""

    def denoised(self, run: Denoising) -> None:
        """A shot's latents are finished and about to be decoded."""


class Progress(Protocol):
    """Who listens to a run.

    `seconds` is the duration of the step just done, `share` the part of its forwards that was run (1, or less where a
    cache answered) and `ahead` the sum of the shares of the steps to come.
    """

    def stage(self, name: str, detail: str = "") -> None: ...

    def step(self, step: Step, seconds: float, share: float, ahead: float) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Code in tiles of at most `tile` x `tile` latent pixels that share `overlap` of them with their neighbours.

    `park` keeps what each tile remembers of earlier frames in RAM while other tiles are computed. On the device all of
    them together are larger than what a whole frame remembers. Raises BadRequest.
    """

    tile: int = 32
    overlap: int = 8
    park: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise BadRequest(
                f"VAE tiles of {self.tile!r} latent pixels cannot share {self.overlap!r} with their neighbours: "
                "--vae_tile_overlap must be at least 0 and less than --vae_tile_size; 32 and 8 are the defaults"
            )


@dataclass(frozen=True)
class Layout:
    """Token grid of the latents after patchify (frames, rows, columns), for sparse and windowed attention."""

    grid: tuple[int, int, int]
    tokens: int = 0


Coefficients = Callable[[Step], dict[str, float]]


class Embeddings(Protocol):
    """Text embeddings [S, D] computed before; `how` is what beside text and weights decides their bits."""

    def get(self, text: str, how: Mapping[str, Any]) -> Tensor | None: ...

    def put(self, text: str, how: Mapping[str, Any], states: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What `Family.branches` may ask for: `use(name)` is a context that yields the network where it computes.

    `where(name)` is the device it computes on, known without loading it.
    """

    use: Callable[[str], Any]
    where: Callable[[str], torch.device]
    device: torch.device
    config: Any
    embeddings: Embeddings | None = None
    tiling: Tiling | None = None
    """How the VAE is to encode; None: whole frames."""
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, fn: Callable[[], Any]) -> Any:
        """`fn()`, computed for the first shot that asks for `name` and kept for all shots of the request."""
        if name not in self.memo:
            self.memo[name] = fn()
        return self.memo[name]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One task family: wiring only. See `docs/adding-a-family.md`."""

    name: str
    configs: Mapping[str, Any]
    branches: Callable[[Request, Shot, Encoders], dict[str, Condition]]
    schedule: Callable[[Request, Any], tuple[Step, ...]]
    """(request, task config) -> steps, each naming its expert."""
    coefficients: Callable[[Request, Any], Coefficients]
    next_shot: Callable[[Request, Any, int, Tensor | None], Shot | None]
    """(request, task config, number of the shot, carried frames) -> the shot, or None after the last one. Pure."""
    known: Callable[[Request, Shot, Encoders], Known | None] = lambda request, shot, encoders: shot.known
    """The latents that are given, where they take an encoder to make."""
    prefix: Callable[[Request, Shot, Encoders], Tensor | None] = lambda request, shot, encoders: shot.prefix
    """The latents to decode before a shot's own, where they take an encoder to make; `branches` gets them in the shot.
    Asked also for a shot that is only decoded."""
    shot_frames: Callable[[Request], int] = lambda request: request.num_frames
    """How many frames a shot decodes, which the VAE must be able to make; the request's are those of all shots."""
    inputs: type | None = None
    condition: type[Condition] = Condition
    encoders: tuple[str, ...] = ("text_encoder", "vae")
    defaults: Mapping[str, Any] = field(default_factory=dict)


EXPERTS = ("dit", "high", "low")
"""Names of components that are transformers: one alone, or those for high and for low noise."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """How one network of an engine comes to be: a module on the meta device and the weights that fill it.

    `float32` says which checkpoint keys keep float32 storage whatever `dtype` is.
    """

    name: str
    build: Callable[[], nn.Module]
    weights: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
    """meta module -> (key, tensor) stream; the module is needed to make dummy weights."""
    dtype: torch.dtype
    is_expert: bool = False
    float32: Callable[[str], bool] = lambda key: False
