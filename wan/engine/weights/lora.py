"""LoRA files: what they add to which of our weights, whatever their dialect.

W' = W + strength * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685), or W' = W + strength * diff where a
file holds the difference itself. Read like weights: headers first, a change only when its layer comes along. Every
tensor of a file is accounted for: it changes a weight, is known to change none, or the file is refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.lora_alpha import alphas_of
from wan.engine.weights.lora_names import FIRST, SECOND, Part, Target, flat, our_name, parts_of, target_of
from wan.engine.weights.stream import WeightFile, open_weights

__all__ = ["Delta", "LoRAFile", "merged", "open_lora", "read_lora"]

_INPUT = "patch_embedding"
_EXPERTS = {FIRST: "high", SECOND: "low"}


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor at strength 1: `scale` * up @ down, with down [rank, in] and up [out, rank], or `diff`.

    Tensors have the dtype of the file. What is `behind` acts only on tokens that follow those of the video.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    diff: Tensor | None = None
    behind: bool = False

    def dense(self) -> Tensor:
        """The whole difference in float32; that of a pair is [out, in]."""
        if self.down is None or self.up is None:
            assert self.diff is not None, "a change is a pair or a difference"
            return self.diff.float() * self.scale
        return torch.mm(self.up.float(), self.down.float()) * self.scale

    def add_to(self, total: Tensor, strength: float) -> None:
        """Add it in place, with no second tensor of that size."""
        if self.down is None or self.up is None:
            assert self.diff is not None, "a change is a pair or a difference"
            total.add_(self.diff.view(total.shape), alpha=strength * self.scale)
        else:
            total.view(len(total), -1).addmm_(self.up.float(), self.down.float(), alpha=strength * self.scale)

    def to(self, device: torch.device) -> Delta:
        """The same where it is needed; does not wait."""
        moved = (None if t is None else t.to(device, non_blocking=True) for t in (self.down, self.up, self.diff))
        down, up, diff = moved
        return replace(self, down=down, up=up, diff=diff)


@dataclass(frozen=True)
class Change:
    """How one tensor is changed: `layer` as the file calls it, and the key of each part by role; see `Part.behind`."""

    layer: str
    keys: Mapping[str, str]
    behind: bool = False


class LoRAFile:
    """The changes of a file. Only headers have been read."""

    def __init__(
        self,
        weights: WeightFile,
        changes: Mapping[str, Mapping[Target, Change]],
        alpha: Callable[[str, int], float],
        without_effect: int = 0,
    ) -> None:
        """`changes` by the expert that the file gives them to, `alpha(layer, rank)` where no key says it."""
        self.path = weights.path
        self.without_effect = without_effect
        self._weights = weights
        self._shapes = weights.shapes()
        self._by_expert = {expert: dict(each) for expert, each in changes.items()}
        self._changes = {target: change for each in changes.values() for target, change in each.items()}
        self._alpha = alpha

    @property
    def targets(self) -> frozenset[Target]:
        """What is changed."""
        return frozenset(self._changes)

    @property
    def has_alpha(self) -> bool:
        """Whether it says by itself how its ranks are scaled."""
        return any("alpha" in change.keys for change in self._changes.values())

    def for_expert(self, name: str) -> LoRAFile:
        """What the file changes of "dit", "high" or "low". Raises BadCheckpoint for two experts where there is one."""
        if SECOND not in self._by_expert:
            return self
        if name not in _EXPERTS.values():
            change = next(iter(self._by_expert[SECOND].values()))
            raise BadCheckpoint(
                f"LoRA {str(self.path)!r} changes {change.layer!r}: it is for a model of two experts, this has one"
            )
        kept = {expert: each for expert, each in self._by_expert.items() if _EXPERTS.get(expert, name) == name}
        return LoRAFile(self._weights, kept, self._alpha, self.without_effect)

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, widening: bool = False) -> None:
        """Raise BadCheckpoint naming what a model of these shapes lacks or has in another size.

        With `widening` a layer may get more input channels; without, the model must have them already.
        """
        self._told_alphas  # noqa: B018 (raises for one that is none)
        known = {target_of(key): key for key in shapes}
        lacking = [change.layer for target, change in self._changes.items() if target not in known]
        if lacking:
            raise self.lacking(lacking)
        for target in self._changes:
            key = known[target]
            if (wider := self.shape(key, shapes[key])) != shapes[key] and not widening:
                raise BadCheckpoint(
                    f"LoRA {str(self.path)!r} gives {key!r} {wider[1]} input channels, this model was loaded with "
                    f"{shapes[key][1]}: that is another model; pass it where the model is loaded"
                )

    @property
    def behind(self) -> bool:
        """Whether anything of it acts only on tokens that a family puts behind those of the video."""
        return any(change.behind for change in self._changes.values())

    @property
    def may_widen(self) -> bool:
        """Whether it changes a layer that may get more input channels."""
        return any(target.layer == flat(_INPUT) for target in self._changes)

    def lacking(self, layers: Sequence[str]) -> BadCheckpoint:
        """What to raise where the model has no such layers."""
        return BadCheckpoint(
            f"LoRA {str(self.path)!r} changes {_listed(layers)}, which this transformer lacks; it was made for another "
            f"model ({len(layers)} of its {len(self._changes)} changes do not fit)"
        )

    def shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our weight `key` once it is changed: a convolution may get more input channels.

        Raises BadCheckpoint where the change does not fit.
        """
        change = self._changes.get(target_of(key))
        if change is None:
            return shape
        stored = {role: self._shapes[name] for role, name in change.keys.items()}
        found = stored.get("diff", stored.get("up_bias"))
        if found is None:
            found = _pair_shape(_through(stored["down"], stored.get("mid")), stored["up"], shape)
        if found == shape or (len(shape) > 2 and len(found) == len(shape) and _is_wider(found, shape)):
            return found
        raise BadCheckpoint(
            f"LoRA {str(self.path)!r} has {_said(stored)} for {change.layer!r}, whose {target_of(key).kind} is "
            f"{list(shape)}; it was made for a model of another size"
        )

    def changes(self, key: str) -> bool:
        """Whether our weight `key` is changed."""
        return target_of(key) in self._changes

    def is_pair(self, key: str) -> bool:
        """Whether our weight `key`, which is changed, gets the product of two thin matrices."""
        return "down" in self._changes[target_of(key)].keys

    def numbers(self, key: str, shape: Sequence[int]) -> int:
        """How many numbers make the change of our weight `key` of this shape."""
        if not self.is_pair(key):
            return math.prod(shape)
        rank = self._shapes[self._changes[target_of(key)].keys["up"]][1]
        return rank * (shape[0] + math.prod(shape[1:]))

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which the file has the change of our weight `key`."""
        return self._weights.dtypes()[next(iter(self._changes[target_of(key)].keys.values()))]

    def added(self, key: str, tensor: Tensor, strength: float) -> Tensor:
        """The weight `key` with its change added, in float32; `tensor` itself where there is none."""
        if not self.changes(key):
            return tensor
        shape = self.shape(key, tuple(tensor.shape))
        return torch.add(widened(tensor.float(), shape), self.delta(key).dense().view(shape), alpha=strength)

    def delta(self, key: str) -> Delta:
        """What is added to our weight `key`. Reads it."""
        target = target_of(key)
        keys = self._changes[target].keys
        read = dict(self._weights.stream(keys.values()))
        for role, stored in keys.items():
            if role != "alpha" and not all(end.isfinite() for end in read[stored].float().aminmax()):
                raise self._bad(stored, "holds NaN or infinity")
        parts = {role: read[stored] for role, stored in keys.items()}
        if "diff" in parts:
            return Delta(diff=parts["diff"])
        if "up_bias" in parts:
            pair = self._changes[Target(target.layer, "weight")]
            return Delta(diff=parts["up_bias"], scale=self._scale(pair))
        down, up = parts["down"], parts["up"].flatten(1)
        if "mid" in parts:
            mid = parts["mid"].view(*parts["mid"].shape[:2], -1)
            down = torch.einsum("rsk,si->rik", mid, down.flatten(1)).flatten(1)
        change = self._changes[target]
        return Delta(down=down.flatten(1), up=up, scale=self._scale(change), behind=change.behind)

    def counts(self) -> str:
        """What became of the file's tensors, in words."""
        pairs = sum("down" in change.keys for change in self._changes.values())
        tensors = sum(len(change.keys) for change in self._changes.values())
        ignored = f", {self.without_effect} of no effect" if self.without_effect else ""
        return f"{tensors} tensors used ({pairs} pairs, {len(self._changes) - pairs} differences){ignored}, 0 unknown"

    def _scale(self, change: Change) -> float:
        rank = self._shapes[change.keys["down"]][0]
        key = change.keys.get("alpha")
        return (self._alpha(change.layer, rank) if key is None else self._told_alphas[key]) / rank

    @cached_property
    def _told_alphas(self) -> dict[str, float]:
        """The alphas that keys say. Raises BadCheckpoint for one that is no number, in a key or elsewhere."""
        for change in self._changes.values():
            if "down" in change.keys and "alpha" not in change.keys:
                self._alpha(change.layer, self._shapes[change.keys["down"]][0])
        keys = [change.keys["alpha"] for change in self._changes.values() if "alpha" in change.keys]
        alphas = {key: float(alpha) for key, alpha in self._weights.stream(keys)}
        for key, alpha in alphas.items():
            if not math.isfinite(alpha):
                raise self._bad(key, f"is {alpha}, which scales nothing")
        return alphas

    def _bad(self, key: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"LoRA {str(self.path)!r}: {key!r} {what}; download it again, or leave it out")


def open_lora(path: Path) -> LoRAFile:
    """The LoRA in a file (.safetensors, .pt, .ckpt). Raises BadCheckpoint naming the first keys it cannot use."""
    if not path.is_file():
        raise BadCheckpoint(f"LoRA {str(path)!r} does not exist; pass a .safetensors, .pt or .ckpt file")
    lora, rest = read_lora(open_weights(path), alphas_of(path))
    if rest:
        raise BadCheckpoint(
            f"LoRA {str(path)!r} holds {_listed(list(rest.values()))} ({len(rest)} tensors), which it cannot use: "
            "this version reads pairs such as lora_A and lora_B or lora_down and lora_up, their alpha, and diff, "
            "diff_b, diff_m; convert other kinds (LoHa, LoKr, DoRA) with the tool that made them"
        )
    if not lora.targets:
        raise BadCheckpoint(f"LoRA {str(path)!r} is empty; download it again")
    return lora


def read_lora(
    weights: WeightFile, alpha: Callable[[str, int], float] = lambda layer, rank: float(rank)
) -> tuple[LoRAFile, dict[str, str]]:
    """The changes in a file and what else it holds, key in the file by our name. Raises BadCheckpoint if a half lacks.

    `alpha(layer, rank)` counts where no key of the file says it.
    """
    parts, without_effect, unknown = parts_of(weights.shapes())
    found: dict[str, dict[Target, Change]] = {}
    for key, part in parts.items():
        change = found.setdefault(part.expert, {}).setdefault(part.target, Change(part.layer, {}, part.behind))
        _add(change, part, key, weights.path)
    experts = found if SECOND in found else {"": {t: c for each in found.values() for t, c in each.items()}}
    for changes in experts.values():
        for target, change in changes.items():
            _check_whole(change, changes.get(Target(target.layer, "weight")), weights.path)
            _check_numbers(change, weights)
    return LoRAFile(weights, experts, alpha, len(without_effect)), {our_name(key): key for key in unknown}


def merged(
    weights: Iterable[tuple[str, Tensor]],
    loras: Sequence[tuple[LoRAFile, float]],
    told: Callable[[int, float], None] = lambda tensors, seconds: None,
) -> Iterator[tuple[str, Tensor]]:
    """The stream of weights with every (LoRA, strength) added, in float32 where one acts: rounded once, by who stores.

    One layer's change is in memory at a time. At the end `told` hears how many tensors were changed and the seconds it
    took. Raises BadCheckpoint if a layer never comes.
    """
    waiting = [set(lora.targets) for lora, _ in loras]
    seconds = 0.0
    for key, tensor in weights:
        started = time.perf_counter()
        for (lora, strength), targets in zip(loras, waiting, strict=True):
            targets.discard(target_of(key))
            tensor = lora.added(key, tensor, strength)
        seconds += time.perf_counter() - started
        yield key, tensor
        del tensor  # not kept alive while the next one is read
    for (lora, _), targets in zip(loras, waiting, strict=True):
        if targets:
            raise lora.lacking(sorted(target.layer for target in targets))
    told(len({target for lora, _ in loras for target in lora.targets}), seconds)


def widened(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` with zeros for the input channels that `shape` has more, which change nothing."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    more = torch.zeros(
        tensor.shape[0], shape[1] - tensor.shape[1], *shape[2:], dtype=tensor.dtype, device=tensor.device
    )
    return torch.cat((tensor, more), 1)


def _add(change: Change, part: Part, key: str, path: Path) -> None:
    assert isinstance(change.keys, dict)
    if part.role in change.keys or part.behind != change.behind:
        other = change.keys.get(part.role, next(iter(change.keys.values())))
        raise BadCheckpoint(f"LoRA {str(path)!r} holds {key!r} twice, also as {other!r}")
    change.keys[part.role] = key


def _check_whole(change: Change, pair: Change | None, path: Path) -> None:
    """Raise BadCheckpoint where a part lacks or two exclude each other."""
    roles = change.keys.keys()
    if roles == {"diff"} or (roles == {"up_bias"} and pair is not None and "down" in pair.keys):
        return
    if missing := [role for role in ("down", "up") if role not in roles]:
        raise BadCheckpoint(f"LoRA {str(path)!r} has no {missing[0]!r} matrix for {change.layer!r}; download it again")
    if "diff" in roles:
        raise BadCheckpoint(f"LoRA {str(path)!r} has a pair and a difference for {change.layer!r}: it is damaged")


def _check_numbers(change: Change, weights: WeightFile) -> None:
    """Raise BadCheckpoint for what holds codes in place of numbers, or nothing."""
    for role, key in change.keys.items():
        shape, dtype = weights.shapes()[key], weights.dtypes()[key]
        if math.prod(shape) and (dtype.is_floating_point or role == "alpha"):
            continue
        raise BadCheckpoint(
            f"LoRA {str(weights.path)!r}: {key!r} is {str(dtype).removeprefix('torch.')} {list(shape)}, nothing that "
            "can be added to a weight; pass the bf16, fp16 or fp32 file"
        )


def _through(down: Sequence[int], mid: Sequence[int] | None) -> Sequence[int]:
    """The shape of mid @ down, where a convolution has three factors: the window is that of the middle one."""
    return down if mid is None or len(mid) == 2 else (mid[0], down[1], *mid[2:])


def _pair_shape(down: Sequence[int], up: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of up @ down: that of the weight where the numbers agree, else what it looks like."""
    columns = math.prod(down[1:])
    if up[1] != down[0]:
        return up[0], -1
    if (up[0], columns) == (shape[0], math.prod(shape[1:])):
        return shape
    if len(down) == len(shape):
        return up[0], *down[1:]
    window = math.prod(shape[2:])
    return (up[0], columns // window, *shape[2:]) if columns % window == 0 else (up[0], columns)


def _is_wider(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return found[0] == shape[0] and found[2:] == shape[2:] and found[1] > shape[1]


def _said(stored: Mapping[str, tuple[int, ...]]) -> str:
    if "down" in stored:
        return f"{list(stored['up'])} x {list(stored['down'])}"
    return str(list(next(iter(stored.values()))))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
