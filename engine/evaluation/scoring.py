"""Log-probabilities of texts: every token once, in batches that waste nothing.

Texts that begin alike are computed alike, and once: a *strand*, one row of a batch, is a tree of texts in depth-first
order, in which a token sees those on its way from the root. Nor is anything predicted where it changes no decision,
which is where all answers to a question are still the same.

B strands, L positions, U hidden states, N tokens to score, D hidden, V vocabulary, H heads, I texts; S models, and
where there are several, their ensemble.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from engine.data.batches import Batch
from engine.models.base import LanguageModel
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from kernels import Projected

TOKENS_PER_BATCH = 4096
TOKENS_PER_TREE = 64  # longer ones share more and attend to more
LONGEST = 512  # of strands whose texts have most in common
MAX_LOGITS = 2**23  # elements: more rows feed the matrix product better, fewer stay in the cache


@dataclass(frozen=True)
class TokenTree:
    tokens: list[int]
    max_length: list[int]  # of each token in its own text
    ends: list[int]  # behind the last token that has this one on its way from the root, and so sees it
    rows: list[int]  # places in `tokens` that predict something
    sources: list[int]  # per target: the place in `rows` that predicts it
    targets: list[int]
    owners: list[int]  # per target: the text it belongs to


@dataclass(frozen=True)
class TreeBatch:
    tokens_BL: Tensor
    positions_BL: Tensor
    ends_BL: Tensor
    branched: bool  # False: plain causal texts
    rows_U: Tensor  # places in the flattened tokens
    sources_N: Tensor  # places in rows_U
    targets_N: Tensor
    owners_N: Tensor


LogProbabilities = Callable[[TreeBatch], Tensor]  # [S, N] fp32, nats, of a batch's targets


def causal_trees(texts: Sequence[list[int]], firsts: Sequence[int], *, share: bool) -> list[TokenTree]:
    """The strands of texts for a model that reads from left to right.

    Args:
        texts: token ids.
        firsts: the place in each text where its scored part begins; nothing predicts the very first token.
        share: compute what texts begin with once (`hidden_states`); else each text is a strand of its own.
    """
    trees: list[TokenTree] = []
    whole = [i for i, (ids, first) in enumerate(zip(texts, firsts, strict=True)) if len(ids) > max(first, 1)]
    path: list[int] = []  # places in the strand of the last text's tokens
    last: list[int] = []
    for i in sorted(whole, key=lambda i: texts[i]) if share else whole:
        inputs = texts[i][:-1]
        common = in_common((last, inputs))
        size = len(inputs) - common + (len(trees[-1].tokens) if trees else 0)
        if not share or not trees or (size > TOKENS_PER_TREE and (2 * common < len(inputs) or size > LONGEST)):
            trees.append(TokenTree([], [], [], [], [], [], []))
            path, common = [], 0
        tree = trees[-1]
        del path[common:]
        path += range(len(tree.tokens), len(tree.tokens) + len(inputs) - common)
        tree.tokens.extend(inputs[common:])
        tree.max_length.extend(range(common, len(inputs)))
        tree.ends.extend([0] * (len(inputs) - common))
        for place in path:
            tree.ends[place] = len(tree.tokens)
        known = {row: number for number, row in enumerate(tree.rows)}
        for at in range(max(firsts[i], 1), len(texts[i])):
            row = path[at - 1]
            tree.sources.append(known.setdefault(row, len(known)))
            if len(known) > len(tree.rows):
                tree.rows.append(row)
        tree.targets.extend(texts[i][max(firsts[i], 1) :])
        tree.owners.extend([i] * (len(texts[i]) - max(firsts[i], 1)))
        last = inputs
    return trees


def in_common(texts: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with."""
    first, last = min(texts), max(texts)  # what these two share, those between share too
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def masked_copies(ids: list[int], scored: Sequence[int], mask: int, owner: int) -> list[TokenTree]:
    """The copies of a text whose log-probabilities make its pseudo-log-likelihood: in each, one token is masked
    (Salazar et al. 2020, eq. 1). `ids` with whatever the model wants around a text, `scored` the places of the text."""
    places, ends = list(range(len(ids))), [len(ids)] * len(ids)
    return [TokenTree([*ids[:at], mask, *ids[at + 1 :]], places, ends, [at], [0], [ids[at]], [owner]) for at in scored]


def plan(trees: Sequence[TokenTree], world_size: int, *, padding: bool) -> list[list[int]]:
    """Strands by length, in rounds of bounded size, the same on every rank; without `padding` all of equal length."""
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].tokens))
    rounds: list[list[int]] = []
    for i in order:
        length = len(trees[i].tokens)
        full = not rounds or (len(rounds[-1]) + 1) * length > TOKENS_PER_BATCH * world_size
        if full or (not padding and len(trees[rounds[-1][-1]].tokens) != length):
            rounds.append([])
        rounds[-1].append(i)
    return rounds


def score(
    trees: Sequence[TokenTree], texts: int, log_probabilities: LogProbabilities, runtime: Runtime, *, padding: bool
) -> Tensor:
    """[S, I] float64 on the CPU: each text's summed log-probability, 0 where it has nothing to predict; collective.

    Every rank takes every world-th strand of a round, and meets the others in every round, as sharded models need it.
    Raises ValueError where a score is not finite or not whole.
    """
    sums: Tensor | None = None
    for indices in plan(trees, runtime.world_size, padding=padding):
        mine = indices[runtime.rank :: runtime.world_size]
        batch = collate([trees[i] for i in mine or indices[:1]], runtime.device)
        found_SN = log_probabilities(batch).double()
        if sums is None:  # the last row counts what was added
            sums = torch.zeros(len(found_SN) + 1, texts, dtype=torch.float64, device=runtime.device)
        if mine:
            sums.index_add_(1, batch.owners_N, torch.cat([found_SN, torch.ones_like(found_SN[:1])]))
    if sums is None:
        raise UserError("nothing to score: every text is empty, or equal to its alternatives")
    if runtime.world_size > 1:
        torch.distributed.all_reduce(sums)
    scores_SI, counted_I = sums[:-1].cpu(), sums[-1].cpu()
    expected_I = torch.bincount(torch.tensor([owner for s in trees for owner in s.owners]), minlength=texts)
    if not torch.equal(counted_I.long(), expected_I):
        raise UserError("some tokens were not scored on any rank: no score of a part is given out as the whole")
    if not scores_SI.isfinite().all():
        raise UserError("a score is not finite: the model has diverged, or its weights are damaged")
    return scores_SI


def collate(trees: list[TokenTree], device: torch.device) -> TreeBatch:
    """The strands one below the other. Padding stands behind, and takes no part in anything."""
    length = max(len(s.tokens) for s in trees)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([x + [fill] * (length - len(x)) for x in lists], device=device)

    def joined(lists: Sequence[Sequence[int]], step: Sequence[int]) -> Tensor:
        return torch.tensor([x + shift for xs, shift in zip(lists, step, strict=True) for x in xs], device=device)

    before = [0]  # hidden states of the strands above
    for tree in trees:
        before.append(before[-1] + len(tree.rows))
    return TreeBatch(
        tokens_BL=padded([s.tokens for s in trees], 0),
        positions_BL=padded([s.max_length for s in trees], 0),
        ends_BL=padded([s.ends for s in trees], length),  # padding sees itself: a row that sees nothing would be NaN
        branched=any(min(s.ends) < len(s.tokens) for s in trees),
        rows_U=joined([s.rows for s in trees], [b * length for b in range(len(trees))]),
        sources_N=joined([s.sources for s in trees], before[:-1]),
        targets_N=torch.tensor(list(chain.from_iterable(s.targets for s in trees)), device=device),
        owners_N=torch.tensor(list(chain.from_iterable(s.owners for s in trees)), device=device),
    )


def model_log_probabilities(models: Sequence[LanguageModel], omega: Sequence[float] | None = None) -> LogProbabilities:
    """Scores by models of one vocabulary and, where there are several, their ensemble, weighted by ω (None: alike)."""

    def log_probabilities(batch: TreeBatch) -> Tensor:
        hidden = [hidden_states(model, batch) for model in models]
        streams = [model.project(hidden_UD) for model, hidden_UD in zip(models, hidden, strict=True)]
        return project(streams, batch.sources_N, batch.targets_N, omega)

    return log_probabilities


def cohort_log_probabilities(cohort: Cohort, omega: Sequence[float] | None = None) -> LogProbabilities:
    """The same by the students of a run, wherever ZeRO keeps them; their strands must not share (`causal_strands`).

    Call it under `cohort.evaluating()`.
    """

    def log_probabilities(batch: TreeBatch) -> Tensor:
        hidden = [student.body(Batch(batch.tokens_BL, batch.targets_N, batch.rows_U)) for student in cohort]
        with cohort.gathered_heads():
            streams = [student.project(hidden_UD) for student, hidden_UD in zip(cohort, hidden, strict=True)]
            return project(streams, batch.sources_N, batch.targets_N, omega)

    return log_probabilities


def project(
    streams: Sequence[Projected],
    sources_N: Tensor,
    targets_N: Tensor,
    omega: Sequence[float] | None = None,
) -> Tensor:
    """[S, N] log-probabilities of the targets, each predicted by row `source` of every model's hidden states [U, D]
    through its head [V, D], with its bias [V] where it has one; logits in fp32.

    With several models the last row is the ensemble's: the softmax of their logits' mean, weighted by ω [S], sum 1.
    """
    heads = [(weight.float(), None if bias is None else bias.float()) for _, weight, bias in streams]
    scored = len(streams) + (len(streams) > 1)
    omega = omega or [1 / len(streams)] * len(streams)
    chunk = max(1, MAX_LOGITS // len(streams[0].weight))
    found_SN = torch.empty(scored, len(targets_N), device=targets_N.device)
    for start in range(0, len(streams[0].hidden), chunk):
        chosen_n = ((sources_N >= start) & (sources_N < start + chunk)).nonzero().squeeze(1)
        at = sources_N[chosen_n] - start, targets_N[chosen_n]
        mean_uV: Tensor | None = None
        for i, (stream, (weight_VD, bias_V)) in enumerate(zip(streams, heads, strict=True)):
            logits_uV = stream.hidden[start : start + chunk].float() @ weight_VD.T
            if bias_V is not None:
                logits_uV += bias_V
            if scored > 1:
                mean_uV = omega[i] * logits_uV if mean_uV is None else mean_uV.add_(logits_uV, alpha=omega[i])
            found_SN[i, chosen_n] = _log_softmax_at(logits_uV, *at)
        if mean_uV is not None:
            found_SN[-1, chosen_n] = _log_softmax_at(mean_uV, *at)
    return found_SN


def _log_softmax_at(logits_uV: Tensor, source_n: Tensor, target_n: Tensor) -> Tensor:
    """log softmax(logits)[source, target], in three passes over the logits instead of log_softmax's several.

    Nothing is subtracted before the exponential; where that overflows, or a whole row vanishes, the usual way is taken.
    """
    total_u = logits_uV.exp().sum(-1)
    if not ((total_u > 1e-30) & (total_u < torch.inf)).all():
        return logits_uV.log_softmax(-1)[source_n, target_n]
    return logits_uV[source_n, target_n] - total_u.log()[source_n]


def hidden_states(model: LanguageModel, batch: TreeBatch) -> Tensor:
    """Returns the hidden states [U, D] of the batch's rows."""
    if not batch.branched:
        return model(batch.tokens_BL, batch.rows_U)
    return model.tree_states(batch.tokens_BL, batch.positions_BL, batch.ends_BL, batch.rows_U)
