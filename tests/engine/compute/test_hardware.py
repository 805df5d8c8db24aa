from types import ModuleType, SimpleNamespace

import pytest
import torch

from engine.compute import hardware
from engine.compute.hardware import EnergyMeter, listed_peak, peak_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("AMD Instinct MI300X", 1307e12, 163.4e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("AMD Instinct MI250X", 191.5e12, 47.9e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),  # a part of it
        ("NVIDIA H100 PCIe MIG 1g.10gb", None, None),
        ("NVIDIA RTX A1000", None, None),  # no A100
        ("NVIDIA GeForce GTX 1060", None, None),
    ],
)
def test_peaks_by_name(name: str, bf16: float | None, fp32: float | None) -> None:
    assert (listed_peak(name, "bf16"), listed_peak(name, "fp32")) == (bf16, fp32)


def test_a_cpu_is_measured_once_and_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    peak = peak_flops(CPU, torch.float32)
    assert peak is not None
    assert 1e8 < peak < 1e14
    assert peak_flops(CPU, torch.float32) == peak
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_meter_no_energy() -> None:
    assert EnergyMeter(CPU).take() is None


def test_energy_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([5_000, 7_500, 7_750])  # millijoules
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings) if handle == b"GPU-me" else None,
    )
    monkeypatch.setattr(hardware, "pynvml", nvml)
    monkeypatch.setattr(hardware.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="me"))
    meter = EnergyMeter(GPU)
    assert [meter.take(), meter.take()] == [2.5, 0.25]
