"""The definition of `ensemble_kl` in plain torch, and its losses together with their gradients.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.

KL(p ‖ q) is computed as Σ_v p·f(u), where u = log p − log q is formed from differences of logits, and
f(u) = u − 1 + e^{−u} ≥ 0. Because Σp = Σq = 1, this equals Σ p·u. But each term is of second order in u, so terms do
not cancel one another, and an error that a whole row shares (its log-sum-exp's) drops out to first order. Near u = 0,
f is computed by its power series. Where p = 0, p·f(u) is replaced by its limit, which is q and not 0.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec

LOG_2 = math.log(2)

SERIES_BOUND = 0.05  # Below this |u|, f is its series u²/2! − u³/3! + ... up to u⁹, which is exact in float64.
SERIES = tuple((-1) ** k / math.factorial(k) for k in range(9, 1, -1))


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. It is differentiable twice, backward and forward."""
    dtype = widest_dtype(streams)
    logits_RNV = [logits.to(dtype) for logits in streams]
    if targets is None:
        ce_SN = logits_RNV[0].new_zeros(students, len(logits_RNV[0]))
    else:
        ignored_N1 = (targets == ignore_index)[:, None]
        logits_RNV = [logits.masked_fill(ignored_N1, 0) for logits in logits_RNV]  # They may hold anything there.
        ce_SN = torch.stack(
            [F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none") for z in logits_RNV[:students]]
        )

    def divergence_from(i: int, j: int) -> Tensor:
        if j == i:
            return torch.zeros_like(ce_SN[0])
        return _divergence(*_distributions(logits_RNV[i], logits_RNV[j].detach(), temperature), divergence)

    kl_RN = [torch.stack([divergence_from(i, j) for j in range(len(streams))]) for i in range(students)]
    return ce_SN, torch.stack(kl_RN)


@torch.no_grad()
def loss_and_grad(
    logits_RNV: Sequence[Tensor], spec: LossSpec, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Computes per-token losses, and the gradient of each student's weighted sum of them, without autograd.

    Args:
        logits_RNV: R tensors [N, V], the students' first, fp32 or float64.
        spec: Its weights have the logits' dtype.
        wanted: S flags, which say whose gradients to compute.

    Returns:
        ce [S, N] and kl [S, R, N] (None without `kl_weight`) in nats, unweighted; S gradients [N, V], None if unwanted.
    """
    label_N1 = torch.where(spec.ce_rows, spec.targets, 0)[:, None]
    ce_SN = logits_RNV[0].new_zeros(len(wanted), len(spec.targets))
    kl_SRN = None if spec.kl_weight is None else ce_SN.new_zeros(*spec.kl_weight.shape, len(spec.targets))
    gradients: list[Tensor | None] = [None] * len(wanted)
    for i, learner_NV in enumerate(logits_RNV[: len(wanted)]):
        ce_N = F.cross_entropy(learner_NV, label_N1[:, 0], reduction="none")
        ce_SN[i] = torch.where(spec.ce_rows, ce_N, 0)
        if wanted[i]:
            ce_gradient_NV = torch.softmax(learner_NV, -1)
            ce_gradient_NV.scatter_add_(1, label_N1, -torch.ones_like(ce_N)[:, None])
            gradients[i] = _scale_rows(ce_gradient_NV, spec.ce_weight[i] * spec.ce_rows)
        for j, peer_NV in enumerate(logits_RNV):
            if kl_SRN is None or spec.kl_weight is None or j == i:
                continue
            pair = _distributions(learner_NV, peer_NV, spec.temperature)
            kl_SRN[i, j] = torch.where(spec.kl_rows, _divergence(*pair, spec.divergence), 0)
            if (gradient_NV := gradients[i]) is not None:
                weight_N = spec.temperature * spec.kl_weight[i, j] * spec.kl_rows  # T² · d (logits / T) / d logits
                gradient_NV += _scale_rows(_divergence_gradient(*pair, spec.divergence), weight_N)
    return ce_SN, kl_SRN, gradients


def _scale_rows(gradient_NV: Tensor, weight_N: Tensor) -> Tensor:
    """Returns weight · gradient, and 0 where the weight is 0 even if the gradient does not exist."""
    return gradient_NV.mul_(weight_N[:, None]).masked_fill_((weight_N == 0)[:, None], 0)


def widest_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """Returns fp32, or float64 if any of the tensors has it."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None], torch.float32)


def _distributions(learner_NV: Tensor, peer_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p and q, the learner's and the peer's softmax(logits / T), and u = log p − log q, all [N, V]."""
    p_lse_N1 = torch.logsumexp(learner_NV / temperature, -1, keepdim=True)
    q_lse_N1 = torch.logsumexp(peer_NV / temperature, -1, keepdim=True)
    p = torch.exp(learner_NV / temperature - p_lse_N1)
    q = torch.exp(peer_NV / temperature - q_lse_N1)
    both_zero = learner_NV.isneginf() & peer_NV.isneginf()
    difference = torch.where(both_zero, 0.0, learner_NV - peer_NV)
    return p, q, difference / temperature - (p_lse_N1 - q_lse_N1)


def _divergence(p: Tensor, q: Tensor, u: Tensor, divergence: str) -> Tensor:
    """Returns the learner's divergence from its peer [N], in nats. For the arguments see `_distributions`."""
    if divergence == "forward":
        return _kl(q, p, -u)
    if divergence == "reverse":
        return _kl(p, q, u)
    mean = (p + q) / 2
    return (_kl(q, mean, _log_ratio_to_mean(-u)) + _kl(p, mean, _log_ratio_to_mean(u))) / 2


def _divergence_gradient(p: Tensor, q: Tensor, u: Tensor, divergence: str) -> Tensor:
    """Returns the derivative of `_divergence` with respect to the learner's logits / T, [N, V], the peer constant.

    It is p − q for "forward", p·(u − E[u]) for "reverse" and ½·p·(v − E[v]) for "jsd", where v = log p − log m,
    m = (p + q) / 2, and E is the mean under p.
    """
    if divergence == "forward":
        return p - q
    ratio = u if divergence == "reverse" else _log_ratio_to_mean(u) / 2
    weighted_ratio = torch.where(p == 0, 0, p * ratio)
    return weighted_ratio - p * weighted_ratio.sum(-1, keepdim=True)


def _kl(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Returns KL(p ‖ q) over the last dimension, given u = log p − log q.

    Every branch is finite even where it is not taken, because autograd multiplies its derivative by 0 there.
    """
    u = torch.where(p == 0, 0.0, u)
    is_near = u.abs() < SERIES_BOUND
    u_near = torch.where(is_near, u, 0.0)
    series = torch.zeros_like(u_near)
    for coefficient in SERIES:
        series = series * u_near + coefficient
    above = u.clamp(min=-1)
    f = torch.where(is_near, series * u_near * u_near, above + torch.expm1(-above))
    term = torch.where(u < -1, p * (u - 1) + q, p * f)  # e^{−u} may overflow where p·e^{−u} = q does not.
    return torch.where(p == 0, q, term).sum(-1)


def _log_ratio_to_mean(u: Tensor) -> Tensor:
    """Returns log p − log m, m = (p + q) / 2, given u = log p − log q.

    It is −log((1 + e^{−u}) / 2), computed to full precision near u = 0.
    """
    below = u < -40
    safe_u = torch.where(below, 0.0, u)
    return torch.where(below, u + LOG_2, -torch.log1p(torch.expm1(-safe_u) / 2))
