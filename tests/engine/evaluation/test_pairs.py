import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cohort import Cohort, Student
from engine.corpus.grammar import minimal_pairs
from engine.evaluation import pairs as pairs_module
from engine.evaluation.pairs import Pair, PairScorer, PairScores, read_pairs
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer

POSITIONS = 48


class Recorder(PairScorer):
    """Keeps the scores [S, sentences] that it judges."""

    scores_SI: Tensor

    def _judge(self, scores_SI: Tensor) -> PairScores:
        self.scores_SI = scores_SI
        return super()._judge(scores_SI)


@pytest.fixture(scope="module")
def grammar_pairs() -> list[Pair]:
    return [Pair(pair.good, pair.bad, pair.phenomenon) for pair in minimal_pairs(3, 2)]


@torch.no_grad()
def naive_score(student: Student, front: list[int], ids: list[int]) -> float:
    """Sum of log p(token | all before it), one sentence at a time, full logits in float64."""
    tokens = torch.tensor(front + ids)
    log_prob = (student.model(tokens[None]) @ student.model.head.T).double().log_softmax(-1)
    return sum(log_prob[place, token].item() for place, token in enumerate(tokens[1:].tolist()))


@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("tokens_a_batch", [150, 4096])
def test_scores_equal_log_probabilities_summed_one_sentence_at_a_time(
    cohort: Cohort,
    place: Runtime,
    train_tokenizer: Callable[..., Tokenizer],
    grammar_pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    tokens_a_batch: int,
    boundary: bool,
) -> None:
    monkeypatch.setattr(pairs_module, "TOKENS_A_BATCH", tokens_a_batch)
    tokenizer = train_tokenizer(boundary=boundary)
    scorer = Recorder(grammar_pairs, tokenizer, place, positions=POSITIONS)
    assert len({len(ids) for ids in scorer.ids}) > 5
    for batch in scorer.rounds:
        assert len(batch) * max(len(scorer.ids[i]) for i in batch) <= tokens_a_batch
    found = scorer.scores(cohort)

    front = [] if tokenizer.boundary is None else [tokenizer.boundary]
    for i, student in enumerate(cohort):
        expected = [
            (
                naive_score(student, front, tokenizer.encode(p.good)),
                naive_score(student, front, tokenizer.encode(p.bad)),
            )
            for p in grammar_pairs
        ]
        torch.testing.assert_close(
            scorer.scores_SI[i].unflatten(0, (-1, 2)), torch.tensor(expected).double(), rtol=1e-5, atol=0
        )
        right = [good > bad for good, bad in expected]
        assert found.accuracy[i] == pytest.approx(sum(right) / len(right))
        for phenomenon, share in found.by_phenomenon[i].items():
            own = [r for r, p in zip(right, grammar_pairs, strict=True) if p.phenomenon == phenomenon]
            assert share == pytest.approx(sum(own) / len(own))
        assert found.by_phenomenon[i].keys() == {p.phenomenon for p in grammar_pairs}
        assert student.model.training
    assert 0 < found.accuracy[0] < 1


def test_two_ranks_score_every_sentence_once_in_the_same_rounds(
    cohort: Cohort,
    place: Runtime,
    tokenizer: Tokenizer,
    grammar_pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs_module, "TOKENS_A_BATCH", 30)  # some rounds of one sentence: nothing for one of the ranks
    alone = Recorder(grammar_pairs, tokenizer, place, positions=POSITIONS)
    alone.scores(cohort)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # its part is played by the sum below
    ranks = [Recorder(grammar_pairs, tokenizer, replace(place, rank=r, world=2), positions=POSITIONS) for r in range(2)]
    for rank in ranks:
        rank.scores(cohort)
    assert ranks[0].rounds == ranks[1].rounds
    assert min(len(batch) for batch in ranks[0].rounds) == 1
    first, second = (rank.scores_SI for rank in ranks)
    assert ((first == 0) | (second == 0)).all()
    torch.testing.assert_close(first + second, alone.scores_SI, rtol=1e-5, atol=0)


def test_a_tie_counts_half(cohort: Cohort, place: Runtime, tokenizer: Tokenizer) -> None:
    same = [Pair(text, text, "same") for text in ("look!", "the dog sleeps.", "where is she?")]
    found = PairScorer(same, tokenizer, place, positions=POSITIONS).scores(cohort)
    assert found.accuracy == [0.5, 0.5]
    assert found.by_phenomenon == [{"same": 0.5}] * 2


def test_scores_that_are_not_finite_are_no_result(
    cohort: Cohort, place: Runtime, tokenizer: Tokenizer, grammar_pairs: list[Pair]
) -> None:
    scorer = PairScorer(grammar_pairs, tokenizer, place, positions=POSITIONS)
    norm = cohort[0].model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[0] = math.nan
    try:
        with pytest.raises(ValueError, match="not finite"):
            scorer.scores(cohort)
    finally:
        with torch.no_grad():
            norm.copy_(kept)
    assert all(student.model.training for student in cohort), "a failed evaluation leaves nobody in evaluation mode"


def test_a_sentence_may_fill_the_positions_and_no_more(cohort: Cohort, place: Runtime, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode("the dog sleeps."))  # after the boundary token so many positions, all but the last
    pair = [Pair("the dog sleeps.", "the dog.", "x")]
    PairScorer(pair, tokenizer, place, positions=length).scores(cohort)
    with pytest.raises(ValueError, match=rf"^'the dog sleeps\.': .* {length - 1} positions"):
        PairScorer(pair, tokenizer, place, positions=length - 1)


def line(good: str, bad: str, **more: str) -> str:
    return json.dumps({"sentence_good": good, "sentence_bad": bad, **more}, ensure_ascii=False) + "\n"


def test_pairs_are_read_from_a_file_or_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(line("g1", "b1") + line("g2", "b2", phenomenon="own", UID="x"))
    (tmp_path / "a.jsonl").write_text(line("g3\u2028rest", "b3"), encoding="utf-8")
    (tmp_path / "c.txt").write_text("not read")
    in_b = [Pair("g1", "b1", "b"), Pair("g2", "b2", "own")]
    assert read_pairs(tmp_path / "b.jsonl") == in_b
    assert read_pairs(tmp_path) == [Pair("g3\u2028rest", "b3", "a"), *in_b]


@pytest.mark.parametrize(
    "second", ['{"sentence_good": "g"}', "{", "", "3", '["sentence_good"]', '{"sentence_good": 1, "sentence_bad": "b"}']
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, second: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line("g", "b") + second + "\n" + line("g", "b"))
    with pytest.raises(ValueError, match=r"p\.jsonl:2: expected sentence_good and sentence_bad"):
        read_pairs(path)


def test_no_pairs_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for path in (tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match=path.name):
            read_pairs(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: expected a file or folder of \*\.jsonl"):
        read_pairs(tmp_path / "folder")
