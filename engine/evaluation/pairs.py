"""Minimal pairs: of a grammatical sentence and one that differs from it in a word or two, which is the likelier?

A sentence's score is the sum of its tokens' log-probabilities, the boundary token in front, as BabyLM scores them.

B sentences, L positions, N = B·L tokens, S students.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.cohort import Cohort
from engine.data import Batch
from engine.evaluation.held_out import token_losses
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer

TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class Pair:
    good: str
    bad: str
    phenomenon: str


@dataclass(frozen=True)
class PairScores:
    """Shares of pairs decided rightly, per student; a tie counts as half."""

    accuracy: list[float]  # mean over all pairs
    by_phenomenon: list[dict[str, float]]


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a JSON-lines file, or of all in a folder: sentence_good, sentence_bad and, else the file's name,
    phenomenon. ValueError names the file and line that has neither sentence."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"evaluation.pairs={path}: expected a file or folder of *.jsonl with minimal pairs")
    pairs = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
        lines = text.split("\n") if text else []  # not splitlines: JSON may hold other line ends
        pairs += [_pair(line, file, number) for number, line in enumerate(lines, 1)]
    if not pairs:
        raise ValueError(f"evaluation.pairs={path}: no pairs in it; evaluation.pairs=none does without")
    return pairs


def _pair(line: str, file: Path, number: int) -> Pair:
    try:
        item = json.loads(line)
        pair = Pair(item["sentence_good"], item["sentence_bad"], item.get("phenomenon", file.stem))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        pair = None
    if pair is None or not all(isinstance(value, str) for value in vars(pair).values()):
        raise ValueError(f"{file}:{number}: expected sentence_good and sentence_bad, as texts in a JSON object")
    return pair


class PairScorer:
    """Minimal pairs as batches of token ids, made once and scored as often as wanted."""

    def __init__(self, pairs: list[Pair], tokenizer: Tokenizer, runtime: Runtime, *, positions: int) -> None:
        """Raises ValueError for a sentence longer than the students' positions."""
        self.pairs, self.runtime = pairs, runtime
        # Without a trained boundary token the first token goes unscored: nothing trained could stand in front of it.
        front = [] if tokenizer.boundary is None else [tokenizer.boundary]
        sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
        self.ids = [front + ids for ids in tokenizer.encode_batch(sentences)]
        for sentence, ids in zip(sentences, self.ids, strict=True):
            if len(ids) > positions + 1:
                raise ValueError(
                    f"{sentence!r}: {len(ids)} tokens, more than the students' {positions} positions: raise "
                    "students.*.positions, or take evaluation.pairs=none"
                )
        self.rounds = self._plan()

    def _plan(self) -> list[list[int]]:
        """Sentences sorted by length, in batches of bounded size: their number is the same on every rank."""
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        rounds: list[list[int]] = [[]]
        for i in order:
            if (len(rounds[-1]) + 1) * len(self.ids[i]) > TOKENS_A_BATCH * self.runtime.world and rounds[-1]:
                rounds.append([])
            rounds[-1].append(i)
        return rounds

    def scores(self, cohort: Cohort) -> PairScores:
        """A collective call: every rank takes every world-th sentence of a round."""
        scores_SI = torch.zeros(len(cohort), len(self.ids), dtype=torch.float64, device=self.runtime.device)
        with cohort.evaluating():
            for indices in self.rounds:
                mine = indices[self.runtime.rank :: self.runtime.world]
                batch = self._batch(mine or indices[:1])
                ce_SN = token_losses(cohort, batch)
                if mine:
                    owner_N = torch.tensor([i for i in mine for _ in self.ids[i][1:]], device=self.runtime.device)
                    scores_SI.index_add_(1, owner_N, -ce_SN.double())
        if self.runtime.world > 1:
            torch.distributed.all_reduce(scores_SI)
        if not scores_SI.isfinite().all():
            raise ValueError("a minimal pair's score is not finite: the students have diverged")
        return self._judge(scores_SI.cpu())

    def _batch(self, indices: list[int]) -> Batch:
        """The sentences one below the other; only their own tokens are rows, what fills up the shorter ones is not."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(self.ids[i]) for i in indices], batch_first=True)
        lengths = torch.tensor([len(self.ids[i]) for i in indices])
        real = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
        rows, targets = real.flatten().nonzero().squeeze(1), ids[:, 1:][real]
        # Padding stands behind the text, where causal attention never looks; any id will do.
        return Batch(*(x.to(self.runtime.device) for x in (ids[:, :-1], targets, rows)))

    def _judge(self, scores_SI: Tensor) -> PairScores:
        margin = scores_SI[:, 0::2] - scores_SI[:, 1::2]
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        places: dict[str, list[int]] = defaultdict(list)
        for place, pair in enumerate(self.pairs):
            places[pair.phenomenon].append(place)
        return PairScores(
            accuracy=right.mean(dim=1).tolist(),
            by_phenomenon=[{name: row[at].mean().item() for name, at in places.items()} for row in right],
        )
