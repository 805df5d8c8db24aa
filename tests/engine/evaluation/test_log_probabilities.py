import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForMaskedLM

from engine.evaluation import log_probabilities
from engine.evaluation.log_probabilities import (
    TokenTree,
    TreeBatch,
    causal_trees,
    cohort_log_probabilities,
    common_prefix_length,
    masked_copies,
    model_log_probabilities,
    plan_batches,
    score_texts,
    target_log_probabilities,
)
from engine.models.llama import Llama
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from kernels import Projected

# Answers to five questions: a common beginning, none at all, one text, equal texts, and one text that goes on further.
QUESTIONS = [
    [[1, 5, 6, 7, 8], [1, 5, 6, 9, 10, 11, 12], [1, 5, 6, 9, 13]],
    [[4, 5, 6], [7, 5, 6, 9]],
    [[1, 20, 21, 22, 23, 24]],
    [[1, 30, 31], [1, 30, 31]],
    [[1, 40, 41, 42], [1, 40]],
]
SCORED_FROM = 3  # where the single text's scored part begins


def llamas(cohort: Cohort) -> list[Llama]:
    return [student.model for student in cohort if isinstance(student.model, Llama)]


@pytest.fixture
def models(cohort: Cohort) -> list[Llama]:
    return llamas(cohort)


def trees_of(*, share: bool) -> list[TokenTree]:
    scored_from = [
        SCORED_FROM if len(texts) == 1 else common_prefix_length(texts) for texts in QUESTIONS for _ in texts
    ]
    return causal_trees([ids for texts in QUESTIONS for ids in texts], scored_from, share=share)


TEXTS = sum(map(len, QUESTIONS))


@torch.no_grad()
def naive(models: Sequence[Llama], omega: Sequence[float] | None = None) -> list[float]:
    """Sum of log p(token | all before it) from where a question's answers part, one text at a time, in float64."""
    omega = omega or [1 / len(models)] * len(models)
    sums = []
    for texts in QUESTIONS:
        same = [len(set(column)) == 1 for column in zip(*texts, strict=False)]
        begin = SCORED_FROM if len(texts) == 1 else max(1, [*same, False].index(False))
        for ids in texts:
            logits = sum(w * (m(torch.tensor([ids])) @ m.head.T).double() for w, m in zip(omega, models, strict=True))
            log_prob = torch.as_tensor(logits).log_softmax(-1)
            sums.append(sum(log_prob[i - 1, ids[i]].item() for i in range(begin, len(ids))))
    return sums


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [7, 4096])
def test_scores_equal_those_of_one_text_at_a_time(
    models: list[Llama], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, share: bool, tokens_per_batch: int
) -> None:
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(log_probabilities, "MAX_LOGITS", 3 * 360)  # several chunks of hidden states
    with torch.no_grad():
        scores_SI = score_texts(trees_of(share=share), TEXTS, model_log_probabilities(models), runtime, padding=True)
    expected = torch.tensor([naive([models[0]]), naive([models[1]]), naive(models)], dtype=torch.float64)
    torch.testing.assert_close(scores_SI, expected, rtol=2e-6, atol=0)
    assert scores_SI[0, 6].item() == scores_SI[0, 7].item() == 0.0, "equal texts tie exactly"


def test_an_ensemble_is_weighted(models: list[Llama], cohort: Cohort, runtime: Runtime) -> None:
    omega = [0.9, 0.1]
    expected = torch.tensor(naive(models, omega)).double()
    with torch.no_grad():
        of_models = score_texts(
            trees_of(share=True), TEXTS, model_log_probabilities(models, omega), runtime, padding=True
        )
    with cohort.evaluating():
        of_cohort = score_texts(
            trees_of(share=False), TEXTS, cohort_log_probabilities(cohort, omega), runtime, padding=True
        )
    for scores_SI in (of_models, of_cohort):
        torch.testing.assert_close(scores_SI[2], expected, rtol=2e-6, atol=0)
    assert (expected - torch.tensor(naive(models)).double()).abs().max() > 1e-3


def test_the_students_of_a_run_score_alike_and_are_back_in_training(cohort: Cohort, runtime: Runtime) -> None:
    with cohort.evaluating():
        scores_SI = score_texts(trees_of(share=False), TEXTS, cohort_log_probabilities(cohort), runtime, padding=True)
    torch.testing.assert_close(scores_SI[2], torch.tensor(naive(llamas(cohort))).double(), rtol=2e-6, atol=0)
    assert all(student.model.training for student in cohort)


def test_what_texts_begin_with_is_computed_once() -> None:
    texts = [[1, 5, 6, 9, 10], [1, 7, 8], [1, 5, 6, 9, 13, 14], [1, 5, 6, 7, 8]]
    [tree] = causal_trees(texts, [3, 1, 3, 3], share=True)
    assert tree.tokens == [1, 5, 6, 7, 9, 13, 7]
    assert tree.position_ids == [0, 1, 2, 3, 3, 4, 1]
    assert tree.subtree_ends == [7, 6, 6, 4, 6, 6, 7]
    assert len(tree.targets) == 2 + 2 + 3 + 2
    assert list(tree.rows.values()) == list(range(6)), "a row serves all texts that are the same up to it"


@pytest.mark.parametrize("longest", [4, 12, 512])
def test_texts_of_which_much_is_common_stay_together_up_to_a_bound(
    models: list[Llama], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_TREE", 4)
    monkeypatch.setattr(log_probabilities, "LONGEST_TREE", longest)
    trees = trees_of(share=True)
    assert (max(len(s.tokens) for s in trees) > 6) is (longest > 4)
    with torch.no_grad():
        scores_SI = score_texts(trees, TEXTS, model_log_probabilities(models), runtime, padding=True)
    torch.testing.assert_close(scores_SI[0], torch.tensor(naive([models[0]])).double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("padding", [True, False])
def test_batches_hold_every_tree_once_within_their_bound(monkeypatch: pytest.MonkeyPatch, padding: bool) -> None:
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_BATCH", 20)
    trees = [causal_trees([list(range(length))], [1], share=False)[0] for length in (5, 9, 3, 5, 5, 30, 9, 2)]
    rounds = plan_batches(trees, 1, padding=padding)
    assert sorted(i for indices in rounds for i in indices) == list(range(8))
    for indices in rounds:
        lengths = [len(trees[i].tokens) for i in indices]
        assert len(indices) * max(lengths) <= 20 or len(indices) == 1
        assert padding or len(set(lengths)) == 1
    assert padding is any(len({len(trees[i].tokens) for i in indices}) > 1 for indices in rounds)


def test_two_ranks_score_every_text_once(
    models: list[Llama], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_TREE", 4)
    # Some batches hold one tree, and so nothing for one of the ranks.
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_BATCH", 6)
    score_with = model_log_probabilities(models)
    with torch.no_grad():
        alone = score_texts(trees_of(share=True), TEXTS, score_with, runtime, padding=True)
        from_rank_0: list[Tensor] = []

        def score_on(rank: int) -> Tensor:
            rank_of_two = replace(runtime, rank=rank, world_size=2)
            return score_texts(trees_of(share=True), TEXTS, score_with, rank_of_two, padding=True)

        monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: from_rank_0.append(sums.clone()))
        with pytest.raises(ValueError, match="some tokens were scored by no rank or by several"):
            score_on(0)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(from_rank_0[0]))
        torch.testing.assert_close(score_on(1), alone, rtol=1e-6, atol=0)


def test_scores_that_are_not_finite_are_no_result(models: list[Llama], runtime: Runtime) -> None:
    norm = models[0].norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[0] = math.nan
        try:
            with pytest.raises(UserError, match="not finite"):
                score_texts(trees_of(share=True), TEXTS, model_log_probabilities(models), runtime, padding=True)
        finally:
            norm.copy_(kept)


@pytest.mark.parametrize("scale", [1.0, 1e3, -1e3])
def test_logits_of_any_size(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.rand(5, 4, generator=generator), torch.rand(9, 4, generator=generator)
    sources, targets = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 8, 2, 0])
    log_prob_SN = target_log_probabilities([Projected(hidden * scale, head)], sources, targets)
    expected = (hidden.double() * scale @ head.double().T).log_softmax(-1)[sources, targets]
    torch.testing.assert_close(log_prob_SN[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_pseudo_log_likelihood_equals_a_naive_loop(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probabilities, "TOKENS_PER_BATCH", 40)
    mask = 3
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=50, max_position_embeddings=40, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    sentences = [[0, 10, 11, 12, 2], [0, 20, 21, 22, 23, 24, 2], [0, 30, 2]]
    trees = [
        tree for i, ids in enumerate(sentences) for tree in masked_copies(ids, range(1, len(ids) - 1), mask, text_id=i)
    ]

    def score_with(batch: TreeBatch) -> Tensor:
        logits = model(input_ids=batch.tokens_BL).logits.flatten(0, 1)[batch.rows_U]
        return logits.log_softmax(-1)[batch.state_ids_N, batch.targets_N][None]

    with torch.no_grad():
        scores_I = score_texts(trees, len(sentences), score_with, runtime, padding=False)[0]
        expected = []
        for ids in sentences:
            total = 0.0
            for at in range(1, len(ids) - 1):
                copy = torch.tensor([ids])
                copy[0, at] = mask
                total += model(input_ids=copy).logits[0, at].double().log_softmax(-1)[ids[at]].item()
            expected.append(total)
    torch.testing.assert_close(scores_I, torch.tensor(expected).double(), rtol=1e-5, atol=0)
