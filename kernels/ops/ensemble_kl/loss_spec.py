"""The weighted sum of losses that the students minimise on N tokens.

Shapes: N tokens, S students, R streams.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossSpec(NamedTuple):
    """Student i's loss is Σ_n [ce_weight[i]·CE_i,n + T²·Σ_{j≠i} kl_weight[i, j]·KL_ij,n], over its active rows.

    targets: [N] int64. Rows outside `ce_rows` may hold anything.
    ce_weight: [S]. kl_weight: [S, R], whose diagonal is not read; None: no divergence is computed.
    ce_rows, kl_rows: [N] bool, the rows in which CE and KL count. Elsewhere they and their gradients are 0.
    temperature: T, of the divergences. divergence: "forward", "reverse" or "jsd".
    """

    targets: Tensor
    ce_weight: Tensor
    kl_weight: Tensor | None
    ce_rows: Tensor
    kl_rows: Tensor
    temperature: float
    divergence: str

    @property
    def active_rows(self) -> Tensor:
        """[N] bool, the rows in which any loss counts."""
        return self.ce_rows if self.kl_weight is None else self.ce_rows | self.kl_rows

    def for_rows(self, rows: slice) -> "LossSpec":
        """Returns the spec of these tokens alone."""
        return self._replace(targets=self.targets[rows], ce_rows=self.ce_rows[rows], kl_rows=self.kl_rows[rows])

    def normalized(self, normalizer: int | Tensor, dtype: torch.dtype) -> "LossSpec":
        """Returns the spec with its weights in this dtype and divided by the normalizer."""
        return self._replace(
            ce_weight=self.ce_weight.to(dtype) / normalizer,
            kl_weight=None if self.kl_weight is None else self.kl_weight.to(dtype) / normalizer,
        )

    def total_losses(self, ce_SN: Tensor, kl_SRN: Tensor | None) -> Tensor:
        """Returns each student's loss [S], given the losses per token."""
        losses_S = _weighted(self.ce_weight, ce_SN.sum(-1))
        if self.kl_weight is not None and kl_SRN is not None:
            losses_S += self.temperature**2 * _weighted(self.kl_weight, kl_SRN.sum(-1)).sum(-1)
        return losses_S


def _weighted(weight: Tensor, loss: Tensor) -> Tensor:
    """Returns weight · loss, and 0 where the weight is 0 even if the loss is infinite."""
    return torch.where(weight == 0, 0, weight * loss)
