"""Networks are where the policies say, and move in exactly the order that keeps memory low. No GPU needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from wan.engine.placement import DeviceMover, Placement, Policy, tensors_of

GPU = torch.device("cuda")  # only a name here: nothing touches it, the mover records
CPU = torch.device("cpu")
GPU_STAND_IN = CPU
NAMES = ("text_encoder", "high", "low", "vae")
RUN = ("text_encoder", "text_encoder", "high", "low", "vae")
"""What one text-to-video run uses, in order: two prompts, two experts, the decoder."""


@dataclass
class Recorder:
    """A mover that only writes down; loading and computing are written to the same list."""

    events: list[str] = field(default_factory=list)
    fail: str = ""

    def to_device(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.events.append(f"{name} enters")
        if name == self.fail:
            self.fail = ""
            raise torch.OutOfMemoryError("out of memory")

    def to_host(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.events.append(f"{name} leaves")


class Stage:
    """A placement of four stand-in networks and what happened to them."""

    def __init__(self, device: torch.device = GPU, **policies: Policy) -> None:
        self.recorder = Recorder()
        self.placement = Placement(device, self.recorder)
        for name in NAMES:
            self.placement.add(name, self.loader(name), policies.get(name, Policy.RESIDENT))

    @property
    def events(self) -> list[str]:
        return self.recorder.events

    def loader(self, name: str) -> Callable[[torch.device], nn.Module]:
        def load(device: torch.device) -> nn.Module:
            self.events.append(f"{name} loads on {device.type}")
            return nn.Linear(2, 2)

        return load

    def run(self, names: tuple[str, ...] = RUN) -> list[str]:
        """The events of one run, computing included."""
        self.events.clear()
        for name in names:
            with self.placement.use(name):
                self.events.append(f"{name} computes on {self.placement.device_of(name).type}")
        return list(self.events)


def policies(offload: bool, t5_cpu: bool, vae_cpu: bool) -> dict[str, Policy]:
    """What the three options ask for; the options themselves are tested in test_optimizations.py."""
    experts = Policy.AFTER_USE if offload else Policy.RESIDENT
    return {
        "text_encoder": Policy.ON_CPU if t5_cpu else experts,
        "high": experts,
        "low": experts,
        "vae": Policy.AFTER_USE if vae_cpu else Policy.RESIDENT,
    }


def computes(name: str, device: str = "cuda") -> str:
    return f"{name} computes on {device}"


def resident(name: str, times: int = 1) -> list[str]:
    return [f"{name} loads on cuda"] + [computes(name)] * times


def after_use(name: str, times: int = 1) -> list[str]:
    return [f"{name} loads on cpu"] + [f"{name} enters", computes(name), f"{name} leaves"] * times


T5 = {
    "resident": resident("text_encoder", 2),
    "after use": after_use("text_encoder", 2),
    "cpu": ["text_encoder loads on cpu", computes("text_encoder", "cpu"), computes("text_encoder", "cpu")],
}
EXPERTS = {False: resident("high") + resident("low"), True: after_use("high") + after_use("low")}
VAE = {False: resident("vae"), True: after_use("vae")}


@pytest.mark.parametrize("vae_cpu", [False, True])
@pytest.mark.parametrize("t5_cpu", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_every_row_of_the_memory_ladder_moves_in_exact_order(offload: bool, t5_cpu: bool, vae_cpu: bool) -> None:
    stage = Stage(**policies(offload, t5_cpu, vae_cpu))
    encoder = T5["cpu"] if t5_cpu else T5["after use" if offload else "resident"]
    first = encoder + EXPERTS[offload] + VAE[vae_cpu]
    assert stage.run() == first
    assert stage.run() == [event for event in first if "loads" not in event]


def test_nothing_moves_when_every_option_is_off() -> None:
    stage = Stage()
    events = stage.run() + stage.run()
    assert not [event for event in events if "enters" in event or "leaves" in event]


def test_nothing_moves_on_a_cpu_whatever_the_policies() -> None:
    stage = Stage(CPU, **policies(True, False, True))
    assert not [event for event in stage.run() if "enters" in event or "leaves" in event]


def test_only_one_network_is_on_the_gpu_when_everything_is_placed_after_use() -> None:
    stage = Stage(**dict.fromkeys(NAMES, Policy.AFTER_USE))
    there: set[str] = set()
    for event in stage.run() + stage.run():
        name, what = event.split()[:2]
        if what == "enters":
            there.add(name)
        elif what == "leaves":
            there.remove(name)
        assert len(there) <= 1
    assert not there


def test_offloading_one_call_makes_residents_leave_before_another_enters() -> None:
    """generate(offload_model=True) after a call without: all that stayed has to go, the VAE does not."""
    stage = Stage()
    stage.run()
    for name in ("text_encoder", "high", "low"):
        stage.placement.set_policy(name, Policy.AFTER_USE)
    assert stage.run(("text_encoder", "high", "low", "vae")) == [
        "high leaves", "low leaves", computes("text_encoder"), "text_encoder leaves",
        "high enters", computes("high"), "high leaves",
        "low enters", computes("low"), "low leaves",
        computes("vae"),
    ]  # fmt: skip


def test_a_call_without_offloading_lets_networks_stay_again() -> None:
    stage = Stage(**dict.fromkeys(NAMES, Policy.AFTER_USE))
    stage.run()
    for name in NAMES:
        stage.placement.set_policy(name, Policy.RESIDENT)
    assert [event for event in stage.run() if "computes" not in event] == [f"{name} enters" for name in NAMES]
    assert [event for event in stage.run() if "computes" not in event] == []


def test_a_resident_sent_to_the_cpu_leaves_before_it_computes_there() -> None:
    stage = Stage()
    stage.run()
    stage.placement.set_policy("text_encoder", Policy.ON_CPU)
    assert stage.run(("text_encoder",)) == ["text_encoder leaves", computes("text_encoder", "cpu")]


def test_entering_again_inside_a_use_changes_nothing() -> None:
    stage = Stage(high=Policy.AFTER_USE)
    with stage.placement.use("high") as outer:
        with stage.placement.use("high") as inner:
            assert inner is outer
        with stage.placement.use("high", device="cpu"):
            pass
    assert stage.events == ["high loads on cpu", "high enters", "high leaves"]


def test_a_network_in_use_stays_when_another_enters() -> None:
    stage = Stage(**dict.fromkeys(NAMES, Policy.AFTER_USE))
    with stage.placement.use("high"), stage.placement.use("vae"):
        assert "high leaves" not in stage.events
    assert stage.events[-2:] == ["vae leaves", "high leaves"]


def test_an_exception_while_computing_leaves_everything_usable() -> None:
    stage = Stage(high=Policy.AFTER_USE)
    with pytest.raises(KeyError), stage.placement.use("high"):
        raise KeyError("broken")
    assert stage.events[-1] == "high leaves"
    assert stage.run(("high",)) == ["high enters", computes("high"), "high leaves"]


def test_running_out_of_memory_while_moving_leaves_everything_usable() -> None:
    stage = Stage(high=Policy.AFTER_USE)
    stage.recorder.fail = "high"
    with pytest.raises(torch.OutOfMemoryError), stage.placement.use("high"):
        pytest.fail("must not be entered")
    assert stage.events[-2:] == ["high enters", "high leaves"]
    assert stage.run(("high",)) == ["high enters", computes("high"), "high leaves"]


def test_a_failed_load_is_tried_again() -> None:
    attempts: Iterator[nn.Module | Exception] = iter([OSError("disk"), nn.Linear(1, 1)])

    def load(device: torch.device) -> nn.Module:
        result = next(attempts)
        if isinstance(result, Exception):
            raise result
        return result

    placement = Placement(CPU)
    placement.add("vae", load, Policy.RESIDENT)
    with pytest.raises(OSError, match="disk"):
        placement.get("vae")
    assert placement.loaded() == {}
    assert isinstance(placement.get("vae"), nn.Linear)


def test_plan_b_computes_on_the_cpu_once() -> None:
    """A decode that ran out of GPU memory is repeated on the CPU; the next one is on the GPU again."""
    stage = Stage()
    stage.run(("vae",))
    stage.events.clear()
    with stage.placement.use("vae", device="cpu"):
        assert stage.events == ["vae leaves"]
    assert stage.run(("vae",)) == ["vae enters", computes("vae")]


def test_networks_load_when_first_needed_or_early() -> None:
    stage = Stage()
    assert stage.events == []
    stage.placement.get("vae")
    stage.placement.get("vae")
    assert stage.events == ["vae loads on cuda"]
    stage.placement.add("clip", stage.loader("clip"), Policy.AFTER_USE, early=True)
    assert stage.events[-1] == "clip loads on cpu"
    assert set(stage.placement.loaded()) == {"vae", "clip"}


def test_a_users_network_takes_the_place_of_ours() -> None:
    stage = Stage(vae=Policy.AFTER_USE)
    stage.run(("vae",))
    mine = nn.Linear(3, 3)
    stage.placement.set("vae", mine)
    with stage.placement.use("vae") as used:
        assert used is mine
    assert stage.events[-2:] == ["vae enters", "vae leaves"]


class Net(nn.Module):
    """A network with every kind of tensor: tied parameters, two kinds of buffer, a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)
        self.std = torch.rand(3)
        self.strided = nn.Parameter(torch.randn(4, 6).t())


def test_every_kind_of_tensor_is_found_once() -> None:
    net = Net()
    wanted = [net.first.weight, net.first.bias, net.mean, net.scratch, net.std, net.strided]
    assert {id(tensor) for tensor in tensors_of(net)} == {id(tensor) for tensor in wanted}
    assert len(tensors_of(net)) == len(wanted)


def test_mover_moves_buffers_and_plain_tensors_and_brings_back_the_same_memory() -> None:
    """Other memory stands in for a GPU's: a round trip must end in the very memory it began in."""
    net, mover = Net(), DeviceMover(lambda home, device: home.clone())
    before = [tensor.clone() for tensor in tensors_of(net)]
    weight = net.first.weight
    places = [tensor.data_ptr() for tensor in tensors_of(net)]
    for _ in range(2):
        mover.to_device("net", tensors_of(net), GPU_STAND_IN)
        assert not {tensor.data_ptr() for tensor in tensors_of(net)} & set(places)
        assert net.first.weight is weight is net.tied.weight
        mover.to_host("net", tensors_of(net))
        assert [tensor.data_ptr() for tensor in tensors_of(net)] == places
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(net), strict=True))


def test_mover_forgets_the_copy_of_a_replaced_network() -> None:
    mover = DeviceMover(lambda home, device: home.clone())
    mover.to_device("net", tensors_of(Net()), GPU_STAND_IN)
    other = Net()
    expected = other.first.weight.clone()
    mover.to_device("net", tensors_of(other), GPU_STAND_IN)
    mover.to_host("net", tensors_of(other))
    assert torch.equal(other.first.weight, expected)


@pytest.mark.gpu
def test_on_a_gpu_leaving_is_free_and_transfers_come_from_pinned_memory() -> None:
    device = torch.device("cuda")
    placement = Placement(device)
    placement.add("net", lambda where: Net().to(where), Policy.AFTER_USE)
    with placement.use("net") as net:
        first = [tensor.cpu().clone() for tensor in tensors_of(net)]
        assert {tensor.device.type for tensor in tensors_of(net)} == {"cuda"}
    assert all(tensor.is_pinned() for tensor in tensors_of(net))
    places = [tensor.data_ptr() for tensor in tensors_of(net)]
    with placement.use("net"):
        pass
    assert [tensor.data_ptr() for tensor in tensors_of(net)] == places
    assert all(torch.equal(a, b) for a, b in zip(first, tensors_of(net), strict=True))
    placement.set_policy("net", Policy.RESIDENT)
    with placement.use("net"):
        pass
    assert net.std.is_cuda
