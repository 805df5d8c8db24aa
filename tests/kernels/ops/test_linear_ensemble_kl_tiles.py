"""Compares `linear_ensemble_kl` of bf16 streams, on a processor with matrix tiles, with float64.

The error is at most three times that of the reference's fp32 products, with the gradients of logits rounded to bf16.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import kernels.native
from kernels import Projected
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.linear_ensemble_kl import native, reference
from tests.kernels.yardstick import assert_near, stored_gradients

if kernels.native.problem() is not None or not torch.ops.creche_native.has_tiles():
    pytest.skip(
        "this processor has no matrix tiles (AMX), or the native kernels are not built", allow_module_level=True
    )

BF16, FP32 = torch.bfloat16, torch.float32


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stream(tokens: int, vocabulary: int, width: int, *dtypes: torch.dtype, bias: bool = True) -> Projected:
    of_hidden, of_head = dtypes or (BF16, BF16)
    head = draw(vocabulary, width, seed=width, dtype=of_head)
    return Projected(draw(tokens, width, dtype=of_hidden), head, draw(vocabulary, dtype=of_head) if bias else None)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 1, 1), (3, 5, 7), (65, 33, 129), (256, 512, 128), (300, 1030, 300), (2, 2049, 64)]
)
def test_products(M: int, K: int, N: int, across: bool, add: bool) -> None:
    """The right matrix has adjacent columns or adjacent rows, and the left one has rows with gaps between them."""
    left = draw(M, K + 3)[:, :K]
    right = draw(N, K, seed=1).T if across else draw(K, N, seed=1)
    out = torch.ones(M, N) if add else torch.full((M, N), torch.nan)
    native._mm_(left, torch.ops.creche_native.tiled(right), out, add=add)
    assert_near(out, left.float() @ right.float() + add, left.double() @ right.double() + add)


def losses_and_gradients(
    backend, students: int, streams: Sequence[Projected], divergence: str = "forward", needs=None
) -> list[Tensor]:
    """Ignores every third row in the cross-entropy, and every second in the divergences."""
    tokens, vocabulary = streams[0][0].shape[0], streams[0][1].shape[0]
    wide = any(x is not None and x.dtype == torch.float64 for s in streams for x in s)
    dtype = torch.float64 if wide else FP32
    ce_rows, kl_rows = torch.arange(tokens) % 3 != 1, torch.arange(tokens) % 2 == 0
    targets = (torch.arange(tokens) * 5 % vocabulary).masked_fill(~ce_rows, -100)
    weights = draw(students, len(streams) + 1, seed=3, dtype=dtype).abs()
    needs = needs or [[x is not None for x in s] for s in streams[:students]]
    spec = LossSpec(targets, weights[:, 0], weights[:, 1:], ce_rows, kl_rows, 2.0, divergence)
    losses, ce, kl, gradients = backend.losses_and_gradients(streams[:students], streams[students:], spec, 3, needs)
    return [losses, ce, kl, *(g for flat in gradients for g in flat if g is not None)]


def exact(students: int, streams: Sequence[Projected], *rest) -> list[Tensor]:
    wide = [Projected(*(x if x is None else x.double() for x in s)) for s in streams]  # pyright: ignore[reportArgumentType]
    return losses_and_gradients(reference, students, wide, *rest)


def assert_as_exact(students: int, streams: Sequence[Projected], *rest) -> None:
    ours = losses_and_gradients(native, students, streams, *rest)
    with stored_gradients(streams[:students]):
        plain = losses_and_gradients(reference, students, streams, *rest)
    for a, b, c in zip(ours, plain, exact(students, streams, *rest), strict=True):
        assert (a.shape, a.dtype) == (b.shape, FP32)
        assert_near(a, b, c)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("chunk", [7, 100])
def test_students_and_teachers(chunk: int, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the streams is in fp32, and one has an odd width."""
    monkeypatch.setattr(native, "BUDGET", chunk * 4 * 200 * 4)
    streams = [stream(40, 200, 16), stream(40, 200, 24, bias=False), stream(40, 200, 8, FP32, FP32), stream(40, 200, 9)]
    assert [native._uses_tiles(s, FP32) for s in streams] == [True, True, False, True]
    assert_as_exact(2, streams, divergence)
    assert_as_exact(4, [streams[2], streams[0], streams[3], streams[1]], divergence)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_gradients_take_the_place_of_logits_already_read(divergence: str) -> None:
    """The rows have several blocks."""
    assert_as_exact(2, [stream(6, 2500, 16), stream(6, 2500, 24), stream(6, 2500, 8)], divergence)


def test_ignored_rows_may_hold_anything() -> None:
    streams = [stream(12, 200, 16), stream(12, 200, 24)]
    clean = losses_and_gradients(native, 2, streams)
    for s in streams:
        s.hidden[[1, 7]] = torch.nan  # These rows count in neither loss.
    for a, b in zip(losses_and_gradients(native, 2, streams), clean, strict=True):
        torch.testing.assert_close(a, b, equal_nan=False)


def test_any_strides_and_float64_beside() -> None:
    dense = stream(12, 200, 16)
    scattered = Projected(dense.hidden.T.contiguous().T, dense.weight.T.contiguous().T, dense.bias)
    for a, b in zip(*(losses_and_gradients(native, 1, [s]) for s in (dense, scattered)), strict=True):
        assert torch.equal(a, b)
    wide = stream(12, 200, 24, torch.float64, torch.float64)
    for a, b in zip(*(losses_and_gradients(backend, 2, [dense, wide]) for backend in (native, reference)), strict=True):
        torch.testing.assert_close(a, b)


def test_no_rows_and_what_is_not_needed() -> None:
    assert not any(x.any() for x in losses_and_gradients(native, 1, [stream(0, 200, 16)])[3:])
    results = losses_and_gradients(native, 1, [stream(12, 200, 16)], "forward", [[False, True, False]])
    assert [x.shape for x in results[3:]] == [(200, 16)]


def test_bitwise_the_same_again_and_with_any_number_of_threads() -> None:
    streams, threads = [stream(300, 600, 16), stream(300, 600, 24)], torch.get_num_threads()
    first = losses_and_gradients(native, 2, streams)
    try:
        for count in (threads, 1, 2):
            torch.set_num_threads(count)
            again = losses_and_gradients(native, 2, streams)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
