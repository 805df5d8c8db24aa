"""Cross-entropy on the held-out split.

N tokens, S students.
"""

import torch

from engine.cohort import Cohort
from engine.data import IGNORED, HeldOutData
from engine.runtime import Runtime
from kernels import linear_ensemble_kl


def validation_losses(cohort: Cohort, data: HeldOutData, runtime: Runtime) -> list[float]:
    """Each student's mean cross-entropy, nats per token, over the whole of `data`; a collective call."""
    ones_S = torch.ones(len(cohort), device=runtime.device)
    totals = torch.zeros(len(cohort) + 1, dtype=torch.float64, device=runtime.device)
    with cohort.evaluating():
        for batch in data.batches():
            streams = [student.project(student.body(batch)) for student in cohort]
            result = linear_ensemble_kl(
                streams, [], batch.targets_N, ce_weight=ones_S, kl_weight=None, normalizer=1, ignore_index=IGNORED
            )
            totals[:-1] += result.ce.sum(dim=1, dtype=torch.float64)
            totals[-1] += (batch.targets_N != IGNORED).sum()
    *sums, tokens = runtime.agree(totals)
    return [total / tokens for total in sums]
