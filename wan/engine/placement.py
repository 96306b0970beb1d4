"""Where each network is and when it moves: resident on the device, there only while used, or on the CPU for good.

`Placement` decides, a `Mover` acts, so that the order of moves can be tested without a GPU; what enters and leaves is
logged for debugging. Networks are loaded when first needed, and a resident one straight onto the device.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wan.engine.arena import Arena, aligned

CPU = torch.device("cpu")

_LOG = logging.getLogger(__name__)


class Policy(enum.Enum):
    """How a network is placed."""

    RESIDENT = "resident"
    """Moved to the device (or loaded onto it) once; never leaves."""
    AFTER_USE = "after use"
    """Lives in RAM, enters the device for use, leaves right afterwards."""
    ON_CPU = "on the CPU"
    """Lives and computes on the CPU."""


class Mover(Protocol):
    """The only thing that touches devices; tests use one that records."""

    def to_device(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> None: ...

    def to_host(self, name: str, tensors: Sequence[Tensor]) -> None: ...


class Swapped(Protocol):
    """The part of a network that stays in RAM, because it comes to the device piece by piece while it computes."""

    def tensors(self) -> Sequence[Tensor]:
        """What stays in RAM."""

    def release(self) -> None:
        """Give back the memory on the device; nobody computes with the network now."""


Load = Callable[[torch.device], nn.Module]


@dataclass
class _Slot:
    """One network: how it is loaded, where it is, and how many `use`s are open."""

    load: Load | None
    policy: Policy
    module: nn.Module | None = None
    where: torch.device = CPU
    uses: int = 0
    swapped: Swapped | None = None

    def moving(self) -> list[Tensor]:
        """The tensors that enter and leave the device with the network."""
        assert self.module is not None, "what moves has been loaded"
        staying = {id(tensor) for tensor in self.swapped.tensors()} if self.swapped is not None else set()
        return [tensor for tensor in tensors_of(self.module) if id(tensor) not in staying]


class Placement:
    """The networks of an engine by name. `use` is the one way to compute with them."""

    def __init__(self, device: torch.device, mover: Mover | None = None) -> None:
        self.device = device
        self._mover = mover or DeviceMover()
        self._slots: dict[str, _Slot] = {}

    def add(self, name: str, load: Load, policy: Policy, *, early: bool = False) -> None:
        """Declare a network. `load(where)` is called at first need, or now if `early`, and puts its weights there."""
        self._slots[name] = _Slot(load, policy)
        if early:
            self.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every network declared."""
        return tuple(self._slots)

    def policy(self, name: str) -> Policy:
        """How `name` is placed now."""
        return self._slots[name].policy

    def set_policy(self, name: str, policy: Policy) -> None:
        """Place `name` differently from its next use on. One that may stay no longer leaves before another enters."""
        self._slots[name].policy = policy

    def device_of(self, name: str) -> torch.device:
        """Where `use(name)` computes."""
        return CPU if self._slots[name].policy is Policy.ON_CPU else self.device

    def get(self, name: str) -> nn.Module:
        """The network, loaded if need be, wherever it is."""
        slot = self._slots[name]
        home = self.device if slot.policy is Policy.RESIDENT else CPU
        return self._loaded(name, home)

    def set(self, name: str, module: nn.Module) -> None:
        """Replace a network by a user's; it is taken to be where its first tensor is."""
        slot = self._slots[name]
        slot.module, slot.where = module, next((tensor.device for tensor in tensors_of(module)), CPU)
        slot.swapped = None

    def swap(self, name: str, swapped: Swapped) -> None:
        """Leave this part of a network, which is being loaded, in RAM when the rest of it moves."""
        self._slots[name].swapped = swapped

    def loaded(self) -> dict[str, nn.Module]:
        """The networks that have been loaded so far."""
        return {name: slot.module for name, slot in self._slots.items() if slot.module is not None}

    @contextmanager
    def use(self, name: str, device: torch.device | str | None = None) -> Iterator[nn.Module]:
        """The network, where it computes (`device` overrules its policy for this use), while the context is open.

        Networks that are placed after use and not in use leave the device first. Entering again inside changes
        nothing. After an exception, also one while moving, everything is where it was or in RAM, and usable.
        """
        slot = self._slots[name]
        if slot.uses == 0:
            self._bring(name, torch.device(device) if device is not None else self.device_of(name))
        assert slot.module is not None, "a network in use is loaded"
        slot.uses += 1
        try:
            yield slot.module
        finally:
            slot.uses -= 1
            if slot.uses == 0 and slot.swapped is not None:
                slot.swapped.release()
            if slot.uses == 0 and slot.policy is Policy.AFTER_USE:
                self._leave(name)

    def _bring(self, name: str, target: torch.device) -> None:
        slot = self._slots[name]
        if target != CPU:
            for other, resting in self._slots.items():
                if other != name and resting.uses == 0 and resting.policy is not Policy.RESIDENT:
                    self._leave(other)
        self._loaded(name, target if slot.policy is Policy.RESIDENT else CPU)
        if target == CPU:
            self._leave(name)
        elif slot.where != target:
            try:
                self._mover.to_device(name, slot.moving(), target)
            except BaseException:
                self._mover.to_host(name, slot.moving())  # may have moved in part before memory ran out
                slot.where = CPU
                raise
            slot.where = target
            _LOG.debug("%s enters", name)

    def _leave(self, name: str) -> None:
        slot = self._slots[name]
        if slot.module is not None and slot.where != CPU:
            self._mover.to_host(name, slot.moving())
            slot.where = CPU
            _LOG.debug("%s leaves", name)

    def _loaded(self, name: str, where: torch.device) -> nn.Module:
        slot = self._slots[name]
        if slot.module is None:
            assert slot.load is not None
            slot.module, slot.where = slot.load(where), where
            if where != CPU:
                _LOG.debug("%s enters", name)
        return slot.module


class DeviceMover:
    """Moves networks, keeping a pinned copy in RAM of each that ever left, so that leaving again copies nothing.

    Weights changed in place on the device are therefore lost when the network leaves.
    """

    def __init__(self, transfer: Callable[[Tensor, torch.device], Tensor] | None = None) -> None:
        self._transfer = transfer or _to_device
        self._homes: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def to_device(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Move these tensors of a network; transfers from pinned memory do not block."""
        for tensor, home in self._home(name, tensors, pin=device.type == "cuda"):
            tensor.data = self._transfer(home, device)

    def to_host(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Back to the copy in RAM, which is made at the first time for a network that was loaded onto the device."""
        pin = any(tensor.is_cuda for tensor in tensors)
        for tensor, home in self._home(name, tensors, pin):
            tensor.data = home
        if pin:
            torch.cuda.empty_cache()  # large blocks of one network seldom fit the next one's tensors

    def _home(self, name: str, tensors: Sequence[Tensor], pin: bool) -> list[tuple[Tensor, Tensor]]:
        """Each tensor with its copy in RAM."""
        known = self._homes.get(name, [])
        if len(known) == len(tensors) and all(tensor is kept for tensor, (kept, _) in zip(tensors, known, strict=True)):
            return known
        self._homes[name] = list(_copies_in_ram(tensors, pin))
        return self._homes[name]


def _to_device(home: Tensor, device: torch.device) -> Tensor:
    return home.to(device, non_blocking=True)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Every tensor a module holds, once: parameters, all buffers, and tensors that are plain attributes."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        plain = [value for value in vars(part).values() if isinstance(value, Tensor)]
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False), *plain):
            found[id(tensor)] = tensor
    return list(found.values())


def _copies_in_ram(tensors: Sequence[Tensor], pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor with its home in RAM; one that is in RAM moves into its pinned home, so that it exists once."""
    arena = Arena(sum(map(aligned, tensors)), pin=True) if pin else None
    for tensor in tensors:
        home = arena.take(tensor) if arena is not None else tensor.data
        if home.device == CPU and home.data_ptr() != tensor.data_ptr():
            home.copy_(tensor.data)
            if not tensor.is_cuda:
                tensor.data = home
        elif home.device != CPU:
            home = home.cpu()
        yield tensor, home
