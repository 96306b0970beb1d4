"""Power, clock, temperature and used memory of a card while it works, read from the driver twice a second.

A number for speed means little without them: a card that is hot or capped runs at a lower clock.
"""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass, field
from typing import Any, Self

import torch

INTERVAL_S = 0.5
FIELDS = ("power_w", "clock_mhz", "temperature_c", "nvml_gib")


@dataclass
class Sampler:
    """A context: samples are taken while it is open. `missing` says why there are none."""

    device: torch.device
    missing: str = ""
    _samples: list[tuple[float, float, float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._samples.clear()
        self._stop.clear()
        handle = self._open()
        if handle is not None:
            self._thread = threading.Thread(target=self._watch, args=handle, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def readings(self) -> dict[str, float]:
        """Median power, clock and temperature, and the most memory in use on the whole card; {} without samples."""
        if not self._samples:
            return {}
        power, clock, temperature, used = zip(*self._samples, strict=True)
        medians = (statistics.median(power), statistics.median(clock), statistics.median(temperature))
        return dict(zip(FIELDS, (*medians, max(used)), strict=True))

    def _open(self) -> tuple[Any, Any] | None:
        if self.device.type != "cuda":
            self.missing = "there is no CUDA device"
            return None
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return None
        try:
            pynvml.nvmlInit()
            # By name, as CUDA_VISIBLE_DEVICES changes the order that torch counts in.
            name = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._samples.append(_sample(pynvml, handle))
        except pynvml.NVMLError as error:
            self.missing = f"the driver does not tell ({error})"
            return None
        return pynvml, handle

    def _watch(self, nvml: Any, handle: Any) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self._samples.append(_sample(nvml, handle))
            except nvml.NVMLError as error:
                self.missing = f"the driver stopped telling ({error})"
                return


def _sample(nvml: Any, handle: Any) -> tuple[float, float, float, float]:
    return (
        nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
    )
