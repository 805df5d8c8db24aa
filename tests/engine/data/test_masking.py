from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.batches import Batch, TrainingData
from engine.data.masking import MaskedFile, Masking

V, SPECIAL, MASK = 50, (0, 1, 2), 49
TEXT = np.random.default_rng(0).integers(V - 1, size=(64, 512)).astype(np.uint16)
CPU = torch.device("cpu")
MASKING = Masking(V, MASK, SPECIAL, seed=3)
Read = Callable[..., Batch]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Returns a function that reads rows of tokens from a file, as the sequences of these numbers."""

    def read(tokens_BL: np.ndarray, samples: Sequence[int], masking: Masking = MASKING) -> Batch:
        length = tokens_BL.shape[1]
        np.append(tokens_BL, 0).astype("<u2").tofile(tmp_path / "rows.bin")  # A file is longer than one sequence.
        file = MaskedFile(tmp_path / "rows.bin", "<u2", length, masking)
        return file.batch(range(0, tokens_BL.size, length), CPU, samples)

    return read


def test_of_fifteen_percent_eight_in_ten_are_masked_one_is_random_and_one_stays(read: Read) -> None:
    batch = read(TEXT, range(len(TEXT)))
    assert batch.rows_N is not None
    before = torch.from_numpy(TEXT.astype(np.int64)).flatten()
    after = batch.tokens_BL.flatten()
    assert torch.equal(batch.targets_N, before[batch.rows_N])
    others = torch.ones_like(before, dtype=torch.bool).index_fill(0, batch.rows_N, False)
    assert torch.equal(after[others], before[others]), "what is not predicted is seen as it is"

    ordinary = (~np.isin(TEXT, SPECIAL)).sum()
    assert len(batch.rows_N) / ordinary == pytest.approx(0.15, abs=0.01)
    shown, target = after[batch.rows_N], batch.targets_N
    shares = [x.double().mean().item() for x in (shown == MASK, shown == target, (shown != MASK) & (shown != target))]
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 46, 0.1 - 0.1 / 46], abs=0.02)


def test_special_tokens_are_neither_predicted_nor_drawn(read: Read) -> None:
    batch = read(TEXT, range(len(TEXT)))
    assert batch.rows_N is not None
    assert not np.isin(batch.targets_N, SPECIAL).any()
    assert not np.isin(batch.tokens_BL.flatten()[batch.rows_N], SPECIAL).any()
    nothing = read(np.zeros_like(TEXT[:1]), [5])
    assert nothing.targets_N.numel() == 0
    assert not nothing.tokens_BL.any()


def test_a_sequence_is_masked_alike_in_any_company_and_anew_in_every_epoch(read: Read) -> None:
    whole = read(TEXT[:8], range(8))
    alone = [read(TEXT[i : i + 1], [i], Masking(V, MASK, SPECIAL, seed=3)) for i in range(8)]
    assert torch.equal(whole.tokens_BL, torch.cat([batch.tokens_BL for batch in alone]))
    assert torch.equal(whole.targets_N, torch.cat([batch.targets_N for batch in alone]))
    assert [MASKING.hide(TEXT[i], i, 0)[1].sum() for i in range(8)] == [len(batch.targets_N) for batch in alone]
    assert not torch.equal(read(TEXT[:1], [1]).tokens_BL, read(TEXT[:1], [0]).tokens_BL)
    other = Masking(V, MASK, SPECIAL, seed=4)
    assert not torch.equal(read(TEXT[:8], range(8), other).tokens_BL, whole.tokens_BL)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="token 50 is not among the 50 of the vocabulary"):
        Masking(50, 50, (), seed=0)


@pytest.fixture
def file(tmp_path: Path) -> MaskedFile:
    """Returns a file of five chunks: four of 16 tokens and a last one of 6."""
    TEXT.ravel()[: 4 * 16 + 6].astype("<u2").tofile(tmp_path / "train.bin")
    return MaskedFile(tmp_path / "train.bin", "<u2", 16, MASKING)


def test_a_step_is_the_same_for_any_ranks_and_micro_batches(file: MaskedFile) -> None:
    def rows(rank: int, world_size: int, micro_batch: int) -> list[tuple[int, list[list[int]]]]:
        data = TrainingData(
            file,
            batch=4,
            micro_batch=micro_batch,
            seed=1,
            random_offsets=False,
            rank=rank,
            world_size=world_size,
            device=CPU,
        )
        steps = []
        for step in data.steps(3, 6):
            sequences = []
            for batch in step.micro_batches:
                assert batch.rows_N is not None
                sequences += [
                    [*tokens.tolist(), *batch.targets_N[batch.rows_N // 16 == i].tolist()]
                    for i, tokens in enumerate(batch.tokens_BL)
                ]
            steps.append((step.valid_tokens, sequences))
        return steps

    whole, shares = rows(0, 1, 4), [rows(rank, 2, 1) for rank in range(2)]
    for (valid, sequences), (other, first), (same, second) in zip(whole, *shares, strict=True):
        assert valid == other == same == sum(map(len, sequences)) - 4 * 16
        assert sequences == first + second


def test_every_token_may_be_hidden_once_an_epoch_and_the_last_chunks_context_never(file: MaskedFile) -> None:
    starts = [chunk * file.length for chunk in range(file.chunks)]
    assert [file.token_count(start) for start in starts] == [16, 16, 16, 16, 6]
    hidden = set()
    for sample in range(200):
        batch = file.batch([64], CPU, [sample])
        assert batch.rows_N is not None
        assert len(batch.targets_N) == file.target_count(64, sample)
        assert batch.targets_N.tolist() == file.tokens[64 + 6 - 16 + batch.rows_N.numpy()].tolist()
        hidden |= set(batch.rows_N.tolist())
    ordinary = {10 + i for i in range(6) if file.tokens[64 + i] not in SPECIAL}
    assert hidden == ordinary
