from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine.data.batches import Batch
from engine.data.tokenizer import Tokenizer
from engine.evaluation.samples import samples
from engine.students.cohort import Cohort

COUNT = 60


@pytest.fixture
def decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of every text that is decoded."""
    seen: list[list[int]] = []
    decode = tokenizer.decode

    def spy(ids: Sequence[int]) -> str:
        seen.append(list(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", spy)
    return seen


def test_texts_depend_on_the_students_seed_alone(cohort: Cohort, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    first = samples(cohort, tokenizer, 3, 20)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert samples(cohort, tokenizer, 3, 20) == first
    assert torch.equal(torch.get_rng_state(), before), "training draws what it would have drawn without samples"
    assert [len(texts) for texts in first] == [3, 3]
    assert len({text for texts in first for text in texts}) == 6
    assert all(student.model.training for student in cohort)


def test_a_text_ends_before_the_boundary_token_or_at_its_bound(
    cohort: Cohort, tokenizer: Tokenizer, decoded: list[list[int]]
) -> None:
    samples(cohort, tokenizer, COUNT, 20)
    assert len(decoded) == 2 * COUNT
    assert {len(ids) for ids in decoded} > {20}, "some end sooner; otherwise this shows nothing"
    assert max(map(len, decoded)) == 20
    assert all(tokenizer.boundary not in ids for ids in decoded)


def test_no_text_is_longer_than_the_positions(cohort: Cohort, tokenizer: Tokenizer, decoded: list[list[int]]) -> None:
    samples(cohort, tokenizer, COUNT, 1000)
    assert max(map(len, decoded)) == cohort[0].shape.max_length - 1, "the boundary token takes one"


def test_without_a_boundary_token_a_text_begins_after_a_newline(
    cohort: Cohort, train_tokenizer: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(boundary=False)
    seen: list[int] = []
    body = cohort[0].body

    def spy(batch: Batch) -> Tensor:
        seen.append(int(batch.tokens_BL[0, 0]))
        return body(batch)

    monkeypatch.setattr(cohort[0], "body", spy)
    texts = samples(cohort, tokenizer, 2, 5)
    assert [tokenizer.decode([i]) for i in set(seen)] == ["\n"]
    assert [len(t) for t in texts] == [2, 2]


def test_no_texts_where_none_are_wanted(cohort: Cohort, tokenizer: Tokenizer) -> None:
    assert samples(cohort, tokenizer, 0, 20) == [[], []]
