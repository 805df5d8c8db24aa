"""Compares `linear_ensemble_kl` in Triton with the reference in float64. On a CPU, matrix products are in fp32."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import Projected
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.linear_ensemble_kl import reference, triton
from tests.kernels.ops.triton.agreement import DEVICE, honest_memory_and_casts, rows
from tests.kernels.yardstick import assert_near, stored_gradients

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Swept = tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]


def make(streams: int, tokens: int, vocabulary: int, *dtypes: torch.dtype, bias=True) -> list[Projected]:
    """Makes streams of hidden sizes 5, 6, ..., hidden states in dtypes[2r] and heads in dtypes[2r + 1], cyclically."""
    generator = torch.Generator().manual_seed(0)

    def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    projected = []
    for r in range(streams):
        D, of_hidden, of_head = 5 + r, dtypes[2 * r % len(dtypes)], dtypes[(2 * r + 1) % len(dtypes)]
        head = tensor(of_head, vocabulary, D)
        projected.append(Projected(tensor(of_hidden, tokens, D), head, tensor(of_head, vocabulary) if bias else None))
    return projected


def run(
    backend,
    students: int,
    streams: Sequence[Projected],
    *,
    kl=True,
    normalizer: int | Tensor = 3,
    mask=False,
    needs=None,
    **options,
):
    """Ignores every third row. With `mask`, KL counts in other rows than CE."""
    N, V = len(streams[0][0]), len(streams[0][1])
    targets = torch.arange(N, device=DEVICE) * 5 % V
    ce_rows = torch.arange(N, device=DEVICE) % 3 != 1
    kl_rows = torch.arange(N, device=DEVICE) % 2 == 0 if mask else ce_rows
    generator = torch.Generator().manual_seed(1)
    ce_weight = torch.rand(students, generator=generator).to(DEVICE)
    kl_weight = torch.rand(students, len(streams), generator=generator).to(DEVICE)
    wide = any(x is not None and x.dtype == torch.float64 for stream in streams for x in stream)
    if wide:
        ce_weight, kl_weight = ce_weight.double(), kl_weight.double()
    spec = LossSpec(
        targets.masked_fill(~ce_rows, -100),
        ce_weight,
        kl_weight if kl else None,
        ce_rows,
        kl_rows,
        options.get("temperature", 1.0),
        options.get("divergence", "forward"),
    )
    needs = needs or [[x is not None for x in stream] for stream in streams[:students]]
    teachers = streams[students:] if kl else []
    return backend.losses_and_gradients(streams[:students], teachers, spec, normalizer, needs)


def flat(swept: Swept) -> list[Tensor]:
    losses, ce, kl, gradients = swept
    return [x for x in (losses, ce, kl, *(g for student in gradients for g in student)) if x is not None]


def wide(streams: Sequence[Projected]) -> list[Projected]:
    return [Projected(*(x if x is None else x.double() for x in s)) for s in streams]  # pyright: ignore[reportArgumentType]


def check(students: int, streams: Sequence[Projected], **options) -> list[Tensor]:
    with honest_memory_and_casts():
        ours = flat(run(triton, students, streams, **options))
    with stored_gradients(streams[:students]):
        plain = flat(run(reference, students, streams, **options))
    exact = flat(run(reference, students, wide(streams), **options))
    for k, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, FP32)
        assert_near(a, b, c, f"result {k}")
    return ours


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("students", "streams"), [(1, 1), (1, 3), (3, 3), (2, 3)])
def test_students_and_teachers(students, streams, divergence):
    """There are no biases, and the vocabulary is not a multiple of 64."""
    check(students, make(streams, rows(4), 70, FP32, bias=False), divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65])
def test_padding_takes_no_part(vocabulary):
    check(2, make(2, 3, vocabulary, FP32), mask=True)


@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (BF16, FP16, FP32, FP32), (FP32, BF16)])
def test_dtypes(dtypes):
    """A head whose hidden states have another dtype is converted to fp32."""
    check(2, make(3, 4, 70, *dtypes), mask=True, temperature=0.7)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunks_do_not_change_the_result(dtype, monkeypatch):
    """Sums over chunks are fp32, so the gradient of a bf16 head has no larger error than in one chunk."""
    streams = make(2, 10, 70, dtype)
    monkeypatch.setattr(triton, "MIN_CHUNK_ROWS", 1)
    whole = check(2, streams, mask=True)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 3 * 70 * 2 * (4 if dtype == FP32 else 6))
    seen = []
    launched = triton.loss_and_grad

    def record(logits, *rest, **options):
        seen.append(len(logits[0]))
        return launched(logits, *rest, **options)

    monkeypatch.setattr(triton, "loss_and_grad", record)
    parts = check(2, streams, mask=True)
    assert seen == [3, 3, 3, 1]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_cross_entropy_alone_looks_at_no_teacher():
    check(2, make(2, 4, 70, FP32), kl=False, temperature=2.0)


def test_only_what_is_needed_is_made():
    streams = make(2, 4, 70, FP32)
    *_, gradients = run(triton, 2, streams, needs=[[True, False, False], [False, False, False]])
    assert [[g is not None for g in student] for student in gradients] == [[True, False, False], [False] * 3]


def test_a_normalizer_on_the_device_and_fp16_below_its_range():
    """Divided by 1e8, the gradients of the logits would be 0 in fp16. The products scale them instead."""
    streams = make(2, 4, 70, FP16)
    losses, _, _, *gradients = check(2, streams, normalizer=1)
    for normalizer in (10**8, torch.tensor(10**8, device=DEVICE)):
        with honest_memory_and_casts():
            scaled_losses, _, _, *scaled = flat(run(triton, 2, streams, normalizer=normalizer))
        for a, b in zip((scaled_losses, *scaled), (losses, *gradients), strict=True):
            torch.testing.assert_close(1e8 * a, b, rtol=1e-5, atol=0)


def test_ignored_rows_may_hold_anything():
    streams = make(2, 4, 70, FP32)
    streams[0].hidden[1] = torch.nan
    streams[1].hidden[1] = torch.inf
    with honest_memory_and_casts():
        losses, ce, kl, gradients = run(triton, 2, streams)
    assert not ce[:, 1].any()
    assert kl is not None
    assert not kl[:, :, 1].any()
    assert all(x.isfinite().all() for x in flat((losses, ce, kl, gradients)))
    for hidden, _, _ in gradients:
        assert not hidden[1].any()


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_valid_tokens(tokens):
    streams = make(2, tokens, 70, FP32)
    rows = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
    targets = torch.full((tokens,), -100, device=DEVICE)
    ones = torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    with honest_memory_and_casts():
        spec = LossSpec(targets, *ones, rows, rows, 1.0, "forward")
        swept = triton.losses_and_gradients(streams, [], spec, 1, [[True, True, True]] * 2)
    assert not any(x.any() for x in flat(swept))


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"stream 1 holds torch.float64: .* choose kernels.backend\('reference'\)"):
        run(triton, 1, [*make(1, 2, 8, FP32), *wide(make(1, 2, 8, FP32))])


def public(*tensors: Tensor) -> Tensor:
    """Returns the sum of two students' losses, by the public function."""
    students = [Projected(hidden, weight, None) for hidden, weight in zip(tensors[::2], tensors[1::2], strict=True)]
    ones = torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    targets = torch.zeros(len(tensors[0]), dtype=torch.int64, device=DEVICE)
    losses = kernels.linear_ensemble_kl(
        students, (), targets, ce_weight=ones[0], kl_weight=ones[1], normalizer=2
    ).losses
    return losses[0] + losses[1]


def test_torch_compile_traces_it():
    """It calls the backend, because on a CPU the public function reads the targets to check them."""
    streams = make(2, 3, 24, FP32, bias=False)
    targets, ones = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    rows = targets == 0

    def losses_and_gradients(streams: list[Projected]) -> list[Tensor]:
        spec = LossSpec(targets, ones[0], ones, rows, rows, 1.0, "forward")
        return flat(triton.losses_and_gradients(streams, (), spec, 2, [[True, True, False]] * 2))

    compiled = torch.compile(losses_and_gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(streams), losses_and_gradients(streams))


def test_a_second_derivative_is_refused():
    inputs = [x.requires_grad_() for stream in make(2, 3, 24, FP32, bias=False) for x in stream if x is not None]
    with kernels.backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(public(*inputs), inputs, create_graph=True)


def test_nothing_waits_for_the_device():
    """Reading a number raises on fake tensors, which have none."""
    with FakeTensorMode(), kernels.backend("auto"):
        hidden, weight = (torch.empty(n, 8, device="cuda", dtype=BF16) for n in (4, 70))
        count = torch.empty((), device="cuda", dtype=torch.int64)
        rows = torch.empty(4, device="cuda", dtype=torch.bool)
        ones = torch.empty(2, device="cuda"), torch.empty(2, 2, device="cuda")
        targets = torch.empty(4, device="cuda", dtype=torch.int64)
        streams = [Projected(hidden, weight, None)] * 2
        result = kernels.linear_ensemble_kl(
            streams, (), targets, ce_weight=ones[0], kl_weight=ones[1], normalizer=count
        )
        spec = LossSpec(targets, *ones, rows, rows, 1.0, "jsd")
        _, _, kl, gradients = triton.losses_and_gradients(streams, (), spec, count, [[True, True, False]] * 2)
    assert [x.shape for x in (result.kl, kl) if x is not None] == [(2, 2, 4)] * 2
    assert [x.shape for x in gradients[1] if x is not None] == [(4, 8), (70, 8)]
