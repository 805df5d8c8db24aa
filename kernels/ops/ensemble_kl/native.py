"""`ensemble_kl` by `native.cpp`.

Shapes: N tokens, V vocabulary, S students, R streams.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. Differentiable once, in one node for all students; backward reads the logits again."""
    return torch.ops.creche_native.ensemble_kl(list(streams), targets, students, temperature, divergence, ignore_index)


def loss_and_grad_(
    logits_RNV: Sequence[Tensor], spec: LossSpec, wanted: Sequence[bool], into: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """`loss_and_grad` of `reference.py` in one pass, but that gradients replace the logits of the `wanted` students.

    Args:
        into: per student where its gradient goes instead, [N, V] in any dtype; it may begin each row where the row of
            its logits begins, if it takes no more bytes.

    Returns:
        ce [S, N] and kl [S, R, N] (None without `kl_weight`), in nats, unweighted.
    """
    places = [place if want else None for place, want in zip(into or logits_RNV, wanted, strict=False)]
    ce_SN, kl_SRN = torch.ops.creche_native.ensemble_kl_loss_and_grad_(list(logits_RNV), places, *spec)
    return ce_SN, None if spec.kl_weight is None else kl_SRN
