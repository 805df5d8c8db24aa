"""What a run is watched by while it trains: held-out text, zero-shot tasks, and samples of what its students write.

S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.settings import EvaluationConfig
from engine.data.batches import HeldOutData
from engine.data.tokenizer import Tokenizer
from engine.evaluation.held_out import validation_losses
from engine.evaluation.results import SetScore, TaskScore, pooled
from engine.evaluation.samples import samples
from engine.evaluation.scoring import cohort_log_probabilities
from engine.evaluation.zero_shot import ZeroShot
from engine.reporting.records import StudentEvaluation
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime

PAIRS = "evaluation.pairs"  # the task of the minimal pairs that every run is watched by


@dataclass(frozen=True)
class Evaluator:
    """Each method is a collective call."""

    config: EvaluationConfig
    held_out: HeldOutData
    questions: ZeroShot
    tokenizer: Tokenizer
    runtime: Runtime

    def evaluate(
        self, cohort: Cohort, omega: Sequence[float]
    ) -> tuple[list[StudentEvaluation], list[dict[str, float]]]:
        """Of each student and, where there are several, last their ensemble weighted by ω [S] (empty: alike): how it
        does, and its accuracy by the phenomenon of the pairs."""
        losses = validation_losses(cohort, self.held_out, self.runtime, omega)
        scores: list[list[TaskScore]] = [[] for _ in losses]
        if self.questions.tasks:
            with cohort.evaluating():
                scores = self.questions.scores(cohort_log_probabilities(cohort, omega))
        found: list[StudentEvaluation] = [
            {
                "validation_loss": loss,
                "pairs_accuracy": next((_half_ties(pooled("", t.sets)) for t in own if t.task == PAIRS), None),
                "scores": {task.task: task.mean.score for task in own if task.task != PAIRS},
            }
            for loss, own in zip(losses, scores, strict=True)
        ]
        return found, [{s.name: _half_ties(s) for t in own if t.task == PAIRS for s in t.sets} for own in scores]

    def describe(
        self, cohort: Cohort, found: Sequence[StudentEvaluation], phenomena: Sequence[dict[str, float]]
    ) -> tuple[dict[str, Any], ...]:
        """Per student what `evaluate` found, and texts it writes; none where it sees both sides."""
        count = 0 if self.questions.masked else self.config.samples
        texts = samples(cohort, self.tokenizer, count, self.config.sample_tokens)
        return tuple(
            {**one, "pairs_by_phenomenon": accuracies, "samples": own}
            for one, accuracies, own in zip(found, phenomena, texts, strict=False)
        )


def _half_ties(one: SetScore) -> float:
    return (one.score + one.strict) / 2
