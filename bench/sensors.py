"""Clocks, power and temperature of a GPU while it works, read from the driver's own library (NVML) by ctypes; the clock
of a processor.

A figure without its clock cannot be compared with another: a GPU that is warm or shares its power budget runs slower.
"""

import ctypes
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: NVML's names for what is read: clock domains and the sensor.
_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0

Reading = dict[str, float]


class Sensors:
    """The sensors of one GPU; readings are empty where the library or the device does not answer.

    Args:
        device: a CUDA device.
        library: file of NVML.
    """

    def __init__(self, device: torch.device, library: str = "libnvidia-ml.so.1") -> None:
        self._handle = ctypes.c_void_p()
        self._nvml: ctypes.CDLL | None = None
        try:
            nvml = ctypes.CDLL(library)
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        except (OSError, AttributeError):  # no driver, or a torch that does not tell
            return
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle)) == 0:
            self._nvml = nvml

    def read(self) -> Reading:
        """``sm_mhz``, ``memory_mhz``, ``watts``, ``celsius``, as far as the device tells them."""
        if self._nvml is None:
            return {}
        questions = {
            "sm_mhz": (self._nvml.nvmlDeviceGetClockInfo, (_SM_CLOCK,), 1.0),
            "memory_mhz": (self._nvml.nvmlDeviceGetClockInfo, (_MEMORY_CLOCK,), 1.0),
            "watts": (self._nvml.nvmlDeviceGetPowerUsage, (), 1e-3),
            "celsius": (self._nvml.nvmlDeviceGetTemperature, (_GPU_TEMPERATURE,), 1.0),
        }
        found = {}
        for name, (ask, arguments, unit) in questions.items():
            value = ctypes.c_uint()
            if ask(self._handle, *arguments, ctypes.byref(value)) == 0:
                found[name] = value.value * unit
        return found


def processor_clock(file: Path = Path("/proc/cpuinfo")) -> Reading:
    """``cpu_mhz`` of the fastest core now, as Linux tells it; empty where it does not."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return {"cpu_mhz": max(clocks)} if clocks else {}


def typical(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """The median of every sensor; None where nothing was read."""
    names = sorted({name for reading in readings for name in reading})
    return {name: statistics.median(x[name] for x in readings if name in x) for name in names} or None
