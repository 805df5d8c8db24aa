"""Compares `linear_ensemble_kl` in Triton, with teachers known by their top k, with the reference in float64."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import Projected, TopK
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.linear_ensemble_kl import reference, triton
from tests.kernels.ops.triton.agreement import DEVICE, honest_memory_and_casts
from tests.kernels.ops.triton.test_linear_ensemble_kl import check, flat, make, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIVERGENCES = ["forward", "reverse", "jsd"]
TOKENS = 36  # Errors here are two or three roundings. With fewer tokens, one side may be lucky.


def top_of(logits_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Computes the top k in float64 and keeps it in fp32 with 32-bit tokens, as a cache does."""
    log_prob_Nk, index_Nk = (logits_NV.double() / temperature).log_softmax(-1).topk(k)
    tail_N = (logits_NV.double() / temperature).softmax(-1).scatter(1, index_Nk, 0).sum(-1)
    return TopK(log_prob_Nk.float(), index_Nk.int(), tail_N.float())


def teacher(seed: int, k: int, tokens: int = 4, vocabulary: int = 70, temperature: float = 1.0) -> TopK:
    logits_NV = 2 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))
    return top_of(logits_NV.to(DEVICE), k, temperature)


def given(
    backend: ModuleType, logits_NV: Tensor, top: TopK, *, weight: float = 1.0, divergence: str = "forward"
) -> tuple[Tensor, Tensor]:
    """Returns kl [N] of a student with these logits, and their gradient."""
    (N, V), dtype = logits_NV.shape, logits_NV.dtype
    rows, ones_12 = torch.ones(N, dtype=torch.bool, device=DEVICE), torch.ones(1, 2, device=DEVICE, dtype=dtype)
    with honest_memory_and_casts():
        _, _, kl, ((gradient, *_),) = backend.losses_and_gradients(
            [Projected(logits_NV, torch.eye(V, dtype=dtype, device=DEVICE))],
            [top],
            LossSpec(rows.long(), ones_12[0, :1] * 0, ones_12 * weight, rows, rows, 1.0, divergence),
            1,
            [[True, False, False]],
        )
    assert kl is not None
    assert gradient is not None
    return kl[0, 1], gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("students", "order"), [(1, "k"), (2, "kdk")])
def test_beside_peers_and_teachers(students: int, order: str, dtype: torch.dtype, divergence: str) -> None:
    """KL also counts in rows without a target, and dense teachers stand between those known by their top k."""
    streams = make(students + order.count("d"), TOKENS, 70, dtype)
    dense = iter(streams[students:])
    teachers = [
        next(dense) if kind == "d" else teacher(i, 4 + i, TOKENS, temperature=2.0) for i, kind in enumerate(order)
    ]
    check(students, [*streams[:students], *teachers], mask=True, temperature=2.0, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("vocabulary", "k"), [(70, 1), (70, 69), (70, 70), (64, 7), (1, 1)])
def test_few_and_all_tokens_kept(vocabulary: int, k: int, divergence: str) -> None:
    """The k + 1 buckets fill a tile or do not, and the tail may have no token."""
    check(1, [*make(1, 10, vocabulary, FP32), teacher(1, k, 10, vocabulary)], divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_several_blocks_and_chunks(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 2 * 1500 * (4 + 2))
    streams = [*make(1, 3, 1500, BF16), teacher(1, 20, 3, 1500, temperature=0.7)]
    check(1, streams, temperature=0.7, divergence=divergence)


@pytest.mark.parametrize("dtypes", [(FP32, torch.int64), (FP32, torch.uint8), (FP16, torch.int16)])
def test_a_teachers_dtypes_and_strides(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    log_prob, index, tail = teacher(1, 5)
    top = TopK(log_prob.T.contiguous().T.to(dtypes[0]), index.to(dtypes[1]), tail.to(dtypes[0]))
    check(1, [*make(1, 4, 70, FP32), top])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_equality(divergence: str) -> None:
    """A divergence of 1e-7 is right to 1 in 100, where every sum of first order would err by more than its value."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(4, 300, generator=generator)).to(DEVICE)
    near = logits_NV + (5e-4 * torch.randn(4, 300, generator=generator)).to(DEVICE)
    top = top_of(near, 30)
    kl, gradient = given(triton, logits_NV, top, divergence=divergence)
    exact, exact_gradient = given(
        reference,
        logits_NV.double(),
        TopK(*(x.double() if x.is_floating_point() else x for x in top)),
        divergence=divergence,
    )
    itself, _ = given(triton, logits_NV, top_of(logits_NV, 30), divergence=divergence)
    assert (itself >= 0).all()
    assert (itself < 1e-11).all()
    assert 1e-9 < exact.min() < exact.max() < 1e-6
    torch.testing.assert_close(kl.double(), exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-2 * exact_gradient.abs().max().item())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_logit_of_minus_infinity(divergence: str) -> None:
    """A token of the top k, one of the tail, or the whole tail has −inf. Infinite results match the reference's."""
    (student,) = make(1, 3, 9, FP32)
    assert student.bias is not None
    for gone in ([0], [8], [3, 4, 5, 6, 7, 8]):
        student.bias[:] = 0
        student.bias[gone] = -torch.inf
        tokens = torch.arange(3, dtype=torch.int32, device=DEVICE).expand(3, 3)
        top = TopK(torch.tensor([0.5, 0.2, 0.2], device=DEVICE).log().expand(3, 3), tokens, tokens[:, 0] + 0.1)
        needs = [[False, False, True]]
        ours, plain = (flat(run(b, 1, [student, top], divergence=divergence, needs=needs)) for b in (triton, reference))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)
        assert ours[2].isinf().any() == (divergence == "forward" and gone != [8])


def test_a_confident_student_learns_the_tail() -> None:
    """The tail's tokens keep different gradients even where their probabilities underflow."""
    logits = torch.tensor([[200.0, 0.0, 1.0]], device=DEVICE)
    top = TopK(*(torch.tensor(x, device=DEVICE) for x in ([[0.75]], [[0]], [0.25])))
    kl, gradient = given(triton, logits, top._replace(log_prob=top.log_prob.log()))
    tail = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(-1).float().to(DEVICE)
    torch.testing.assert_close(gradient[0], torch.cat([tail.new_tensor([0.25]), -0.25 * tail]))
    log_q_tail = torch.tensor([0.0, 1.0]).logsumexp(-1) - 200
    expected = 0.75 * torch.tensor(0.75).log() + 0.25 * (torch.tensor(0.25).log() - log_q_tail)
    torch.testing.assert_close(kl[0].cpu(), expected)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    student, _ = streams = make(2, 4, 70, FP32)
    top = teacher(1, 5)
    expected = flat(run(triton, 2, [*streams, top], mask=True))
    student.hidden[1] = torch.nan  # Nothing counts in row 1, and KL does not in row 3.
    for x, junk in zip(top, (torch.nan, -(2**31), torch.nan), strict=True):
        x[[1, 3]] = junk
    with honest_memory_and_casts():
        actual = flat(run(triton, 2, [*streams, top], mask=True))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    kl = actual[2]
    assert not kl[..., [1, 3]].any()


def test_a_token_outside_the_vocabulary_makes_its_row_nan() -> None:
    """Raising would wait for the device. Instead the row's loss is NaN, and all others are unchanged."""
    (student,) = make(1, 4, 70, FP32)
    top = teacher(1, 5)
    before = run(triton, 1, [student, top])[2]
    top.index[0, 2], top.index[2, 1] = 70, -1
    kl = run(triton, 1, [student, top])[2]
    assert kl is not None
    assert before is not None
    assert kl[0, 1, [0, 2]].isnan().all()
    assert torch.equal(kl[0, 1, [1, 3]], before[0, 1, [1, 3]])


def test_a_weight_of_zero_removes_an_infinite_loss() -> None:
    top = teacher(1, 3, 1, 4)
    top.tail[:] = 0
    kl, gradient = given(triton, torch.zeros(1, 4, device=DEVICE), top, weight=0.0, divergence="reverse")
    assert kl.isinf().all()
    assert not gradient.any()


def test_the_public_function() -> None:
    hidden, weight, _ = make(1, 4, 70, FP32, bias=False)[0]
    ones = torch.ones(1, 2, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with kernels.backend(backend):
            (loss,) = kernels.linear_ensemble_kl(
                [Projected(hidden.requires_grad_(), weight)],
                [teacher(1, 5)],
                torch.zeros(4, dtype=torch.int64, device=DEVICE),
                ce_weight=ones[0, :1],
                kl_weight=ones,
                normalizer=4,
            ).losses
            results.append((loss, *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(*results)


def losses_and_gradients(
    student: Projected, teachers: list[Projected | TopK], targets: Tensor, ones_1: Tensor, ones_13: Tensor
):
    rows = targets == 0
    spec = LossSpec(targets, ones_1, ones_13, rows, rows, 1.0, "jsd")
    return flat(triton.losses_and_gradients([student], teachers, spec, 2, [[True, True, False]]))


def test_torch_compile_traces_it() -> None:
    student, dense = make(2, 3, 24, FP32, bias=False)
    zeros, *ones = (torch.full(shape, x, device=DEVICE) for shape, x in (((3,), 0), ((1,), 1.0), ((1, 3), 1.0)))
    inputs = student, [teacher(1, 4, 3, 24), dense], zeros, *ones
    compiled = torch.compile(losses_and_gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), losses_and_gradients(*inputs))


def test_nothing_waits_for_the_device() -> None:
    """Reading a number raises on fake tensors, which have none."""
    with FakeTensorMode():
        student = Projected(*(torch.empty(n, 5, device="cuda", dtype=BF16) for n in (3, 24)))
        top = TopK(*(torch.empty(shape, device="cuda") for shape in ((3, 4), (3, 4), (3,))))
        ones = (torch.empty(shape, device="cuda") for shape in ((1,), (1, 3)))
        results = losses_and_gradients(student, [top, student], torch.empty(3, device="cuda", dtype=torch.int64), *ones)
    assert [x.shape for x in results] == [(1,), (1, 3), (1, 3, 3), (3, 5), (24, 5)]
