"""Cross-entropy on the held-out split.

N tokens, S students.
"""

import torch
from torch import Tensor

from engine.cohort import Cohort
from engine.data import IGNORED, Batch, HeldOutData
from engine.runtime import Runtime
from kernels import linear_ensemble_kl


def token_losses(cohort: Cohort, batch: Batch) -> Tensor:
    """[S, N] fp32, each student's cross-entropy of each target in nats, 0 where it is IGNORED. Call under no_grad."""
    hidden = [student.body(batch) for student in cohort]
    ones_S = torch.ones(len(cohort), device=batch.targets_N.device)
    with cohort.heads():
        streams = [student.project(hidden_ND) for student, hidden_ND in zip(cohort, hidden, strict=True)]
        return linear_ensemble_kl(
            streams, [], batch.targets_N, ce_weight=ones_S, kl_weight=None, normalizer=1, ignore_index=IGNORED
        ).ce


def validation_losses(cohort: Cohort, data: HeldOutData, runtime: Runtime) -> list[float]:
    """Each student's mean cross-entropy, nats per token, over the whole of `data`; a collective call."""
    totals = torch.zeros(len(cohort) + 1, dtype=torch.float64, device=runtime.device)
    with cohort.evaluating():
        for batch in data.batches():
            totals[:-1] += token_losses(cohort, batch).sum(dim=1, dtype=torch.float64)
            totals[-1] += (batch.targets_N != IGNORED).sum()
    *sums, tokens = runtime.agree(totals)
    return [total / tokens for total in sums]
