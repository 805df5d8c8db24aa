"""What a run measures while it trains: held-out loss, zero-shot tasks, and texts that its students write.

N tokens, S students; B texts, L positions, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config.settings import EvaluationConfig
from engine.data.batches import IGNORED, Batch, HeldOutData
from engine.data.tokenizer import Tokenizer
from engine.evaluation.log_probabilities import cohort_log_probabilities, cohort_target_log_probabilities
from engine.evaluation.metrics import SetScore, TaskScore, pooled
from engine.evaluation.zero_shot import ZeroShot
from engine.reporting.records import StudentEvaluation
from engine.students.cohort import Cohort
from engine.students.student import Student
from engine.system.distributed import Runtime

PAIRS = "evaluation.pairs"  # the name of the task of minimal pairs in every run's evaluation
TEMPERATURE = 0.8  # of the samples


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a run's students. Each method is a collective call."""

    config: EvaluationConfig
    held_out: HeldOutData
    questions: ZeroShot
    tokenizer: Tokenizer
    runtime: Runtime

    def evaluate(
        self, cohort: Cohort, omega: Sequence[float]
    ) -> tuple[list[StudentEvaluation], list[dict[str, float]]]:
        """Returns each student's evaluation, and each one's accuracy on the minimal pairs by their phenomenon.

        Where there are several students, the last of both is their ensemble's, weighted by ω [S] (empty: equally).
        """
        losses = validation_losses(cohort, self.held_out, self.runtime, omega)
        scores: list[list[TaskScore]] = [[] for _ in losses]
        if self.questions.tasks:
            with cohort.evaluating():
                scores = self.questions.scores(cohort_log_probabilities(cohort, omega))
        evaluations: list[StudentEvaluation] = []
        phenomena: list[dict[str, float]] = []
        for loss, tasks in zip(losses, scores, strict=True):
            pairs = [set_score for task in tasks if task.task == PAIRS for set_score in task.sets]
            evaluations.append(
                {
                    "validation_loss": loss,
                    "pairs_accuracy": _accuracy(pooled(PAIRS, pairs)) if pairs else None,
                    "scores": {task.task: task.mean.score for task in tasks if task.task != PAIRS},
                }
            )
            phenomena.append({set_score.name: _accuracy(set_score) for set_score in pairs})
        return evaluations, phenomena

    def describe(
        self, cohort: Cohort, evaluations: Sequence[StudentEvaluation], phenomena: Sequence[dict[str, float]]
    ) -> tuple[dict[str, Any], ...]:
        """Returns per student what `evaluate` returned, and texts that it writes; masked students write none."""
        count = 0 if self.questions.masked else self.config.samples
        texts = samples(cohort, self.tokenizer, count, self.config.sample_tokens)
        return tuple(
            {**evaluation, "pairs_by_phenomenon": accuracies, "samples": written}
            for evaluation, accuracies, written in zip(evaluations, phenomena, texts, strict=False)
        )


def _accuracy(pairs: SetScore) -> float:
    """Returns the accuracy in which a tie counts as half right."""
    return (pairs.score + pairs.strict_score) / 2


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
            targets_N = batch.targets_N[valid_N]
            log_prob_SN = cohort_target_log_probabilities(cohort, batch, valid_N, targets_N, omega)
            sums[:-1] -= log_prob_SN.sum(dim=1, dtype=torch.float64)
            sums[-1] += len(valid_N)
    *losses, tokens = runtime.all_reduce_sum(sums)
    return [loss / tokens for loss in losses]


def samples(cohort: Cohort, tokenizer: Tokenizer, count: int, tokens: int) -> list[list[str]]:
    """Returns `count` texts of at most `tokens` tokens per student, the same on every rank; a collective call."""
    if count == 0:
        return [[] for _ in cohort]
    with cohort.evaluating():
        return [_sample(cohort, student, tokenizer, count, tokens) for student in cohort]


def _sample(cohort: Cohort, student: Student, tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    device = student.runtime.device
    generator = torch.Generator().manual_seed(student.config.seed)
    # A text begins behind the boundary token or, where the tokenizer has none, behind a newline.
    prompt = [tokenizer.boundary] if tokenizer.boundary is not None else tokenizer.encode("\n")[-1:]
    tokens_BL = torch.tensor([prompt] * count, device=device)
    for _ in range(min(tokens, student.shape.max_length - 1)):
        length = tokens_BL.shape[1]
        last_B = torch.arange(length - 1, count * length, length, device=device)
        hidden_BD = student.body(Batch(tokens_BL, tokens_BL[:, -1], rows_N=last_B))
        with cohort.gathered_heads():
            logits_BV = (hidden_BD @ student.model.head.T).float().cpu()
        next_B1 = torch.multinomial((logits_BV / TEMPERATURE).softmax(-1), 1, generator=generator)
        tokens_BL = torch.cat([tokens_BL, next_B1.to(device)], dim=1)
    texts = []
    for ids in tokens_BL[:, len(prompt) :].tolist():
        end = ids.index(tokenizer.boundary) if tokenizer.boundary in ids else len(ids)
        texts.append(tokenizer.decode(ids[:end]).strip())
    return texts
