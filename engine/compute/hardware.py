"""The most FLOP/s that a device can do, and the energy that it reports to have used."""

import functools
import re
import timeit
from contextlib import suppress

import pynvml
import torch

# FLOP/s of dense matrix products in bf16 (or fp16), with TF32, and in fp32, from the vendors' data sheets. The first
# pattern that a device's name matches counts. What a data sheet gives "with sparsity" is halved here.
PEAKS: list[tuple[str, dict[str, float]]] = [
    (r"\bA100\b", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    (r"\bH100 PCIe\b", {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    (r"\bH[12]00 NVL\b", {"bf16": 835e12, "tf32": 417.5e12, "fp32": 60e12}),
    (r"\b(GH200|H200|H100)\b", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),  # SXM
    (r"\bGB200\b", {"bf16": 2500e12, "tf32": 1250e12, "fp32": 80e12}),
    (r"\bB200\b", {"bf16": 2250e12, "tf32": 1100e12, "fp32": 75e12}),
    (r"\bL40S\b", {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12}),
    (r"\bL4\b", {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12}),
    (r"\bV100-SXM2\b", {"fp32": 15.7e12}),
    (r"\bMI300X\b", {"bf16": 1307e12, "fp32": 163.4e12}),
    (r"\bMI250X\b", {"bf16": 191.5e12, "fp32": 47.9e12}),  # one of its two dies: each is a device
]
# A CPU is measured by the product of two square matrices, about as large as a student's largest.
SIDE, REPETITIONS = 768, 4


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the most FLOP/s of matrix products in `dtype`, fp32 or bf16, on the device; None where it is unknown.

    A GPU's in fp32 depends on torch's settings (TF32). A CPU's is measured once a process, with the threads that torch
    has.
    """
    if device.type != "cuda":
        return _measured(dtype)
    arithmetic = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if dtype == torch.bfloat16:
        arithmetic = "bf16"
    return listed_peak(torch.cuda.get_device_name(device), arithmetic)


def listed_peak(name: str, arithmetic: str) -> float | None:
    """Returns FLOP/s by a device's name; None where `PEAKS` has no such device, or it is a slice of one (MIG)."""
    if "MIG" in name:
        return None
    return next((peaks.get(arithmetic) for pattern, peaks in PEAKS if re.search(pattern, name)), None)


@functools.cache
def _measured(dtype: torch.dtype) -> float:
    left, right = torch.ones(2, SIDE, SIDE, dtype=dtype)  # Random numbers would move the run's generator.
    out = torch.empty_like(left)
    seconds = timeit.repeat(lambda: torch.mm(left, right, out=out), repeat=REPETITIONS, number=1)
    return 2 * SIDE**3 / min(seconds)


class EnergyMeter:
    """Measures the energy that this rank's device uses. Only NVIDIA's devices report it."""

    def __init__(self, device: torch.device) -> None:
        self._handle: object | None = None
        if device.type == "cuda" and torch.version.hip is None:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                # CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's: the UUID is the same in both.
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        self._last = self._joules()

    def take(self) -> float | None:
        """Returns the joules since the meter was made or last read; None where the device reports none."""
        last, self._last = self._last, self._joules()
        return None if self._last is None or last is None else self._last - last

    def _joules(self) -> float | None:
        if self._handle is not None:
            with suppress(pynvml.NVMLError):  # Devices older than Volta do not report it.
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        return None
