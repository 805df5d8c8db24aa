"""Compares `ensemble_kl` with definitions written here with torch's own losses, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.ops.ensemble_kl import native
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.reference import loss_and_grad
from tests.kernels.ops.random_losses import DIVERGENCES, RANDOM_LOSSES

pytestmark = pytest.mark.usefixtures("backend")


def make_logits(streams: int, tokens: int, vocabulary: int, *, seed: int = 0, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(streams, tokens, vocabulary, generator=generator, dtype=torch.float64) * scale)


def naive_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Returns KL(p ‖ q) per token, by torch's kl_div on log-softmax."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def naive_divergence(learner: Tensor, peer: Tensor, temperature: float, divergence: str) -> Tensor:
    learner, peer = learner / temperature, peer.detach() / temperature
    if divergence == "forward":
        return naive_kl(peer, learner)
    if divergence == "reverse":
        return naive_kl(learner, peer)
    mean = ((learner.softmax(-1) + peer.softmax(-1)) / 2).log()
    return (naive_kl(peer, mean) + naive_kl(learner, mean)) / 2


def naive(streams, targets, students, temperature, divergence) -> tuple[Tensor, Tensor]:
    valid = targets != -100
    ce = torch.stack([F.cross_entropy(s, targets, reduction="none", ignore_index=-100) for s in streams[:students]])
    kl = torch.stack(
        [torch.stack([naive_divergence(s, t, temperature, divergence) for t in streams]) for s in streams[:students]]
    )
    off_diagonal = ~torch.eye(students, len(streams), dtype=torch.bool)
    return ce, kl * valid * off_diagonal[:, :, None]


def sweep(
    streams, targets, ce_weight, kl_weight, *, temperature=1.0, divergence="forward"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns losses and every student's gradient by the current backend's `loss_and_grad`, on copies of the logits."""
    valid = targets != -100
    copies = [s.detach().clone() for s in streams]
    spec = LossSpec(targets, ce_weight, kl_weight, valid, valid, temperature, divergence)
    if kernels.backend().name == "native":
        gradients = copies[: len(ce_weight)]
        ce, kl = native.loss_and_grad_(copies, gradients, spec)
    else:
        ce, kl, gradients = loss_and_grad(copies, spec, [True] * len(ce_weight))
    assert kl is not None
    return ce, kl, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("students", "streams"), [(1, 1), (1, 2), (2, 2), (3, 3), (2, 4), (5, 5), (1, 6), (4, 7), (1, 8), (5, 8)]
)
def test_losses_and_gradients_equal_the_naive_ones(students, streams, temperature, divergence):
    logits = [x.requires_grad_() for x in make_logits(streams, 6, 11)]
    targets = torch.tensor([3, -100, 0, 10, 5, 5])
    generator = torch.Generator().manual_seed(1)
    ce_weight = torch.rand(students, generator=generator, dtype=torch.float64)
    kl_weight = torch.rand(students, streams, generator=generator, dtype=torch.float64)

    result = kernels.ensemble_kl(logits, targets, students=students, temperature=temperature, divergence=divergence)
    ce, kl = naive(logits, targets, students, temperature, divergence)
    torch.testing.assert_close(result.ce, ce, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.kl, kl, rtol=1e-10, atol=1e-13)

    def total(ce, kl):
        return (ce_weight[:, None] * ce).sum() + temperature**2 * (kl_weight[:, :, None] * kl).sum()

    expected = torch.autograd.grad(total(ce, kl), logits[:students])
    actual = torch.autograd.grad(total(*result), logits[:students])
    swept_ce, swept_kl, swept = sweep(
        logits, targets, ce_weight, kl_weight, temperature=temperature, divergence=divergence
    )
    torch.testing.assert_close(swept_ce, ce, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(swept_kl, kl, rtol=1e-10, atol=1e-13)
    for by_autograd, by_sweep, naive_gradient in zip(actual, swept, expected, strict=True):
        torch.testing.assert_close(by_autograd, naive_gradient, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(by_sweep, naive_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_gaps_in_float32(divergence):
    """Probabilities underflow in either stream, and point masses agree and disagree."""
    rows = torch.tensor([[120.0, 0, 0, -120], [0, 120, 0, 30], [-30, 30, 0.02, 0], [30, -30, 0, 0], [1, 1, 1, 1]])
    other = torch.tensor([[120.0, 0, 1, -120], [120, 0, 0, -60], [30, -30, 0, 0], [30, -30, 0, 0], [1, 1, 1.3, 1]])
    streams, targets = [rows, other], torch.zeros(5, dtype=torch.int64)
    ones, pairs = torch.ones(2), torch.ones(2, 2)
    exact_ce, exact_kl, exact = sweep(
        [x.double() for x in streams], targets, ones.double(), pairs.double(), divergence=divergence
    )
    torch.testing.assert_close(exact_kl, naive([x.double() for x in streams], targets, 2, 1.0, divergence)[1])
    for ce, kl in (
        kernels.ensemble_kl(streams, targets, students=2, divergence=divergence),
        sweep(streams, targets, ones, pairs, divergence=divergence)[:2],
    ):
        torch.testing.assert_close(ce, exact_ce.float())
        torch.testing.assert_close(kl, exact_kl.float(), rtol=1e-5, atol=1e-9)
    for actual, want in zip(sweep(streams, targets, ones, pairs, divergence=divergence)[2], exact, strict=True):
        torch.testing.assert_close(actual, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_tiny_divergences_are_accurate_in_float32(divergence, temperature):
    """At KL ≈ 1e-7, Σ p·u − p + q would be wrong by some percent."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(8, 4000, generator=generator) * 3 * temperature
    nearby = base + torch.randn(8, 4000, generator=generator) * 4.5e-4 * temperature
    exact = naive([base.double(), nearby.double()], torch.zeros(8, dtype=torch.int64), 2, temperature, divergence)[1]
    assert 1e-8 < exact[0, 1].max() < 3e-7
    targets = torch.zeros(8, dtype=torch.int64)
    defined = kernels.ensemble_kl(
        [base, nearby], targets, students=2, temperature=temperature, divergence=divergence
    ).kl
    swept = sweep(
        [base, nearby], targets, torch.ones(2), torch.ones(2, 2), temperature=temperature, divergence=divergence
    )[1]
    for kl in (defined, swept):
        for i, j in ((0, 1), (1, 0)):
            relative = (kl[i, j].double() / exact[i, j] - 1).abs().max().item()
            assert relative < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_three_times_torchs(divergence, dtype):
    """The exact values are float64 on the same stored logits. torch computes in the storage dtype, as in training."""
    stored = [x.to(dtype) for x in make_logits(3, 16, 1000, scale=3.0)]
    targets = torch.arange(16)
    exact = naive([x.double() for x in stored], targets, 2, 1.0, divergence)
    ours = kernels.ensemble_kl(stored, targets, students=2, divergence=divergence)
    torchs = naive(stored, targets, 2, 1.0, divergence)
    assert ours.ce.dtype == ours.kl.dtype == torch.float32
    for actual, plain, want in zip(ours, torchs, exact, strict=True):
        scale = want.abs().max()
        assert (actual - want).abs().max() <= 3 * (plain - want).abs().max() + 2**-23 * scale


def test_one_stream_is_cross_entropy():
    (logits,) = make_logits(1, 5, 9)
    targets = torch.tensor([1, 2, -100, 0, 8])
    result = kernels.ensemble_kl([logits], targets, students=1)
    torch.testing.assert_close(result.ce[0], F.cross_entropy(logits, targets, reduction="none"))
    assert result.kl.shape == (1, 1, 5)
    assert not result.kl.any()


def test_without_targets_every_row_counts():
    streams = make_logits(2, 4, 9)
    targets = torch.zeros(4, dtype=torch.int64)
    result = kernels.ensemble_kl(streams, None, students=1)
    assert torch.equal(result.kl, kernels.ensemble_kl(streams, targets, students=1).kl)
    assert result.ce.shape == (1, 4)
    assert not result.ce.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_reaches_the_learner_alone(divergence):
    streams = [x.requires_grad_() for x in make_logits(4, 3, 7)]
    result = kernels.ensemble_kl(streams, torch.tensor([0, 1, 2]), students=3, divergence=divergence)
    for i in range(3):
        (result.ce[i].sum() + result.kl[i].sum()).backward(retain_graph=True)
        for j, stream in enumerate(streams):
            assert (stream.grad is not None and bool(stream.grad.any())) == (i == j)
            stream.grad = None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_rows_may_hold_anything(divergence):
    clean = make_logits(3, 4, 7)
    targets = torch.tensor([2, -100, 0, -100])
    streams = [x.clone() for x in clean]
    for stream in streams:
        stream[1], stream[3] = math.nan, math.inf
        stream.requires_grad_()
    result = kernels.ensemble_kl(streams, targets, students=2, divergence=divergence)
    expected = kernels.ensemble_kl(clean, targets, students=2, divergence=divergence)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert not result.ce[:, [1, 3]].any()
    assert not result.kl[:, :, [1, 3]].any()
    for gradient in torch.autograd.grad(result.ce.sum() + result.kl.sum(), streams[:2]):
        assert gradient.isfinite().all()
        assert not gradient[[1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity(divergence, temperature, dtype):
    """A token with −inf in both streams, as in a padded vocabulary, changes nothing."""
    inside = [x.to(dtype) for x in make_logits(2, 5, 8)]
    padded = [F.pad(x, (0, 3), value=-math.inf).requires_grad_() for x in inside]
    targets = torch.tensor([0, 1, 2, -100, 7])
    options = {"temperature": temperature, "divergence": divergence}
    want = kernels.ensemble_kl(inside, targets, students=2, **options)
    actual = kernels.ensemble_kl(padded, targets, students=2, **options)
    ce, kl, gradients = sweep(padded, targets, torch.ones(2, dtype=dtype), torch.ones(2, 2, dtype=dtype), **options)
    for a, b, c in zip(want, actual, (ce, kl), strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
    defined = torch.autograd.grad(actual.ce.sum() + temperature**2 * actual.kl.sum(), padded)
    for by_autograd, by_sweep in zip(defined, gradients, strict=True):
        assert by_autograd.isfinite().all()
        assert not by_autograd[:, 8:].any()
        torch.testing.assert_close(by_autograd, by_sweep, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_one_stream(divergence, temperature, dtype):
    """KL is finite where its first argument has probability 0, +inf where only the second has, and never NaN."""
    narrow, wide = (x.to(dtype) for x in make_logits(2, 4, 6))
    narrow[:, 0] = -math.inf
    targets = torch.tensor([1, 2, 3, 4])
    options = {"temperature": temperature, "divergence": divergence}
    p, q = ((x / temperature).softmax(-1) for x in (narrow, wide))
    narrow_to_wide = (p * (p / q).log()).nan_to_num(0).sum(-1)
    mean = (p + q) / 2
    jsd = ((p * (p / mean).log()).nan_to_num(0).sum(-1) + (q * (q / mean).log()).sum(-1)) / 2
    infinite = torch.full_like(jsd, math.inf)
    learner_narrow, learner_wide = {
        "forward": (infinite, narrow_to_wide),
        "reverse": (narrow_to_wide, infinite),
        "jsd": (jsd, jsd),
    }[divergence]

    streams = [narrow.requires_grad_(), wide.requires_grad_()]
    defined = kernels.ensemble_kl(streams, targets, students=2, **options)
    ones, pairs = torch.ones(2, dtype=dtype), torch.ones(2, 2, dtype=dtype)
    _, swept, gradients = sweep(streams, targets, ones, pairs, **options)
    for kl in (defined.kl, swept):
        torch.testing.assert_close(kl[0, 1], learner_narrow)
        torch.testing.assert_close(kl[1, 0], learner_wide)
    total = defined.ce.sum() + temperature**2 * defined.kl.sum()
    for i, (by_autograd, by_sweep) in enumerate(zip(torch.autograd.grad(total, streams), gradients, strict=True)):
        if divergence == "reverse" and i == 1:
            # The loss is infinite whatever this student's finite logits are, so its gradient does not exist.
            assert not by_autograd.isfinite().all(-1).any()
            assert not by_sweep.isfinite().all(-1).any()
            continue
        assert by_autograd.isfinite().all()
        torch.testing.assert_close(by_autograd, by_sweep, rtol=1e-5, atol=1e-5)


def test_a_target_of_probability_zero():
    (logits,) = make_logits(1, 2, 5)
    logits[0, 3] = -math.inf
    targets = torch.tensor([3, 1])
    ce = kernels.ensemble_kl([logits.requires_grad_()], targets, students=1).ce
    swept, _, (gradient,) = sweep([logits], targets, torch.ones(1).double(), torch.zeros(1, 1).double())
    assert ce[0, 0] == swept[0, 0] == math.inf
    torch.testing.assert_close(gradient, logits.softmax(-1).detach() - F.one_hot(targets, 5))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_is_not_hidden(divergence):
    streams = make_logits(3, 2, 5)
    streams[0][0, 1] = math.nan
    targets = torch.tensor([0, 1])
    defined = kernels.ensemble_kl(streams, targets, students=2, divergence=divergence)
    swept = sweep(streams, targets, torch.ones(2).double(), torch.ones(2, 3).double(), divergence=divergence)
    for ce, kl in (defined, swept[:2]):
        assert ce[0, 0].isnan()
        assert kl[0, 1:, 0].isnan().all()
        assert kl[1, 0, 0].isnan()
        assert kl[1, 2, 0].isfinite()
        assert kl[:, :, 1].isfinite().all()
    assert all(gradient[0].isnan().any() for gradient in swept[2])


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_differentiable_twice_and_forward(divergence):
    first, second, teacher = make_logits(3, 3, 4, scale=1.0)
    targets = torch.tensor([1, -100, 3])

    def losses(
        x: Tensor,
    ) -> tuple[Tensor, Tensor]:  # One learner, because the checks do not know that peers are constant.
        result = kernels.ensemble_kl([x, second, teacher], targets, students=1, temperature=1.5, divergence=divergence)
        return result.ce, result.kl

    x = first.requires_grad_()
    assert torch.autograd.gradcheck(losses, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses, x)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # All examples have the same backend.
)
@given(
    **RANDOM_LOSSES,
    tokens=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_properties(seed, students, teachers, tokens, vocabulary, scale, temperature, divergence, dtype):
    streams = students + teachers
    logits = [x.to(dtype) for x in make_logits(streams, tokens, vocabulary, seed=seed, scale=scale)]
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    weights = torch.ones(students, dtype=dtype), torch.ones(students, streams, dtype=dtype)
    options = {"temperature": temperature, "divergence": divergence}

    def run(logits, targets=targets):
        return sweep(logits, targets, *weights, **options)

    tiny = 30 * torch.finfo(dtype).eps * max(scale, 1.0) / temperature
    close = {"rtol": 1e3 * tiny, "atol": 1e2 * tiny}
    ce, kl, gradients = run(logits)
    again = run(logits)
    assert torch.equal(ce, again[0])
    assert torch.equal(kl, again[1])
    assert all(torch.equal(a, b) for a, b in zip(gradients, again[2], strict=True))
    torch.testing.assert_close(kernels.ensemble_kl(logits, targets, students=students, **options).kl, kl, **close)

    assert (kl >= -tiny * kl.max()).all()
    for gradient in gradients:
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(tokens, dtype=dtype), **close)

    shifted = run([x + 3 * (i + 1) for i, x in enumerate(logits)])
    torch.testing.assert_close(shifted[1], kl, rtol=5e3 * tiny, atol=5e2 * tiny)

    identical = run([logits[0]] * streams)
    assert identical[1].abs().max() <= tiny**2

    order = [*reversed(range(students)), *reversed(range(students, streams))]
    permuted = run([logits[i] for i in order])
    torch.testing.assert_close(permuted[1], kl[order[:students]][:, order], **close)
    torch.testing.assert_close(permuted[0], ce[order[:students]], **close)

    cut = tokens // 2
    halves = [run([x[part] for x in logits], targets[part]) for part in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(torch.cat([half[1] for half in halves], -1), kl, **close)
    for i in range(students):
        torch.testing.assert_close(torch.cat([half[2][i] for half in halves]), gradients[i], **close)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": 0}, "students is 0 of 2 streams"),
        ({"students": 3}, "students is 3 of 2 streams"),
        ({"streams": [torch.zeros(2, 3)] * 9}, "9 streams: expected at most 8"),
        ({"streams": [torch.zeros(2, 3), torch.zeros(2, 4)]}, r"stream 1 is \(2, 4\)"),
        ({"streams": [torch.zeros(2, 3, dtype=torch.int64)]}, "expected floating-point"),
        ({"targets": torch.tensor([0, 3])}, "targets holds 3: expected 0 to 2"),
        ({"targets": torch.tensor([0, -1])}, "targets holds -1"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, "expected int64"),
        ({"targets": torch.tensor([0])}, r"expected int64 \[N\] = \[2\]"),
        ({"temperature": 0.0}, "temperature is 0.0: expected a finite number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"divergence": "kl"}, "divergence is 'kl': expected one of forward, reverse, jsd"),
    ],
)
def test_bad_input(change, message):
    arguments: dict[str, Any] = {
        "streams": [torch.zeros(2, 3)] * 2,
        "targets": torch.tensor([0, 1]),
        "students": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        kernels.ensemble_kl(arguments.pop("streams"), arguments.pop("targets"), **arguments)
