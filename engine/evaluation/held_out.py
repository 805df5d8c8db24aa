"""Cross-entropy on the held-out split.

N tokens, S students.
"""

from collections.abc import Sequence

import torch

from engine.data.batches import IGNORED, HeldOutData
from engine.evaluation.log_probabilities import target_log_probabilities
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime


def validation_losses(
    cohort: Cohort, data: HeldOutData, runtime: Runtime, omega: Sequence[float] | None = None
) -> list[float]:
    """Returns the mean cross-entropy over all of `data`, in nats per token; a collective call.

    It is each student's and, where there are several, last that of their ensemble, weighted by ω [S] (None: equally).
    """
    sums = torch.zeros(len(cohort) + (len(cohort) > 1) + 1, dtype=torch.float64, device=runtime.device)
    with cohort.evaluating():
        for batch in data.batches():
            valid_N = (batch.targets_N != IGNORED).nonzero().squeeze(1)
            with cohort.streams(batch) as streams:
                log_prob_SN = target_log_probabilities(streams, valid_N, batch.targets_N[valid_N], omega)
            sums[:-1] -= log_prob_SN.sum(dim=1, dtype=torch.float64)
            sums[-1] += len(valid_N)
    *losses, tokens = runtime.all_reduce_sum(sums)
    return [loss / tokens for loss in losses]
