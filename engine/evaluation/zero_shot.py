"""Zero-shot questions as token ids, prepared once and answered by one model or several as often as wanted.

S models, I texts (i of one question).
"""

from collections.abc import Sequence
from itertools import chain

from engine.data.tokenizer import Tokenizer
from engine.evaluation.log_probabilities import (
    LogProbabilities,
    causal_trees,
    common_prefix_length,
    masked_copies,
    score_texts,
)
from engine.evaluation.metrics import TaskScore
from engine.evaluation.tasks import Task
from engine.system.distributed import Runtime
from engine.system.errors import UserError


class ZeroShot:
    """The questions of some tasks, for models that share a tokenizer and are all causal or all masked.

    A causal model's score of a text is the sum of its tokens' log-probabilities after the boundary token, as in BabyLM
    2025; without a boundary token the first token is not scored, because no trained token could stand before it. A
    masked model's score is the pseudo-log-likelihood, with the tokens that begin and end a text around it.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        max_length: int,
        share: bool,
        masked: bool = False,
    ) -> None:
        """Encodes the questions; `share` has texts share their prefixes, as `causal_trees` says.

        Raises UserError for a text longer than `max_length` allows, and where masked models have no mask token.
        """
        self.tasks, self.runtime, self.masked = tasks, runtime, masked
        self.lengths: list[list[int]] = []  # per question, each answer's length in tokens
        texts: list[list[int]] = []
        scored_from: list[int] = []  # per text: where the answers to its question part, or where the only answer begins
        end = [tokenizer.end] if masked and tokenizer.end is not None else []
        boundary = [] if tokenizer.boundary is None else [tokenizer.boundary]
        contexts = sorted({question.context for task in tasks for question in task.questions if question.context})
        encoded_contexts = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
        answers = [answer for task in tasks for question in task.questions for answer in question.answers]
        encoded_answers = iter(tokenizer.encode_batch(answers))
        for task in tasks:
            for question in task.questions:
                before = boundary + encoded_contexts.get(question.context, [])
                ids = [before + next(encoded_answers) for _ in question.answers]
                for answer, tokens in zip(question.answers, ids, strict=True):
                    size = len(tokens) + len(end)
                    # A causal model only predicts the last token, which so needs no position.
                    if size > max_length + (not masked):
                        raise UserError(
                            f"{task.name}: {question.context + answer!r}: {size} tokens are more than the models' "
                            f"max_length={max_length}: take a model with a larger one, or leave the task out"
                        )
                self.lengths.append([len(tokens) - len(before) for tokens in ids])
                scored_from += [len(before) if len(ids) == 1 else common_prefix_length(ids)] * len(ids)
                texts += ids
        self.texts = len(texts)
        if not masked:
            self.trees = causal_trees(texts, scored_from, share=share)
            return
        if tokenizer.mask is None:
            raise UserError("the model predicts masked tokens, and its tokenizer has no mask token: fetch it again")
        self.trees = [
            tree
            for i, (ids, length) in enumerate(zip(texts, chain.from_iterable(self.lengths), strict=True))
            for tree in masked_copies(ids + end, range(len(ids) - length, len(ids)), tokenizer.mask, text_id=i)
        ]

    def answers(self, log_probabilities: LogProbabilities) -> list[list[list[float]]]:
        """Returns per model and question each answer's log-probability in nats; a collective call.

        A causal model's is counted from where the answers part. Raises UserError where one is not finite.
        """
        scores_SI = score_texts(self.trees, self.texts, log_probabilities, self.runtime, padding=not self.masked)
        counts = [len(lengths) for lengths in self.lengths]
        return [[scores_i.tolist() for scores_i in scores_I.split(counts)] for scores_I in scores_SI]

    def scores(self, log_probabilities: LogProbabilities) -> list[list[TaskScore]]:
        """Returns each model's scores of all tasks, last the ensemble's where there are several; a collective call."""
        return [self._task_scores(answers) for answers in self.answers(log_probabilities)]

    def _task_scores(self, answers: list[list[float]]) -> list[TaskScore]:
        scores, begin = [], 0
        for task in self.tasks:
            part = slice(begin, begin + len(task.questions))
            scores.append(TaskScore(task.name, tuple(task.metric(task.questions, answers[part], self.lengths[part]))))
            begin = part.stop
        return scores
