"""Time is read off the device's own queue on a GPU, and a run is divided into stages without making it wait."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.cli.benchmarking.power import Sampler
from wan.cli.benchmarking.timer import Instant, OnDevice, timer
from wan.cli.benchmarking.trial import Clock


class FakeEvent:
    """Counts milliseconds with every record, and writes down who waited."""

    clock = 0.0
    waited: list[float]

    def __init__(self, waited: list[float]) -> None:
        self.waited = waited

    def record(self) -> None:
        FakeEvent.clock += 500
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        self.waited.append(self.at)

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


def test_clock_adds_up_stages_of_one_kind_and_networks_of_one_name() -> None:
    """Two segments of denoising are one column; both divisions sum to the whole."""
    times = iter(range(100))
    clock = Clock(torch.device("cpu"), lambda: Instant(float(next(times))))
    clock.start()
    clock.stage("encode with text_encoder")
    clock.stage("denoise", "1 steps with high")
    clock.stage("denoise", "1 steps with low")
    clock.stage("decode")
    trial = clock.stop(torch.zeros(1))
    assert trial.stages == {"text": 2.0, "denoise": 2.0, "decode": 1.0}
    assert trial.components == {
        "start": 1.0, "encode with text_encoder": 1.0, "denoise high": 1.0, "denoise low": 1.0, "decode": 1.0,
    }  # fmt: skip
    assert trial.seconds == 5.0 == sum(trial.components.values())


def test_device_marks_wait_for_nothing_until_they_are_read() -> None:
    waited: list[float] = []
    marks = [OnDevice(FakeEvent(waited)) for _ in range(3)]
    assert waited == []
    assert marks[0].until(marks[2]) == 1.0  # two of 500 ms
    assert waited == [marks[2].event.at]


def test_the_sampler_reads_the_card_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers: medians of power and clock in the units of the columns, the most memory in use."""
    asked: list[str] = []
    used, three = [2**30, 3 * 2**30, 2**30], threading.Event()

    def memory(handle: str) -> SimpleNamespace:
        if len(used) == 1:
            three.set()
        return SimpleNamespace(used=used.pop(0) if used else 0)

    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, NVMLError=NVMLError, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or name,
        nvmlDeviceGetPowerUsage=lambda handle: 350_000, nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetMemoryInfo=memory,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr("wan.cli.benchmarking.power.INTERVAL_S", 0.01)
    with Sampler(torch.device("cuda")) as sampler:
        assert three.wait(10)
    assert asked == ["GPU-1234"]
    assert sampler.readings() == {"power_w": 350.0, "clock_mhz": 1980.0, "temperature_c": 61.0, "nvml_gib": 3.0}


def test_without_a_card_the_reason_is_told() -> None:
    with Sampler(torch.device("cpu")) as sampler:
        pass
    assert sampler.readings() == {} and "CUDA" in sampler.missing


@pytest.mark.gpu
def test_events_agree_with_the_host_clock_on_a_card() -> None:
    """A second of matrix products, by the card's events and by a host that waits."""
    device = torch.device("cuda")
    matrix: Any = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    now, host = timer(device), time.perf_counter()
    begin = now()
    for _ in range(200):
        matrix = torch.mm(matrix, matrix).clamp_(-1, 1)
    seconds = begin.until(now())
    torch.cuda.synchronize()
    assert seconds == pytest.approx(time.perf_counter() - host, rel=0.05)
