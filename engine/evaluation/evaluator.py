"""What a run measures while it trains: held-out loss, zero-shot tasks, and texts that its students write.

S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.settings import EvaluationConfig
from engine.data.batches import HeldOutData
from engine.data.tokenizer import Tokenizer
from engine.evaluation.held_out import validation_losses
from engine.evaluation.log_probabilities import cohort_log_probabilities
from engine.evaluation.metrics import SetScore, TaskScore, pooled
from engine.evaluation.samples import samples
from engine.evaluation.zero_shot import ZeroShot
from engine.reporting.records import StudentEvaluation
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime

PAIRS = "evaluation.pairs"  # the name of the task of minimal pairs in every run's evaluation


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
