"""Compares `linear_ensemble_kl` with autograd through `ensemble_kl` of all the logits at once, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Projected
from kernels.ops.linear_ensemble_kl import native, reference

pytestmark = pytest.mark.usefixtures("backend")

TOKENS, VOCABULARY = 11, 13
TARGETS = torch.tensor([0, 12, -100, 4, 5, -100, 7, 8, 0, 1, 2])
CHUNKS = (1, 4, TOKENS, 100)


def make_streams(widths, *, dtype=torch.float64, bias=True, requires_grad=True, seed=0) -> list[Projected]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    return [
        Projected(tensor(TOKENS, width), tensor(VOCABULARY, width), tensor(VOCABULARY) if bias else None)
        for width in widths
    ]


def make_weights(students: int, streams: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.rand(students, generator=generator, dtype=dtype),
        torch.rand(students, streams, generator=generator, dtype=dtype),
    )


def tensors(stream: Projected) -> list[Tensor]:
    return [x for x in stream if x is not None]


def total(losses) -> Tensor:
    return torch.stack(list(losses)).sum()


def full_logits(stream: Projected) -> Tensor:
    logits = stream.hidden.double() @ stream.weight.double().T
    return logits if stream.bias is None else logits + stream.bias.double()


def naive_losses(
    students,
    teachers,
    targets,
    *,
    ce_weight,
    kl_weight,
    normalizer,
    temperature=1.0,
    divergence="forward",
    kl_mask=None,
) -> list[Tensor]:
    """Computes the losses with autograd through the reference, and with N × V logits in memory."""
    streams = [full_logits(stream) for stream in (*students, *teachers)]
    options: dict[str, Any] = {"students": len(students), "temperature": temperature, "divergence": divergence}
    with kernels.backend("reference"):
        ce = kernels.ensemble_kl(streams, targets, **options).ce
        kl = kernels.ensemble_kl(streams, None, **options).kl
    rows = targets != -100 if kl_mask is None else kl_mask
    kl_weight = torch.zeros(kl.shape[:2]) if kl_weight is None else kl_weight
    return [
        (ce_weight[i] * ce[i].sum() + temperature**2 * (kl_weight[i] * (kl[i] * rows).sum(-1)).sum()) / normalizer
        for i in range(len(students))
    ]


@pytest.fixture
def chunk_of(monkeypatch):
    """Returns a function that sets how many tokens a chunk takes on the CPU."""

    def set_chunk(tokens: int, students: int, streams: int, itemsize: int = 8) -> None:
        row = (streams + students + reference.TEMPORARIES) * VOCABULARY * itemsize
        monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", tokens * row)
        monkeypatch.setattr(native, "BUDGET", tokens * streams * VOCABULARY * itemsize)

    return set_chunk


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("widths", "teacher_widths"), [((5,), ()), ((3,), (6, 2)), ((5, 3, 8), ()), ((4, 6), (7,))])
def test_losses_and_gradients_equal_autograds(widths, teacher_widths, divergence, chunk, chunk_of):
    students = make_streams(widths)
    teachers = make_streams(teacher_widths, requires_grad=False, seed=1)
    ce_weight, kl_weight = make_weights(len(widths), len(widths) + len(teachers))
    kl_mask = torch.arange(TOKENS) % 4 != 0  # It neither contains the valid targets nor is contained in them.
    chunk_of(chunk, len(widths), len(widths) + len(teachers))
    cases: tuple[dict[str, Any], ...] = (
        {"kl_weight": kl_weight, "temperature": 2.0},
        {"kl_weight": kl_weight, "kl_mask": kl_mask},
        {"kl_weight": None},
    )
    for options in cases:
        options |= {"ce_weight": ce_weight, "normalizer": 9, "divergence": divergence}
        result = kernels.linear_ensemble_kl(students, teachers, TARGETS, **options)
        expected = naive_losses(students, teachers, TARGETS, **options)
        assert (result.kl is None) == (options["kl_weight"] is None)
        for student, loss, want in zip(students, result.losses, expected, strict=True):
            torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-13)
            got_gradients = torch.autograd.grad(3.0 * loss, tensors(student))
            for actual, reference_gradient in zip(
                got_gradients, torch.autograd.grad(3.0 * want, tensors(student)), strict=True
            ):
                torch.testing.assert_close(actual, reference_gradient, rtol=1e-10, atol=1e-13)


def test_per_token_losses_are_those_of_ensemble_kl(chunk_of):
    students, teachers = make_streams((4, 6)), make_streams((7,), seed=1)
    ce_weight, kl_weight = make_weights(2, 3)
    kl_weight[0, 2] = 0  # It is still computed.
    chunk_of(4, 2, 3)
    result = kernels.linear_ensemble_kl(
        students, teachers, TARGETS, ce_weight=ce_weight, kl_weight=kl_weight, normalizer=9, temperature=2.0
    )
    expected = kernels.ensemble_kl(
        [full_logits(s) for s in (*students, *teachers)], TARGETS, students=2, temperature=2.0
    )
    assert result.kl is not None
    torch.testing.assert_close(result.ce, expected.ce.detach())
    torch.testing.assert_close(result.kl, expected.kl.detach())
    assert not result.ce.requires_grad
    assert not result.kl.requires_grad


def test_backward_touches_its_own_student_alone():
    students, teachers = make_streams((4, 6, 4)), make_streams((7,), seed=1)
    ce_weight, kl_weight = make_weights(3, 4)
    result = kernels.linear_ensemble_kl(
        students, teachers, TARGETS, ce_weight=ce_weight, kl_weight=kl_weight, normalizer=9
    )
    result.losses[1].backward()
    for i, stream in enumerate((*students, *teachers)):
        assert all((x.grad is not None) == (i == 1) for x in tensors(stream))


def test_one_head_tied_to_an_embedding_and_shared_by_two_students():
    table = torch.randn(VOCABULARY, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tokens = torch.arange(TOKENS) % VOCABULARY
    ce_weight, kl_weight = make_weights(2, 2)
    options: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "normalizer": 9}

    def students() -> list[Projected]:
        return [Projected(table[tokens] * (i + 1), table) for i in range(2)]

    expected = torch.autograd.grad(total(naive_losses(students(), (), TARGETS, **options)), table)[0]
    for loss in kernels.linear_ensemble_kl(students(), (), TARGETS, **options).losses:
        loss.backward()
    torch.testing.assert_close(table.grad, expected)


def test_only_wanted_gradients_are_computed():
    (student,) = make_streams((4,))
    frozen = student._replace(weight=student.weight.detach(), bias=None)
    options: dict[str, Any] = {"ce_weight": torch.ones(1), "kl_weight": None, "normalizer": 9}
    (loss,) = kernels.linear_ensemble_kl([frozen], (), TARGETS, **options).losses
    loss.backward()
    assert frozen.hidden.grad is not None
    assert frozen.weight.grad is None
    with torch.no_grad():
        (evaluated,) = kernels.linear_ensemble_kl([student], (), TARGETS, **options).losses
    assert not evaluated.requires_grad
    assert evaluated.item() == pytest.approx(naive_losses([student], (), TARGETS, **options)[0].item())


def test_a_second_backward_and_a_second_derivative_raise():
    students = make_streams((4,))
    options: dict[str, Any] = {"ce_weight": torch.ones(1), "kl_weight": None, "normalizer": 9}
    (loss,) = kernels.linear_ensemble_kl(students, (), TARGETS, **options).losses
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, students[0].hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was already called"):
        loss.backward()


def test_no_valid_token():
    students = make_streams((4, 6), dtype=torch.float32)
    ce_weight, kl_weight = make_weights(2, 2, torch.float32)
    for tokens in (TOKENS, 0):
        given = [Projected(s.hidden[:tokens], s.weight, s.bias) for s in students]
        targets = torch.full((tokens,), -100)
        result = kernels.linear_ensemble_kl(
            given, (), targets, ce_weight=ce_weight, kl_weight=kl_weight, normalizer=torch.tensor(9)
        )
        for student, loss in zip(students, result.losses, strict=True):
            assert loss.item() == 0
            for gradient in torch.autograd.grad(loss, tensors(student)):
                assert not gradient.any()


def test_rows_that_do_not_count_may_hold_anything(chunk_of):
    ce_weight, kl_weight = make_weights(2, 3)
    options: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "normalizer": 9}
    chunk_of(4, 2, 3)
    outcomes = []
    for junk in (0.0, math.nan):
        streams = make_streams((4, 6, 7))
        with torch.no_grad():
            for stream in streams:
                stream.hidden[TARGETS == -100] = junk
        result = kernels.linear_ensemble_kl(streams[:2], streams[2:], TARGETS, **options)
        total(result.losses).backward()
        outcomes.append([*result.losses, result.ce, result.kl, *(x.grad for s in streams[:2] for x in tensors(s))])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_forbidden_tokens():
    """Every stream has a bias of −inf, and a pair of weight 0 has an infinite divergence."""
    students = make_streams((4, 6), dtype=torch.float32)
    with torch.no_grad():
        for student in students:
            assert student.bias is not None
            student.bias[3] = -math.inf
        students[0].bias[6] = -math.inf  # type: ignore[index]
    kl_weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # KL(p_1 ‖ p_0) is infinite and has weight 0.
    targets = torch.full((TOKENS,), 1)
    for divergence, weight in (("forward", kl_weight), ("reverse", kl_weight.T), ("jsd", torch.ones(2, 2))):
        result = kernels.linear_ensemble_kl(
            students, (), targets, ce_weight=torch.ones(2), kl_weight=weight, normalizer=9, divergence=divergence
        )
        for student, loss in zip(students, result.losses, strict=True):
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, tensors(student)))


def test_strided_inputs(chunk_of):
    ce_weight, kl_weight = make_weights(2, 2)
    options: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "normalizer": 9}
    chunk_of(4, 2, 2)
    plain = make_streams((4, 6))

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], 2 * x.shape[1]), math.nan, dtype=x.dtype)
        wide[:, ::2] = x.detach()
        return wide[:, ::2].requires_grad_()

    strided_students = [
        Projected(strided(s.hidden), s.weight.detach().T.contiguous().T.requires_grad_(), s.bias) for s in plain
    ]
    mask = torch.stack([TARGETS != -100] * 2, 1)[:, 0]
    want = kernels.linear_ensemble_kl(plain, (), TARGETS, **options)
    actual = kernels.linear_ensemble_kl(
        strided_students, (), torch.stack([TARGETS] * 2, 1)[:, 1], kl_mask=mask, **options
    )
    for i in range(2):
        torch.testing.assert_close(actual.losses[i], want.losses[i])
        expected = torch.autograd.grad(want.losses[i], tensors(plain[i])[:2])
        for a, b in zip(torch.autograd.grad(actual.losses[i], tensors(strided_students[i])[:2]), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_and_sums_are_fp32_whatever_the_storage(dtype, autocast, chunk_of):
    """The error against float64 on the same stored values is one rounding to the storage's dtype, also in 11 chunks and
    under autocast."""
    students = make_streams((16, 24), dtype=dtype)
    ce_weight, kl_weight = make_weights(2, 2, torch.float32)
    options: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "normalizer": 9, "temperature": 2.0}
    expected = naive_losses(students, (), TARGETS, **options)
    chunk_of(1, 2, 2, itemsize=4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = kernels.linear_ensemble_kl(students, (), TARGETS, **options)
    for student, loss, want in zip(students, result.losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want.double(), rtol=1e-6, atol=0)
        for actual, exact in zip(
            torch.autograd.grad(loss, tensors(student)), torch.autograd.grad(want, tensors(student)), strict=True
        ):
            assert actual.dtype == dtype
            rounding = torch.finfo(dtype).eps
            assert (actual - exact).abs().max() <= (rounding + 1e-6) * exact.abs().max()


def test_a_loss_scale_reaches_fp16_gradients_before_they_are_rounded():
    (student,) = make_streams((4,), dtype=torch.float16)
    options: dict[str, Any] = {
        "ce_weight": torch.ones(1),
        "kl_weight": None,
        "normalizer": 10**8,
    }  # 1e-8 is below fp16's range.
    (loss,) = kernels.linear_ensemble_kl([student], (), TARGETS, **options).losses
    (loss * 2.0**26).backward()
    assert student.hidden.grad is not None
    assert (student.hidden.grad[TARGETS != -100] != 0).any(dim=-1).all()


def test_chunking_changes_nothing_beyond_rounding(chunk_of):
    ce_weight, kl_weight = make_weights(2, 2)
    options: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "normalizer": 9}
    outcomes = []
    for chunk in (3, TOKENS):
        chunk_of(chunk, 2, 2)
        students = make_streams((4, 6))
        result = kernels.linear_ensemble_kl(students, (), TARGETS, **options)
        total(result.losses).backward()
        outcomes.append([result.ce, result.kl, *(x.grad for s in students for x in tensors(s))])
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-12, atol=1e-13)


STUDENT = Projected(torch.zeros(2, 3), torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": []}, "students is empty"),
        ({"students": [STUDENT._replace(hidden=torch.zeros(2, 1, 3))]}, r"expected \[N, D\] and \[V, D\]"),
        ({"students": [STUDENT._replace(weight=torch.zeros(0))]}, r"student 0 has .* gather a sharded head"),
        ({"teachers": [Projected(torch.zeros(3, 3), torch.zeros(5, 3))]}, "teacher 0 has .* expected N = 2 and V = 5"),
        ({"students": [STUDENT._replace(bias=torch.zeros(3))]}, r"bias \(3,\): expected \[V\] = \[5\]"),
        ({"students": [STUDENT._replace(bias=torch.zeros(5, dtype=torch.int64))]}, "expected floating point on cpu"),
        ({"teachers": [STUDENT] * 8}, "9 streams: expected at most 8"),
        ({"ce_weight": torch.ones(2)}, r"ce_weight is \(2,\) torch.float32 on cpu: expected floating point \(1,\)"),
        ({"kl_weight": torch.ones(1)}, r"kl_weight is \(1,\) .* expected floating point \(1, 1\)"),
        ({"ce_weight": torch.ones(1, requires_grad=True)}, r"pass ce_weight.detach\(\)"),
        ({"normalizer": 0}, "normalizer is 0: expected the step's count of valid tokens"),
        ({"normalizer": torch.tensor(0)}, "normalizer is 0"),
        ({"normalizer": torch.ones(1)}, "expected an int or a 0-d tensor"),
        ({"kl_mask": torch.ones(2)}, r"kl_mask is \(2,\) torch.float32: expected bool \[N\] = \[2\]"),
        ({"targets": torch.tensor([0, 5])}, "targets holds 5: expected 0 to 4"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"divergence": "both"}, "divergence is 'both'"),
    ],
)
def test_bad_input(change, message):
    arguments: dict[str, Any] = {
        "students": [STUDENT],
        "teachers": [],
        "targets": torch.tensor([0, 1]),
        "ce_weight": torch.ones(1),
        "kl_weight": None,
        "normalizer": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        kernels.linear_ensemble_kl(
            arguments.pop("students"), arguments.pop("teachers"), arguments.pop("targets"), **arguments
        )
