from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.data.batches import Batch, HeldOutData, TokenFile
from engine.evaluation.held_out import validation_losses
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime

LENGTH, CHUNKS = 12, 7  # the last chunk predicts three tokens
VOCAB_SIZE = 360


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    ids = np.random.default_rng(0).integers(VOCAB_SIZE, size=(CHUNKS - 1) * LENGTH + 4)
    ids.astype("<u2").tofile(tmp_path / "validation.bin")
    return TokenFile(tmp_path / "validation.bin", "<u2", LENGTH)


def data(file: TokenFile, tokens: int, batch: int, rank: int = 0, world_size: int = 1) -> HeldOutData:
    return HeldOutData(file, tokens=tokens, batch=batch, rank=rank, world_size=world_size, device=torch.device("cpu"))


def naive_losses(cohort: Cohort, file: TokenFile, chunks: int) -> list[float]:
    """Chunk by chunk, full logits in float64; the last predicts what is left, with a whole sequence read. The last loss
    is that of the mean of all logits."""
    losses = []
    for students in ([cohort[0]], [cohort[1]], cohort):
        nats, count = 0.0, 0
        for chunk in (i * CHUNKS // chunks for i in range(chunks)):
            end = min((chunk + 1) * LENGTH, len(file.tokens) - 1)
            ids = torch.from_numpy(file.tokens[end - LENGTH : end + 1].astype(np.int64))
            with torch.no_grad():
                rows = [(s.model(ids[None, :-1]) @ s.model.head.T).double() for s in students]
                logits = torch.stack(rows).mean(0)
            new = end - chunk * LENGTH
            nats += F.cross_entropy(logits[-new:], ids[-new:], reduction="sum").item()
            count += new
        losses.append(nats / count)
    return losses


@pytest.mark.parametrize(("tokens", "chunks"), [(10**9, CHUNKS), (5 * LENGTH + 3, 5)])
def test_losses_equal_those_of_full_logits(
    cohort: Cohort, runtime: Runtime, file: TokenFile, tokens: int, chunks: int
) -> None:
    expected = naive_losses(cohort, file, chunks)
    assert min(abs(a - b) for a, b in pairwise(expected)) > 1e-2
    for batch in (1, 2, 100):  # among them a last batch that is smaller than the others
        assert validation_losses(cohort, data(file, tokens, batch), runtime) == pytest.approx(expected, rel=1e-6)
    for student in cohort:
        assert student.model.training
        assert all(parameter.grad is None for parameter in student.model.parameters())


def test_rounds_without_sequences_count_for_nothing(cohort: Cohort, runtime: Runtime, file: TokenFile) -> None:
    class AllRanks:
        def batches(self) -> Iterator[Batch]:
            for rank in range(3):
                yield from data(file, 10**9, 1, rank, 3).batches()  # 7 chunks: two ranks go without in the third round

    ranks: Any = AllRanks()
    assert len(list(ranks.batches())) == 9
    expected = naive_losses(cohort, file, CHUNKS)
    assert validation_losses(cohort, ranks, runtime) == pytest.approx(expected, rel=1e-6)


def test_evaluation_is_not_counted_as_training_time(cohort: Cohort, runtime: Runtime, file: TokenFile) -> None:
    for student in cohort:
        student.clock.take()
    validation_losses(cohort, data(file, 10**9, 4), runtime)
    assert [student.clock.take() for student in cohort] == [0.0, 0.0]
    cohort[0].body(next(data(file, 1, 1).batches()))
    assert cohort[0].clock.take() > 0
