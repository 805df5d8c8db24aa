"""Compares teachers known by their top k and their tail with autograd through the k + 1 buckets in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Projected, TopK
from kernels.ops.ensemble_kl import reference as dense_reference

pytestmark = pytest.mark.usefixtures("backend")

TOKENS, VOCABULARY, WIDTH = 9, 17, 5
TARGETS = torch.tensor([0, 12, -100, 4, 5, -100, 7, 8, 16])


def stream(seed: int, dtype: torch.dtype = torch.float64, *, requires_grad: bool = True) -> Projected:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for n in (TOKENS, VOCABULARY)
    )
    return Projected(hidden, weight)


def top_k(teacher: Projected, k: int, temperature: float) -> TopK:
    log_prob_NV = (teacher.hidden @ teacher.weight.T / temperature).log_softmax(-1).detach()
    log_prob_Nk, index_Nk = log_prob_NV.topk(k)
    return TopK(log_prob_Nk, index_Nk, (1 - log_prob_Nk.exp().sum(-1)).clamp(min=0))


def buckets(log_prob_NV: Tensor, index_Nk: Tensor) -> Tensor:
    """Returns log-probabilities [N, k + 1] of the tokens at `index` and of all others together."""
    rest_NV = log_prob_NV.scatter(1, index_Nk, -torch.inf)
    return torch.cat([log_prob_NV.gather(1, index_Nk), rest_NV.logsumexp(-1, keepdim=True)], 1)


def divergence_of(log_q: Tensor, log_p: Tensor, divergence: str) -> Tensor:
    """Computes the divergence term by term, as it is defined."""
    p, q, log_m = log_p.exp(), log_q.exp(), ((log_p.exp() + log_q.exp()) / 2).log()
    return {
        "forward": p * (log_p - log_q),
        "reverse": q * (log_q - log_p),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
    }[divergence].sum(-1)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("peers", [0, 1])
def test_losses_and_gradients_equal_autograds(
    divergence: str, temperature: float, peers: int, request: pytest.FixtureRequest
) -> None:
    dtype = torch.float64
    students = [stream(seed) for seed in range(1 + peers)]
    dense, teacher = stream(8, requires_grad=False), stream(9, requires_grad=False)
    top = top_k(teacher, 4, temperature)
    kl_mask = torch.arange(TOKENS) != 3  # It has rows without a target, and lacks one with a target.
    ce_weight = torch.tensor([0.5, 0.3], dtype=dtype)[: 1 + peers]
    kl_weight = torch.rand(1 + peers, 3 + peers, dtype=dtype, generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = dict(temperature=temperature, divergence=divergence)
    result = kernels.linear_ensemble_kl(
        students,
        [dense, top],
        TARGETS,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        normalizer=7,
        kl_mask=kl_mask,
        **options,
    )

    logits = [s.hidden @ s.weight.T for s in students]
    streams = [*[z.detach() for z in logits], dense.hidden @ dense.weight.T]
    log_p = torch.cat([top.log_prob, top.tail.log()[:, None]], 1)
    assert result.kl is not None
    for i, z in enumerate(logits):
        expected = ce_weight[i] * torch.nn.functional.cross_entropy(z, TARGETS, reduction="sum")
        top_k_N = divergence_of(buckets((z / temperature).log_softmax(-1), top.index), log_p, divergence)
        torch.testing.assert_close(result.kl[i, -1], top_k_N.detach() * kl_mask)
        expected = expected + temperature**2 * kl_weight[i, -1] * (top_k_N * kl_mask).sum()
        for j, other in enumerate(streams):
            if j != i:
                kl_N = divergence_of(
                    (z / temperature).log_softmax(-1), (other / temperature).log_softmax(-1), divergence
                )
                expected = expected + temperature**2 * kl_weight[i, j] * (kl_N * kl_mask).sum()
        expected = expected / 7
        torch.testing.assert_close(result.losses[i], expected)
        actual = torch.autograd.grad(result.losses[i], [students[i].hidden, students[i].weight])
        wanted = torch.autograd.grad(expected, [students[i].hidden, students[i].weight])
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_gradients_are_those_of_finite_differences(divergence: str) -> None:
    top = top_k(stream(9, requires_grad=False), 3, 1.5)
    student = stream(1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return kernels.linear_ensemble_kl(
            [Projected(hidden, weight)],
            [top],
            TARGETS,
            ce_weight=torch.tensor([0.5]).double(),
            kl_weight=torch.tensor([[0.0, 1.0]]).double(),
            normalizer=7,
            temperature=1.5,
            divergence=divergence,
        ).losses[0]

    gradients = torch.autograd.grad(loss(student.hidden, student.weight), [student.hidden, student.weight])
    generator, step = torch.Generator().manual_seed(3), 1e-5
    for _ in range(3):
        at = [student.hidden.detach(), student.weight.detach()]
        along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in at]
        after, before = (loss(*(x + sign * step * d for x, d in zip(at, along, strict=True))) for sign in (1, -1))
        slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
        torch.testing.assert_close((after - before) / (2 * step), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_all_tokens_kept_but_one_is_the_whole_divergence(divergence: str) -> None:
    student, teacher = stream(1), stream(2, requires_grad=False)
    weights: dict[str, Any] = dict(ce_weight=torch.tensor([0.5]), kl_weight=torch.tensor([[0.0, 1.0]]), normalizer=7)
    options: dict[str, Any] = dict(divergence=divergence, temperature=2.0)
    (bucketed,), (whole,) = (
        kernels.linear_ensemble_kl([student], [other], TARGETS, **weights, **options).losses
        for other in (top_k(teacher, VOCABULARY - 1, 2.0), teacher)
    )
    torch.testing.assert_close(bucketed, whole)
    for a, b in zip(*(torch.autograd.grad(x, list(student[:2])) for x in (bucketed, whole)), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_tail_and_a_confident_student() -> None:
    """In fp32, 1 − Σ q would have no correct digit here."""
    student = Projected(torch.tensor([[40.0]]).requires_grad_(), torch.tensor([[1.0], [0.0], [0.0]]))
    index = torch.tensor([[0]], dtype=torch.int16)
    for tail, expected in (
        (0.0, 0.0),
        (0.25, 0.75 * torch.tensor(0.75).log() + 0.25 * (torch.tensor(0.125).log() + 40)),
    ):
        top = TopK(torch.tensor([[1 - tail]]).log(), index, torch.tensor([tail]))
        result = kernels.linear_ensemble_kl(
            [student],
            [top],
            torch.tensor([0]),
            ce_weight=torch.tensor([0.0]),
            kl_weight=torch.tensor([[0.0, 1.0]]),
            normalizer=1,
        )
        torch.testing.assert_close(result.losses[0].item(), float(expected), rtol=1e-6, atol=1e-9)


def test_a_confident_student_learns_the_tail() -> None:
    """In fp32, P_t / Q_t is infinite here."""
    logits = torch.tensor([[95.0, 0.0, 1.0]]).requires_grad_()
    loss = kernels.linear_ensemble_kl(
        [Projected(logits, torch.eye(3))],
        [TopK(torch.tensor([[0.75]]).log(), torch.tensor([[0]]), torch.tensor([0.25]))],
        torch.tensor([0]),
        ce_weight=torch.tensor([0.0]),
        kl_weight=torch.tensor([[0.0, 1.0]]),
        normalizer=1,
    ).losses[0]
    (gradient,) = torch.autograd.grad(loss, logits)
    shares = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(gradient[0], torch.tensor([0.25, *(-0.25 * shares)]), rtol=1e-3, atol=0)


def test_a_weight_of_zero_removes_an_infinite_loss() -> None:
    student = Projected(torch.zeros(1, 3).requires_grad_(), torch.eye(3))
    result = kernels.linear_ensemble_kl(
        [student],
        [TopK(torch.zeros(1, 1), torch.tensor([[0]]), torch.zeros(1))],
        torch.tensor([0]),
        ce_weight=torch.tensor([0.0]),
        kl_weight=torch.tensor([[0.0, 0.0]]),
        normalizer=1,
        divergence="reverse",
    )
    assert result.kl is not None
    assert result.kl[0, 1].isinf().all()
    assert result.losses[0] == 0
    (gradient,) = torch.autograd.grad(result.losses[0], student.hidden)
    assert not gradient.any()


def test_bad_input() -> None:
    student, top = stream(1, torch.float32), top_k(stream(2, requires_grad=False), 3, 1.0)
    weights: dict[str, Any] = dict(ce_weight=torch.ones(1), kl_weight=torch.ones(1, 2), normalizer=7)
    for bad, message in (
        (top._replace(tail=top.tail[:-1]), r"teacher 0 has .*expected \[N, k\], \[N, k\] and \[N\]"),
        (TopK(*(x[:-1] for x in top)), "expected N = 9"),
        (top._replace(index=top.index.float()), "integers in index"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.linear_ensemble_kl([student], [bad], TARGETS, **weights)


def test_the_dense_kl_bounds_it_from_above() -> None:
    student, teacher = stream(1), stream(2, requires_grad=False)
    logits = [s.hidden @ s.weight.T for s in (student, teacher)]
    _, whole = dense_reference.ensemble_kl(logits, None, 1, 1.0, "forward", -100)
    log_q = logits[0].log_softmax(-1)
    for k in (1, 4, 8):
        top = top_k(teacher, k, 1.0)
        log_p = torch.cat([top.log_prob, top.tail.log()[:, None]], 1)
        assert (divergence_of(buckets(log_q, top.index), log_p, "forward") <= whole[0, 1] + 1e-12).all()
