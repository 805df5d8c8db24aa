"""Every cross-entropy and every divergence between streams of logits over the same tokens.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels import dispatch
from kernels.checks import check_options, check_targets


class EnsembleKL(NamedTuple):
    """Per-token losses in nats, fp32 (float64 where a stream is).

    ce: [S, N], each student's cross-entropy, at temperature 1.
    kl: [S, R, N], the divergence between student i and stream j, of the tempered distributions, without the factor T².
    """

    ce: Tensor
    kl: Tensor


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    *,
    students: int,
    temperature: float = 1.0,
    divergence: str = "forward",
    ignore_index: int = -100,
) -> EnsembleKL:
    """The cross-entropy of every student and its divergence from every other stream, token by token.

    With p_i = softmax(logits_i / T) and m = (p_i + p_j) / 2, kl[i, j] is

        "forward"  KL(p_j ‖ p_i), distillation (Hinton et al. 2015) and mutual learning (Zhang et al. 2018, eq. 5-7)
        "reverse"  KL(p_i ‖ p_j)
        "jsd"      ½ KL(p_j ‖ m) + ½ KL(p_i ‖ m)

    and kl[i, i] = 0. The gradient reaches stream i < S through its role as the learner i alone: in kl[i, j] stream j is
    a constant, as in mutual learning, where each network descends its own loss. Teachers receive none. Differentiable
    once; the reference, twice.

    A logit of −inf is a probability of 0: it contributes 0 where both streams have it, and makes KL(p ‖ q) +inf where
    only q has it. Where kl is +inf, the forward and Jensen-Shannon gradients are still finite; the reverse one does not
    exist.

    Args:
        streams: R tensors [N, V] of logits, the S students' first; floating point, on one device. 1 ≤ S ≤ R ≤ 8.
        targets: [N] int64 token ids in [0, V), or `ignore_index`: both ce and kl are 0 in such a row, and so is its
            gradient. None: every row counts in kl, and ce is 0.
        students: S.
        temperature: T > 0, of the divergences.
        divergence: "forward", "reverse" or "jsd".
        ignore_index: the target that marks a row as ignored.

    Returns:
        EnsembleKL(ce [S, N], kl [S, R, N]).

    Raises:
        ValueError: any of the above not met.
    """
    check_options(students, len(streams), temperature, divergence)
    first = streams[0]
    for r, logits in enumerate(streams):
        if logits.ndim != 2 or logits.shape != first.shape or not logits.is_floating_point():
            raise ValueError(
                f"stream {r} is {tuple(logits.shape)} {logits.dtype}: expected floating-point [N, V], one shape for all"
                f" (stream 0 has {tuple(first.shape)}); streams must share tokens and vocabulary"
            )
        if logits.device != first.device:
            raise ValueError(f"stream {r} is on {logits.device}: expected {first.device}, as stream 0; move it")
    if targets is not None:
        check_targets(targets, len(first), first.shape[1], ignore_index)
    run = dispatch.implementation("ensemble_kl", first).ensemble_kl
    return EnsembleKL(*run(streams, targets, students, temperature, divergence, ignore_index))
