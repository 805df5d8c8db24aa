"""Cross-entropies of students and divergences between streams of logits over the same tokens.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels import dispatch
from kernels.checks import check_options, check_targets


class EnsembleKL(NamedTuple):
    """Per-token losses in nats, fp32 (float64 where a stream is).

    ce: [S, N], each student's cross-entropy at temperature 1.
    kl: [S, R, N], student i's divergence from stream j, between the tempered distributions, without the factor T².
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
    """Computes the cross-entropy of every student and its divergence from every other stream, for each token.

    With p_i = softmax(logits_i / T) and m = (p_i + p_j) / 2, kl[i, j] is

        "forward"  KL(p_j ‖ p_i), distillation (Hinton et al. 2015) and mutual learning (Zhang et al. 2018, eq. 5-7)
        "reverse"  KL(p_i ‖ p_j)
        "jsd"      ½ KL(p_j ‖ m) + ½ KL(p_i ‖ m)

    and kl[i, i] = 0. Stream i < S receives gradients only as learner i: in kl[i, j], stream j is a constant, as in
    mutual learning, where each network descends its own loss. Teachers receive none. The op is differentiable once, and
    twice by the reference backend.

    A logit of −inf is a probability of 0. It contributes 0 where both streams have it, and makes KL(p ‖ q) +inf where
    only q has it. Where kl is +inf, the forward and Jensen-Shannon gradients are still finite, but the reverse one does
    not exist.

    Args:
        streams: R tensors [N, V] of logits, the S students' first, floating point, on one device. 1 ≤ S ≤ R ≤ 8.
        targets: [N] int64 token ids in [0, V), or `ignore_index`, which makes ce, kl and the gradients of the row 0.
            None: every row counts in kl, and ce is 0.
        students: S.
        temperature: T > 0, of the divergences.
        divergence: "forward", "reverse" or "jsd".
        ignore_index: The target of rows to ignore.

    Raises:
        ValueError: An argument is not as described.
    """
    check_options(students, len(streams), temperature, divergence)
    first = streams[0]
    for r, logits in enumerate(streams):
        if logits.ndim != 2 or logits.shape != first.shape or not logits.is_floating_point():
            raise ValueError(
                f"stream {r} is {tuple(logits.shape)} {logits.dtype}: expected floating-point [N, V] and stream 0's"
                f" shape {tuple(first.shape)}; pass streams of the same tokens and vocabulary"
            )
        if logits.device != first.device:
            raise ValueError(f"stream {r} is on {logits.device}: expected stream 0's device, {first.device}; move it")
    if targets is not None:
        check_targets(targets, len(first), first.shape[1], ignore_index)
    implementation = dispatch.implementation("ensemble_kl", first).ensemble_kl
    return EnsembleKL(*implementation(streams, targets, students, temperature, divergence, ignore_index))
