"""Divergences from teachers of which only the k most probable tokens are known, and all others as one bucket.

Token v is in bucket b(v): each of the k tokens has its own, and all others share the tail. P is the teacher's k + 1
bucket probabilities, and Q_b = Σ_{v: b(v)=b} q_v the student's, with q = softmax(s / T). The divergences are those of
`kernels.ensemble_kl` between P and Q. So KL(P ‖ Q) = Σ_{b≤k} P_b (log P_b − log q_b) + P_t (log P_t − log Q_t), where
Q_t is the student's tail. By the log-sum inequality it is a lower bound of the KL over the whole vocabulary. Because
∂Q_b/∂s_v = q_v (1[b(v) = b] − Q_b) / T, the gradient of T²·divergence with respect to s_v is T·q_v·g, with

    forward  g = 1 − P_b(v) / Q_b(v)
    reverse  g = u_b(v) − KL(Q ‖ P),                u = log Q − log P
    jsd      g = ½ (w_b(v) − KL(Q ‖ M)),            w = log Q − log M, M = (P + Q) / 2

Q_t is summed over the tokens of the tail, and not computed as 1 − Σ q, which cancels where the student is confident.

Shapes: N tokens, V vocabulary, k known tokens, S students, R streams; n tokens of a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.reference import divergence_gradient, divergence_of, scale_rows
from kernels.ops.linear_ensemble_kl import Projected, TopK

TopKTeachers = list[tuple[int, TopK]]  # Each with its number among the R streams.


def split(
    students: Sequence[Projected], teachers: Sequence[Projected | TopK]
) -> tuple[list[Projected], list[int], TopKTeachers]:
    """Returns the streams that have logits, their numbers among the R, and the teachers known by their top k."""
    streams = list(enumerate([*students, *teachers]))
    dense = [(r, stream) for r, stream in streams if isinstance(stream, Projected)]
    top_k_teachers = [(r, stream) for r, stream in streams if isinstance(stream, TopK)]
    return [stream for _, stream in dense], [r for r, _ in dense], top_k_teachers


def losses_and_gradients(
    logits_SnV: Sequence[Tensor],
    teachers: TopKTeachers,
    spec: LossSpec,
    rows: slice,
    kl_SRN: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Writes the students' divergences from these teachers, in these rows, to kl [S, R, N].

    Returns:
        For each student, the gradient [n, V] of its weighted divergences with respect to its logits, None if unwanted
        or without teachers. Without `kl_weight` there are no teachers, and kl may be None.
    """
    gradients: list[Tensor | None] = []
    for i, (logits_nV, want) in enumerate(zip(logits_SnV, wanted, strict=True)):
        gradient = None
        for r, (log_prob_Nk, index_Nk, tail_N) in teachers:
            assert spec.kl_weight is not None
            assert kl_SRN is not None
            kl_rows = spec.kl_rows[rows]
            weight_n = spec.kl_weight[i, r] * kl_rows
            top = log_prob_Nk[rows].to(logits_nV.dtype), index_Nk[rows].long(), tail_N[rows].to(logits_nV.dtype)
            kl_n, d_nV = _loss_and_gradient(logits_nV, *top, weight_n, spec.temperature, spec.divergence, want)
            kl_SRN[i, r, rows] = torch.where(kl_rows, kl_n, 0)
            if d_nV is not None:
                gradient = d_nV if gradient is None else gradient.add_(d_nV)
        gradients.append(gradient)
    return gradients


def _loss_and_gradient(
    logits_nV: Tensor,
    log_prob_nk: Tensor,
    index_nk: Tensor,
    tail_n: Tensor,
    weight_n: Tensor,
    temperature: float,
    divergence: str,
    want: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the divergence [n] from one teacher and, if wanted, its gradient [n, V] times T² and the weight."""
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
    u = torch.where((p == 0) & (q == 0), 0, log_q - log_p)  # [n, k + 1], as everything below.
    kl_n = divergence_of(q, p, u, divergence)
    if not want:
        return kl_n, None
    d_buckets = scale_rows(divergence_gradient(q, p, u, divergence), temperature * weight_n)
    # The division by Q_t comes first, because g itself, which is about −P_t / Q_t, may overflow.
    shares_nV = q_nV.div_(torch.where(q_tail_n1 == 0, 1, q_tail_n1))
    return kl_n, shares_nV.mul_(d_buckets[:, -1:]).scatter_(1, index_nk, d_buckets[:, :-1])
