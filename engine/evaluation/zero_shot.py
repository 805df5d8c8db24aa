"""Questions as token ids: prepared once, answered by one model or several, as often as wanted.

S models, I texts.
"""

from collections.abc import Sequence
from itertools import chain

from engine.data.tokenizer import Tokenizer
from engine.evaluation.results import TaskScore
from engine.evaluation.scoring import LogProbabilities, causal_trees, in_common, masked_copies, score
from engine.evaluation.tasks import Task
from engine.system.distributed import Runtime
from engine.system.errors import UserError


class ZeroShot:
    """The questions of some tasks, for models that share a tokenizer, and all read from left to right or are masked.

    A text's score is the sum of its tokens' log-probabilities, after the boundary token, as BabyLM 2025 has it. Without
    a trained boundary token the first token goes unscored: nothing trained could stand in front of it. Of masked models
    it is the pseudo-log-likelihood, between the tokens that begin and end a text, where there are such.
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
        """`share`: as `causal_strands` has it. Raises ValueError for a text longer than the models' positions, or a
        tokenizer without a mask for masked models."""
        self.tasks, self.runtime, self.masked = tasks, runtime, masked
        back = [tokenizer.end] if masked and tokenizer.end is not None else []
        front = [] if tokenizer.boundary is None else [tokenizer.boundary]
        answers = [answer for task in tasks for question in task.questions for answer in question.answers]
        contexts = sorted({question.context for task in tasks for question in task.questions if question.context})
        encoded = iter(tokenizer.encode_batch(answers))
        fronts = dict(zip(contexts, (front + ids for ids in tokenizer.encode_batch(contexts)), strict=True))
        self.lengths: list[list[int]] = []  # per question, of each answer, in tokens
        texts: list[list[int]] = []
        firsts: list[int] = []  # where the answers to a question part; or where the only one begins
        for task in tasks:
            for question in task.questions:
                before = fronts.get(question.context, front)
                ids = [before + next(encoded) for _ in question.answers]
                for text, own in zip(question.answers, ids, strict=True):
                    size = len(own) + len(back)
                    if size > max_length + (not masked):  # what comes last needs no position where it only is predicted
                        raise UserError(
                            f"{task.name}: {question.context + text!r}: {size} tokens, more than the models' "
                            f"{max_length} positions: take a model that has them, or leave the task out"
                        )
                self.lengths.append([len(own) - len(before) for own in ids])
                firsts += [len(before) if len(ids) == 1 else in_common(ids)] * len(ids)
                texts += ids
        self.texts = len(texts)
        if not masked:
            self.trees = causal_trees(texts, firsts, share=share)
            return
        if tokenizer.mask is None:
            raise UserError("the model predicts masked tokens, and its tokenizer has no mask token: fetch it again")
        self.trees = [
            tree
            for owner, (ids, own) in enumerate(zip(texts, chain.from_iterable(self.lengths), strict=True))
            for tree in masked_copies(ids + back, range(len(ids) - own, len(ids)), tokenizer.mask, owner)
        ]

    def answers(self, log_probabilities: LogProbabilities) -> list[list[list[float]]]:
        """Per model and question, each answer's log-probability in nats, from where the answers part (of a masked
        model: of the whole answer); collective.

        Raises ValueError where one is not finite.
        """
        scores_SI = score(self.trees, self.texts, log_probabilities, self.runtime, padding=not self.masked)
        found = []
        for row in scores_SI.tolist():
            scores = iter(row)
            found.append([[next(scores) for _ in lengths] for lengths in self.lengths])
        return found

    def scores(self, log_probabilities: LogProbabilities) -> list[list[TaskScore]]:
        """Per model, and last the ensemble where there are several, its score of each task; collective."""
        return [self._judge(answers) for answers in self.answers(log_probabilities)]

    def _judge(self, answers: list[list[float]]) -> list[TaskScore]:
        judged, begin = [], 0
        for task in self.tasks:
            own = slice(begin, begin := begin + len(task.questions))
            judged.append(TaskScore(task.name, tuple(task.judge(task.questions, answers[own], self.lengths[own]))))
        return judged
