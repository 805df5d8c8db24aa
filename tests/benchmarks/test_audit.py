"""What must hold of every kernel on aligned shapes, for a sample of them; and that the audit would see if it did not.

The whole grid: python benchmarks/audit.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks import audit
from benchmarks.audit import CHIPS, Case, Row, meta
from kernels import launch
from kernels.launch import Launch
from kernels.ops.rms_norm import triton as rms_norm
from kernels.ops.swiglu import triton as swiglu

ELEMENTWISE = [case for case in audit.elementwise_cases() if case.by == "creche"]
ENSEMBLE = {f"{case.op} {case.name}": case for case in audit.ensemble_cases() if case.by == "creche"}
SAMPLE = [
    ("ensemble_kl single forward S=1 K=1 V=32000 bf16", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]),
    ("ensemble_kl single forward S=1 K=4 V=16000 bf16", ["cuda:100"]),
    ("ensemble_kl single forward S=4 K=0 V=16000 bf16", ["cuda:90", "cuda:100"]),
    ("ensemble_kl single forward S=2 K=2 V=32000 bf16", ["cuda:90"]),
    ("ensemble_kl losses forward S=4 K=0 V=32000 bf16", ["cuda:80"]),
    ("ensemble_kl gradients forward S=4 K=0 V=32000 bf16", ["cuda:80"]),
    ("ensemble_kl single reverse S=1 K=2 V=32000 bf16", ["cuda:90"]),
    ("ensemble_kl single jsd S=2 K=0 V=32000 bf16", ["cuda:90"]),
    ("linear_ensemble_kl single forward S=1 K=2 V=50257 fp32", ["cuda:90"]),
]


def assert_sound(row: Row) -> None:
    assert (row.spills, row.stack) == (0, 0), row
    assert row.load_bits >= 128, row


@pytest.mark.parametrize("case", ELEMENTWISE, ids=lambda case: f"{case.op} {case.name}")
@pytest.mark.parametrize("key", CHIPS)
def test_elementwise_kernels(case, key):
    row = audit.audit(case, key)
    assert_sound(row)
    assert row.store_bits >= 128
    assert row.limit == "bandwidth"


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SAMPLE for key in keys])
def test_ensemble_kernels(name, key):
    assert_sound(audit.audit(ENSEMBLE[name], key))


@pytest.mark.parametrize(("S", "K"), [(1, 1), (1, 2), (2, 0)])
def test_rows_of_16000_kept_on_chip(S, K, monkeypatch):
    """As `launch` would not: it is sound, but slower on an H100."""
    monkeypatch.setattr(launch, "ensemble_kl", lambda *_, **__: Launch(16384, warps=16))
    assert_sound(audit.audit(ENSEMBLE[f"ensemble_kl single forward S={S} K={K} V=16000 bf16"], "cuda:90"))


def test_every_launch_asked_for_is_in_the_grid():
    pairs = ((1, 1), (1, 2), (1, 4), (2, 0), (3, 0), (4, 0), (2, 2), (8, 0))
    for S, K in pairs:
        once = ("single",) if S <= 4 else ()  # more students take two launches
        for V in (16000, 32000):
            for form in ("losses", "gradients", *once):
                assert f"ensemble_kl {form} forward S={S} K={K} V={V} bf16" in ENSEMBLE
        for V in (16000, 32000, 50257):
            for form in once or ("losses", "gradients"):
                assert f"linear_ensemble_kl {form} forward S={S} K={K} V={V} fp32" in ENSEMBLE


def rms_norm_case(x: torch.Tensor) -> Case:
    weight = meta(x.shape[1])
    return Case("rms_norm", "forward", "creche", x.numel(), lambda _: rms_norm.run_forward(x, weight, 1e-6, None))


@pytest.mark.parametrize("key", ["cuda:90", "hip:gfx942"])
def test_rows_off_16_bytes_are_seen(key):
    row = audit.audit(rms_norm_case(meta(64, 769)[:, :768]), key)
    assert row.load_bits < 128
    assert row.store_bits >= 128


@pytest.mark.parametrize(("key", "columns"), [("cuda:90", 4096), ("hip:gfx942", 8192)])
def test_spills_are_seen(key, columns, monkeypatch):
    monkeypatch.setattr(launch, "rows", lambda columns: Launch(columns, warps=1))
    x, weight = meta(64, columns), meta(columns)
    case = Case("rms_norm", "", "creche", x.numel(), lambda _: rms_norm.run_backward(x, x, weight, 1e-6, x, True))
    row = audit.audit(case, key)
    assert row.spills > 0
    assert row.stack > 0


def test_bytes_exponentials_and_occupancy_of_a_kernel_known_by_heart():
    gate = meta(4096, 2048)
    row = audit.audit(
        Case("swiglu", "", "creche", gate.numel(), lambda _: swiglu.run_backward(gate, gate, gate)), "cuda:90"
    )
    assert (row.bytes, row.exponentials, row.warps) == (10, 1, 4)
    assert row.milliseconds == pytest.approx(10 * gate.numel() / 0.9 / 3.35e12 * 1e3, rel=1e-3)
    # registers are handed out by 8 a thread: 65536 / (128 · 48) = 10.7 programs of 128 threads, of 2048
    assert row.registers in range(41, 49)
    assert row.occupancy == pytest.approx(10 * 128 / 2048, abs=0.01)


def test_one_program_for_each_processor_waits_for_memory():
    """As Liger's backward of `rms_norm` does: few bytes are under way."""
    x, weight = meta(8192, 768), meta(768)

    def few(_: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "RMS_NORM_PARTIALS", 100)
            rms_norm.run_backward(x, x, weight, 1e-6, None, True)

    assert audit.audit(Case("rms_norm", "", "creche", x.numel(), few), "cuda:90").limit == "latency"


def test_the_command_adds_to_a_table(tmp_path, capsys):
    table = tmp_path / "a.csv"
    for targets in (["cuda:90"], ["cuda:90", "hip:gfx942"]):  # the second time, one row is there already
        audit.main(["--only", "^swiglu forward creche", "--targets", *targets, "--csv", str(table)])
        assert capsys.readouterr().out.count("swiglu") == 1
    rows = table.read_text().splitlines()
    assert [row.split(",")[:4] for row in rows[1:]] == [
        ["swiglu", "forward", "creche", key] for key in ("cuda:90", "hip:gfx942")
    ]
