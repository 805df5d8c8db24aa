"""`ensemble_kl` in plain torch: the definition, and `loss_and_grad`, which computes losses and gradients in one sweep.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.

Both compute KL(p ‖ q) as Σ_v p·f(u), where u = log p − log q is formed from differences of logits, and
f(u) = u − 1 + e^{−u} ≥ 0. As Σp = Σq = 1 this equals Σ p·u; but each term is of second order in u, so terms do not
cancel one another, and an error that a whole row shares (its log-sum-exp's) drops out to first order. Near u = 0, f is
its power series. Where p = 0, p·f(u) is its limit q, not 0.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops.ensemble_kl.objective import Objective

LOG_2 = math.log(2)

NEAR = 0.05  # below this |u|, the definition takes the series of f: u²/2! − u³/3! + ... to u⁹, exact in float64
SERIES = tuple((-1) ** k / math.factorial(k) for k in range(9, 1, -1))

EDGE = 0.25  # below this |u|, the sweep takes the series of f
HALF_ORDER = {torch.float32: 3, torch.float64: 6}  # to u⁷ and u¹³: truncated at 1e-8 and 1e-17 of f

FLOOR = -1e38  # stands for −inf in the sweep, so that differences of logits are never NaN; in fp32's range
INFINITE = 1e12  # no loss of finite logits comes near; a token's loss above this met FLOOR


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. Differentiable twice, backward and forward."""
    dtype = widest(streams)
    logits_RNV = [logits.to(dtype) for logits in streams]
    if targets is None:
        ce_SN = logits_RNV[0].new_zeros(students, len(logits_RNV[0]))
    else:
        ignored_N1 = (targets == ignore_index)[:, None]  # whose logits may be anything: they are not looked at
        logits_RNV = [logits.masked_fill(ignored_N1, 0) for logits in logits_RNV]
        ce_SN = torch.stack(
            [F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none") for z in logits_RNV[:students]]
        )

    itself_N = torch.zeros_like(ce_SN[0])
    kl_RN = [
        torch.stack(
            [
                itself_N if j == i else _divergence(logits_RNV[i], logits_RNV[j].detach(), temperature, divergence)
                for j in range(len(streams))
            ]
        )
        for i in range(students)
    ]
    return ce_SN, torch.stack(kl_RN)


def widest(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """fp32, or float64 where one of them is."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None], torch.float32)


def _divergence(learner_NV: Tensor, peer_NV: Tensor, temperature: float, divergence: str) -> Tensor:
    """[N], nats."""
    learner_lse_N1 = torch.logsumexp(learner_NV / temperature, -1, keepdim=True)
    peer_lse_N1 = torch.logsumexp(peer_NV / temperature, -1, keepdim=True)
    learner = torch.exp(learner_NV / temperature - learner_lse_N1)
    peer = torch.exp(peer_NV / temperature - peer_lse_N1)
    neither = learner_NV.isneginf() & peer_NV.isneginf()
    gap = torch.where(neither, 0.0, learner_NV - peer_NV)
    u = gap / temperature - (learner_lse_N1 - peer_lse_N1)  # log learner − log peer
    if divergence == "forward":
        return _kl(peer, learner, -u)
    if divergence == "reverse":
        return _kl(learner, peer, u)
    mean = (learner + peer) / 2
    return (_kl(peer, mean, _log_ratio_to_mean(-u)) + _kl(learner, mean, _log_ratio_to_mean(u))) / 2


def _kl(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension, given u = log p − log q. Every branch is finite where it is not taken, since
    autograd multiplies its derivative by 0.
    """
    u = torch.where(p == 0, 0.0, u)
    near = u.abs() < NEAR
    t = torch.where(near, u, 0.0)
    series = torch.zeros_like(t)
    for coefficient in SERIES:
        series = series * t + coefficient
    above = u.clamp(min=-1)
    f = torch.where(near, series * t * t, above + torch.expm1(-above))
    term = torch.where(u < -1, p * (u - 1) + q, p * f)  # as e^{−u} may overflow where p·e^{−u} = q does not
    return torch.where(p == 0, q, term).sum(-1)


def _log_ratio_to_mean(u: Tensor) -> Tensor:
    """log p − log m, m = (p + q) / 2, given u = log p − log q: −log((1 + e^{−u}) / 2), to full precision near 0."""
    below = u < -40
    safe = torch.where(below, 0.0, u)
    return torch.where(below, u + LOG_2, -torch.log1p(torch.expm1(-safe) / 2))


@torch.no_grad()
def loss_and_grad(
    logits_RNV: Sequence[Tensor], objective: Objective, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Per-token losses, and the gradient of every student's weighted sum of them, without autograd.

    With s the logits, p = softmax(s / T) and u = log p_i − log p_j, the gradient with respect to s_i is

        ce_weight[i]·(softmax(s_i) − onehot) + T·Σ_j kl_weight[i, j]·g_ij,
        forward  g_ij = p_i − p_j
        reverse  g_ij = p_i·(u − KL(p_i ‖ p_j))
        jsd      g_ij = ½ p_i·(v − KL(p_i ‖ m)),   v = log p_i − log m

    by differentiation (peers constant).

    Args:
        logits_RNV: R tensors [N, V], the students' first, fp32 or float64; −inf in them is overwritten.
        objective: its weights in the logits' dtype.
        wanted: S flags: which students' gradients to compute.

    Returns:
        ce [S, N] and kl [S, R, N] (None without `kl_weight`) in nats, unweighted; S gradients [N, V] or None.
    """
    targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, _ = objective
    students = len(wanted)
    for logits in logits_RNV:
        logits.clamp_(min=FLOOR)
    plain = [_softmax(logits) for logits in logits_RNV[:students]]

    label_N1 = torch.where(ce_rows, targets, 0)[:, None]
    ce_SN = torch.stack(
        [lse - logits.gather(1, label_N1).squeeze(1) for logits, (_, lse) in zip(logits_RNV, plain, strict=False)]
    )
    gradients: list[Tensor | None] = []
    for (p, _), weight, want in zip(plain, ce_weight, wanted, strict=True):
        weight_N1 = (weight * ce_rows)[:, None]
        weighted = p.mul_(weight_N1) if kl_weight is None else p * weight_N1  # the divergences need p itself
        gradients.append(weighted.scatter_add_(1, label_N1, -weight_N1) if want else None)

    kl_SRN = None
    if kl_weight is not None:
        if temperature == 1:
            tempered = plain + [_softmax(logits) for logits in logits_RNV[students:]]
        else:
            tempered = [_softmax((logits / temperature).clamp_(min=FLOOR)) for logits in logits_RNV]
        kl_SRN = _restore(_add_divergences(gradients, logits_RNV, tempered, kl_weight, objective), kl_rows)
    return _restore(ce_SN, ce_rows), kl_SRN, gradients


def _add_divergences(
    gradients: Sequence[Tensor | None],
    logits_RNV: Sequence[Tensor],
    tempered: Sequence[tuple[Tensor, Tensor]],
    kl_weight: Tensor,
    objective: Objective,
) -> Tensor:
    """kl [S, R, N]; adds its gradient to the students' in place. Each pair of streams is visited once."""
    (students, streams), kl_rows, temperature = kl_weight.shape, objective.kl_rows, objective.temperature
    kl_SRN = logits_RNV[0].new_zeros(students, streams, len(kl_rows))
    weight_SRN1 = temperature * kl_weight[:, :, None, None] * kl_rows[:, None]
    u, *scratch = logits_RNV[0].new_empty(5, *logits_RNV[0].shape)  # allocating anew for each pair costs page faults
    for i in range(students):
        p, p_lse = tempered[i]
        for j in range(i + 1, streams):
            q, q_lse = tempered[j]
            torch.sub(logits_RNV[i], logits_RNV[j], out=u)
            if temperature != 1:
                u.div_(temperature).clamp_(FLOOR, -FLOOR)
            u.sub_((p_lse - q_lse)[:, None])
            roles = [(i, j, p), (j, i, q)] if j < students else [(i, j, p)]  # learner, peer, learner's probabilities

            if objective.divergence == "jsd":
                v, w = _log_ratios_to_mean(u)
                mean = (p + q).mul_(0.5)
                p_to_mean, q_to_mean = (_kl_both_ways(ratio, own, mean, scratch)[0] for ratio, own in ((v, p), (w, q)))
                for (learner, peer, own), ratio, own_to_mean in zip(
                    roles, (v, w), (p_to_mean, q_to_mean), strict=False
                ):
                    kl_SRN[learner, peer] = (p_to_mean + q_to_mean) / 2
                    _add_expectation(gradients[learner], own, ratio, own_to_mean, weight_SRN1[learner, peer] / 2)
                continue

            p_to_q, q_to_p = _kl_both_ways(u, p, q, scratch)
            for (learner, peer, own), from_learner, to_learner in zip(
                roles, (p_to_q, q_to_p), (q_to_p, p_to_q), strict=False
            ):
                if objective.divergence == "forward":
                    kl_SRN[learner, peer] = to_learner
                else:
                    kl_SRN[learner, peer] = from_learner
                    ratio = u if learner == i else -u
                    _add_expectation(gradients[learner], own, ratio, from_learner, weight_SRN1[learner, peer])
    if objective.divergence == "forward":
        _add_differences(gradients, [p for p, _ in tempered], weight_SRN1)
    return kl_SRN


def _add_differences(gradients: Sequence[Tensor | None], p_RNV: Sequence[Tensor], weight_SRN1: Tensor) -> None:
    """gradient_i += Σ_j weight_ij · (p_i − p_j)."""
    for i, gradient in enumerate(gradients):
        peers = [j for j in range(len(p_RNV)) if j != i]
        if gradient is None or not peers:
            continue
        gradient.addcmul_(p_RNV[i], torch.stack([weight_SRN1[i, j] for j in peers]).sum(0))
        for j in peers:
            gradient.addcmul_(p_RNV[j], -weight_SRN1[i, j])


def _add_expectation(gradient: Tensor | None, p: Tensor, ratio: Tensor, kl: Tensor, weight_N1: Tensor) -> None:
    """gradient += weight · p · (ratio − kl); nothing where the weight is 0, even if the divergence is infinite."""
    if gradient is not None:
        kl_N1 = torch.where(weight_N1 == 0, 0, _infinite(kl)[:, None])
        gradient.addcmul_((ratio - kl_N1).mul_(p), weight_N1)


def _kl_both_ways(u: Tensor, p: Tensor, q: Tensor, scratch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and KL(q ‖ p), each [N], given u = log p − log q in [N, V]; `scratch`, 4 such tensors, is overwritten.

    With c = u clamped to ±EDGE, p·f(u) = p·(f(c) + u − c) + (q − p·e^{−c}). The last term is 0 within the edges, and
    its sign outside them is known, which gives the two clamped sums below: no branch, and no exponential to overflow.
    In the other direction u and c change sign, so that f's even part stays and its odd part is negated.
    """
    c, even, odd, square = scratch
    torch.clamp(u, -EDGE, EDGE, out=c)
    torch.mul(c, c, out=square)
    order = HALF_ORDER[c.dtype]
    torch.mul(square, 1 / math.factorial(2 * order), out=even)  # to become cosh c − 1
    torch.mul(square, -1 / math.factorial(2 * order + 1), out=odd)  # to become c − sinh c
    for k in range(order - 1, 0, -1):
        even.add_(1 / math.factorial(2 * k)).mul_(square)
        odd.sub_(1 / math.factorial(2 * k + 1)).mul_(square)
    odd.mul_(c).sub_(c.sub_(u))

    grow, shrink = math.exp(EDGE), math.exp(-EDGE)
    above = torch.sub(q, p, alpha=grow, out=c).clamp_(min=0).sum(-1)
    below = torch.sub(p, q, alpha=grow, out=c).clamp_(min=0).sum(-1)  # times e^EDGE
    p_to_q = torch.add(even, odd, out=c).mul_(p).sum(-1) + (above - shrink * below)
    q_to_p = even.sub_(odd).mul_(q).sum(-1) + (below - shrink * above)
    return p_to_q, q_to_p


def _log_ratios_to_mean(u: Tensor) -> tuple[Tensor, Tensor]:
    """log p − log m and log q − log m, m = (p + q) / 2, given u = log p − log q."""
    larger = u.abs().neg_().expm1_().mul_(0.5).log1p_().neg_()  # that of the larger of p and q
    return larger + u.clamp(max=0), larger - u.clamp(min=0)


def _softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp. The largest probability is 1 / Σ exp(logit − max), which saves a second sum."""
    p = torch.softmax(logits_NV, -1)
    return p, logits_NV.amax(-1) - p.amax(-1).log()


def _restore(loss: Tensor, rows: Tensor) -> Tensor:
    """Per-token losses [..., N]: 0 in rows that do not count, +inf where a −inf logit was met."""
    return torch.where(rows, _infinite(loss), 0)


def _infinite(loss: Tensor) -> Tensor:
    return torch.where(loss > INFINITE, math.inf, loss)
