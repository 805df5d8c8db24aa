"""Cross-entropy on the held-out split.

N tokens, S students.
"""

from collections.abc import Sequence

import torch

from engine.data.batches import IGNORED, HeldOutData
from engine.evaluation.scoring import project
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime


def validation_losses(
    cohort: Cohort, data: HeldOutData, runtime: Runtime, omega: Sequence[float] | None = None
) -> list[float]:
    """Mean cross-entropy, nats per token, over the whole of `data`: each student's and, where there are several, last
    their ensemble's, weighted by ω (None: alike); a collective call."""
    totals = torch.zeros(len(cohort) + (len(cohort) > 1) + 1, dtype=torch.float64, device=runtime.device)
    with cohort.evaluating():
        for batch in data.batches():
            hidden = [student.body(batch) for student in cohort]
            valid_N = (batch.targets_N != IGNORED).nonzero().squeeze(1)
            with cohort.gathered_heads():
                streams = [student.project(hidden_ND) for student, hidden_ND in zip(cohort, hidden, strict=True)]
                log_prob_SN = project(streams, valid_N, batch.targets_N[valid_N], omega)
            totals[:-1] -= log_prob_SN.sum(dim=1, dtype=torch.float64)
            totals[-1] += len(valid_N)
    *sums, tokens = runtime.all_reduce_sum(totals)
    return [total / tokens for total in sums]
