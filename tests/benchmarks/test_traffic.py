"""Each number of the table that is a promise; and that the counter counts."""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks import traffic
from kernels import launch
from kernels.launch import Launch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("S", "K"), [(1, 2), (1, 4), (2, 0), (4, 0)])
@pytest.mark.parametrize(("V", "on_chip"), [(32000, False), (16000, True)])
def test_single_launch_is_within_2_percent_of_its_floor(S, K, V, on_chip, monkeypatch):
    if on_chip:
        monkeypatch.setattr(launch, "ensemble_kl", lambda *_, **__: Launch(16384, warps=16))
    (case,) = (c for c in traffic.ensemble_cases(S, K, V, on_chip) if c.name.startswith("single forward"))
    assert case.floor == (2 * (S + K + S) if on_chip else 2 * (2 * (S + K) + S))
    row = traffic.measure(case)
    assert row.ratio <= 1.02
    assert row.stored == pytest.approx(2 * S, rel=0.02)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_deferred_form(divergence):
    (case,) = (c for c in traffic.ensemble_cases(1, 1, 32000, False) if c.name.startswith(f"deferred {divergence}"))
    assert traffic.measure(case).ratio <= 1.02


def test_elementwise_ops_read_and_write_once():
    rows = {(c.op, c.name): traffic.measure(c) for c in traffic.elementwise_cases(64) if c.by == "creche"}
    for direction in ("forward", "backward"):
        assert rows["swiglu", direction].ratio == 1
        assert rows["rotary", direction].ratio <= 1.07  # 4 bytes of angle for a pair in 16 heads
    weights = 2 * 768 * 2 / (2 * 768)  # read once for every 2 rows of 768
    assert rows["rms_norm", "forward"].bytes - 4 == pytest.approx(weights / 2, abs=0.01)
    assert rows["rms_norm_residual", "forward"].bytes - 8 == pytest.approx(weights / 2, abs=0.01)


def test_torch_operations_count_inputs_and_outputs():
    x = torch.ones(10, 4)
    with traffic.counted() as moved:
        y = x + x.T.T[:1]  # [1, 4] is read as such
        y.view(-1).add_(1.0)
        torch.ones(()).expand(1000).mul(1.0)
    assert moved.loaded == 4 * (40 + 4 + 40 + 1)
    assert moved.stored == 4 * (40 + 40 + 1 + 1000)  # torch.ones is one of the operations


def test_masked_lanes_do_not_count():
    @triton.jit
    def copy(source, target, N, BLOCK: tl.constexpr):
        column = tl.arange(0, BLOCK)
        tl.store(target + column, tl.load(source + column, mask=column < N), mask=column < 3)
        tl.store(target, tl.load(source))

    source, target = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16)
    constants: Any = {"BLOCK": 16}
    with traffic.counted() as moved:
        copy[(2,)](source, target, 5, **constants)
    assert moved.loaded == 2 * 2 * (5 + 1)
    assert moved.stored == 2 * 4 * (3 + 1)
