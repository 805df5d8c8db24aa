"""What the students are asked for on N tokens: the sum of losses whose gradients are computed along with it.

Shapes: N tokens, S students, R streams.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """Student i's sum, over the rows that count: Σ_n [ce_weight[i]·CE_i,n + T²·Σ_{j≠i} kl_weight[i, j]·KL_ij,n].

    targets: [N] int64; rows outside `ce_rows` may hold anything.
    ce_weight: [S]. kl_weight: [S, R], whose diagonal is not read; None: no divergence is computed.
    ce_rows, kl_rows: [N] bool, the rows in which CE and KL count; in others they and their gradients are 0.
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
    def counted(self) -> Tensor:
        """[N] bool, the rows in which anything counts."""
        return self.ce_rows if self.kl_weight is None else self.ce_rows | self.kl_rows

    def on(self, rows: slice) -> "Objective":
        """Some of the tokens."""
        return self._replace(targets=self.targets[rows], ce_rows=self.ce_rows[rows], kl_rows=self.kl_rows[rows])

    def among(self, streams: Sequence[int]) -> "Objective":
        """Some of the streams; one alone diverges from nothing."""
        return self._replace(
            kl_weight=None if self.kl_weight is None or len(streams) == 1 else self.kl_weight[:, streams]
        )

    def over(self, normalizer: int | Tensor, dtype: torch.dtype) -> "Objective":
        """Divided by the normalizer, its weights in this dtype."""
        return self._replace(
            ce_weight=self.ce_weight.to(dtype) / normalizer,
            kl_weight=None if self.kl_weight is None else self.kl_weight.to(dtype) / normalizer,
        )

    def sums(self, ce_SN: Tensor, kl_SRN: Tensor | None) -> Tensor:
        """[S], of losses per token."""
        sums = _weighted(self.ce_weight, ce_SN.sum(-1))
        if self.kl_weight is not None and kl_SRN is not None:
            sums += self.temperature**2 * _weighted(self.kl_weight, kl_SRN.sum(-1)).sum(-1)
        return sums


def _weighted(weight: Tensor, loss: Tensor) -> Tensor:
    """Their product; 0 where the weight is 0, even if the loss is infinite."""
    return torch.where(weight == 0, 0, weight * loss)
