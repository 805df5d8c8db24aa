"""Divergence from teachers of whom only the most probable tokens are known, the rest as one bucket.

With b(v) the bucket of token v (one for each of the k kept tokens, one for all others), P the teacher's k + 1 bucket
probabilities and Q_b = Σ_{v: b(v)=b} q_v the student's, q = softmax(s / T), the divergences are those of
`kernels.ensemble_kl` between P and Q. So KL(P ‖ Q) = Σ_{b≤k} P_b (log P_b − log q_b) + P_t (log P_t − log Q_t), the
student's tail Q_t being all that is not kept: a lower bound of the KL over the whole vocabulary, by the log-sum
inequality. With ∂Q_b/∂s_v = q_v (1[b(v) = b] − Q_b) / T the gradient of T²·divergence with respect to s_v is T·q_v·g,

    forward  g = 1 − P_b(v) / Q_b(v)
    reverse  g = u_b(v) − KL(Q ‖ P),                u = log Q − log P
    jsd      g = ½ (w_b(v) − KL(Q ‖ M)),            w = log Q − log M, M = (P + Q) / 2

Q_t is summed over the tokens outside, never 1 − Σ q: that would cancel where the student is sure.

Shapes: N tokens, V vocabulary, k kept, S students, R streams; n tokens of a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.reference import kl_divergence, log_ratio_to_mean
from kernels.ops.linear_ensemble_kl import Projected, TopK

Kept = list[tuple[int, TopK]]  # with the stream each is


def split(
    students: Sequence[Projected], teachers: Sequence[Projected | TopK]
) -> tuple[list[Projected], list[int], Kept]:
    """The streams that have logits, their numbers among the R, and the other teachers."""
    streams = list(enumerate([*students, *teachers]))
    dense = [(r, stream) for r, stream in streams if isinstance(stream, Projected)]
    kept = [(r, stream) for r, stream in streams if isinstance(stream, TopK)]
    return [stream for _, stream in dense], [r for r, _ in dense], kept


def losses_and_gradients(
    logits_SnV: Sequence[Tensor],
    kept: Kept,
    spec: LossSpec,
    rows: slice,
    kl_SRN: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The students' divergences from the `kept` teachers in some rows into kl [S, R, N], and what those add to the
    gradients of the students' logits, weighted: per student [n, V], None where not wanted or nothing. Without
    `kl_weight` and kl none is kept."""
    gradients: list[Tensor | None] = []
    for i, (logits_nV, want) in enumerate(zip(logits_SnV, wanted, strict=True)):
        gradient = None
        for r, (log_prob_Nk, index_Nk, tail_N) in kept:
            assert spec.kl_weight is not None
            assert kl_SRN is not None
            kl_rows = spec.kl_rows[rows]
            weight_n = spec.kl_weight[i, r] * kl_rows
            top = log_prob_Nk[rows].to(logits_nV.dtype), index_Nk[rows].long(), tail_N[rows].to(logits_nV.dtype)
            kl_n, own_nV = _one(logits_nV, *top, weight_n, spec.temperature, spec.divergence, want)
            kl_SRN[i, r, rows] = torch.where(kl_rows, kl_n, 0)
            if own_nV is not None:
                gradient = own_nV if gradient is None else gradient.add_(own_nV)
        gradients.append(gradient)
    return gradients


def _one(
    logits_nV: Tensor,
    log_prob_nk: Tensor,
    index_nk: Tensor,
    tail_n: Tensor,
    weight_n: Tensor,
    temperature: float,
    divergence: str,
    want: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence [n], and its gradient [n, V], times T² and the weight, where wanted."""
    scaled_nV = logits_nV if temperature == 1 else logits_nV / temperature
    q_nV = torch.softmax(scaled_nV, -1)
    lse_n1 = torch.logsumexp(scaled_nV, -1, keepdim=True)
    q_nk = q_nV.gather(1, index_nk)
    log_q_nk = scaled_nV.gather(1, index_nk) - lse_n1
    q_nV.scatter_(1, index_nk, 0)
    q_tail_n1 = q_nV.sum(-1, keepdim=True)

    p = torch.cat([log_prob_nk.exp(), tail_n[:, None]], 1)
    log_p = torch.cat([log_prob_nk, tail_n[:, None].log()], 1)
    q, log_q = torch.cat([q_nk, q_tail_n1], 1), torch.cat([log_q_nk, q_tail_n1.log()], 1)
    u = torch.where((p == 0) & (q == 0), 0, log_q - log_p)  # of the n × (k + 1) buckets
    if divergence == "forward":
        kl_n, q_g = kl_divergence(p, q, -u), q - p
    elif divergence == "reverse":
        kl_n = kl_divergence(q, p, u)
        q_g = torch.where(q > 0, q * (u - kl_n[:, None]), 0)
    else:
        mean, w = (p + q) / 2, log_ratio_to_mean(u)
        own_n = kl_divergence(q, mean, w)
        kl_n = (kl_divergence(p, mean, log_ratio_to_mean(-u)) + own_n) / 2
        q_g = torch.where(q > 0, q * (w - own_n[:, None]) / 2, 0)
    if not want:
        return kl_n, None
    factor_n1 = (temperature * weight_n)[:, None]
    q_g = torch.where(factor_n1 == 0, 0, factor_n1 * q_g)  # nothing even if the divergence is infinite
    # Shares of the tail first: g itself, about −P_t / Q_t, may overflow.
    shares_nV = q_nV.div_(torch.where(q_tail_n1 == 0, 1, q_tail_n1))
    return kl_n, shares_nV.mul_(q_g[:, -1:]).scatter_(1, index_nk, q_g[:, :-1])
