"""Log-probabilities of texts, where every prefix that texts share is computed once.

Many texts differ in a few words only. They are packed into trees: a tree is one sequence that holds every shared prefix
once, in depth-first order, and in it a token attends to itself and to the tokens on its path from the root. The texts
"the dog sleeps .", "the dog barks ." and "the cat ." make one tree:

    index         0    1    2       3      4
    token         the  dog  sleeps  barks  cat       the last token of a text is predicted but never read
    position_id   0    1    2       2      1         the token's position in its own text
    subtree_end   5    4    3       4      5         token j attends to token i where i <= j < subtree_end of i

Only those tokens are predicted that can change a decision: those after the prefix that all answers to a question share.

B trees, L tokens of the longest, U hidden states, N tokens to predict (u and n of one chunk), D hidden, V vocabulary,
I texts, S models and, where there are several, their ensemble.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
TOKENS_PER_TREE = 64  # A larger tree shares more, but each of its tokens is compared to more others.
LONGEST_TREE = 512  # tokens; the bound where a text shares half of its tokens or more with the one before it
MAX_LOGITS = 2**23  # elements of a chunk: more make the matrix product faster, fewer stay in the cache


@dataclass
class TokenTree:
    """One or more texts in one sequence, and what is to be predicted in it."""

    tokens: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)  # per token: its position in its own text
    subtree_ends: list[int] = field(default_factory=list)  # per token: the index behind the last that attends to it
    rows: dict[int, int] = field(default_factory=dict)  # per token whose state predicts something: the state's number
    targets: list[int] = field(default_factory=list)  # the tokens to predict
    state_ids: list[int] = field(default_factory=list)  # per target: the number of the state that predicts it
    text_ids: list[int] = field(default_factory=list)  # per target: the text that it belongs to


@dataclass(frozen=True)
class TreeBatch:
    """Trees as tensors, padded at their ends."""

    tokens_BL: Tensor
    position_ids_BL: Tensor
    subtree_ends_BL: Tensor
    branched: bool  # False where every tree is a single text, which a plain forward pass can read
    rows_U: Tensor  # indices into the flattened tokens
    targets_N: Tensor
    state_ids_N: Tensor  # indices into rows_U
    text_ids_N: Tensor


LogProbabilities = Callable[[TreeBatch], Tensor]  # [S, N] fp32, nats, of a batch's targets


def causal_trees(texts: Sequence[list[int]], scored_from: Sequence[int], *, share: bool) -> list[TokenTree]:
    """Returns the trees of texts for models that read from left to right.

    Args:
        texts: token ids.
        scored_from: per text the index of the first token to predict; the very first token is never predicted.
        share: False makes each text a tree of its own, for models that cannot read trees.
    """
    trees: list[TokenTree] = []
    path: list[int] = []  # the indices in the tree of the last text's tokens
    last_inputs: list[int] = []
    scored = [i for i, text in enumerate(texts) if len(text) > max(scored_from[i], 1)]
    for i in sorted(scored, key=lambda i: texts[i]) if share else scored:
        inputs = texts[i][:-1]
        common = common_prefix_length((last_inputs, inputs))
        size = len(inputs) - common + (len(trees[-1].tokens) if trees else 0)
        full = size > TOKENS_PER_TREE and (2 * common < len(inputs) or size > LONGEST_TREE)
        if full or not share or not trees:
            trees.append(TokenTree())
            path, common = [], 0
        tree = trees[-1]
        path = [*path[:common], *range(len(tree.tokens), len(tree.tokens) + len(inputs) - common)]
        tree.tokens.extend(inputs[common:])
        tree.position_ids.extend(range(common, len(inputs)))
        tree.subtree_ends.extend([0] * (len(inputs) - common))
        for index in path:
            tree.subtree_ends[index] = len(tree.tokens)
        last_inputs = inputs
        targets = texts[i][max(scored_from[i], 1) :]
        tree.targets.extend(targets)
        # The token before each target predicts it.
        tree.state_ids.extend(tree.rows.setdefault(row, len(tree.rows)) for row in path[-len(targets) :])
        tree.text_ids.extend([i] * len(targets))
    return trees


def common_prefix_length(texts: Sequence[list[int]]) -> int:
    """Returns the number of tokens that all texts begin with."""
    first, last = min(texts), max(texts)  # What these two share, all texts between them in order share too.
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def single_text(ids: list[int], row: int, target: int, text_id: int) -> TokenTree:
    """Returns a tree of one text in which the state of one token, `row`, predicts one target."""
    ends = [len(ids)] * len(ids)
    return TokenTree(ids, list(range(len(ids))), ends, {row: 0}, targets=[target], state_ids=[0], text_ids=[text_id])


def masked_copies(ids: list[int], scored: Sequence[int], mask: int, text_id: int) -> list[TokenTree]:
    """Returns the copies of a text whose log-probabilities add up to its pseudo-log-likelihood.

    In each copy one of the tokens `scored` is masked and predicted (Salazar et al. 2020, eq. 1). `ids` begins and ends
    with the tokens that the model wants before and behind a text.
    """
    return [single_text([*ids[:i], mask, *ids[i + 1 :]], i, ids[i], text_id) for i in scored]


def plan_batches(trees: Sequence[TokenTree], world_size: int, *, padding: bool) -> list[list[int]]:
    """Returns the trees' indices, sorted by length, in batches of bounded size for all ranks together.

    Without `padding` all trees of a batch have one length, as masked models need it: they would see the padding.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(trees)), key=lambda i: len(trees[i].tokens)):
        length = len(trees[i].tokens)
        full = not batches or (len(batches[-1]) + 1) * length > TOKENS_PER_BATCH * world_size
        if full or (not padding and len(trees[batches[-1][-1]].tokens) != length):
            batches.append([])
        batches[-1].append(i)
    return batches


def score_texts(
    trees: Sequence[TokenTree], texts: int, log_probabilities: LogProbabilities, runtime: Runtime, *, padding: bool
) -> Tensor:
    """Returns each text's summed log-probability in nats, [S, I] float64 on the CPU; a collective call.

    It is 0 where a text has nothing to predict. The ranks share out each batch, and every rank takes part in every
    batch, because models that ZeRO shards need all of them. Raises UserError where a score is not finite.
    """
    sums: Tensor | None = None
    for indices in plan_batches(trees, runtime.world_size, padding=padding):
        mine = indices[runtime.rank :: runtime.world_size]
        batch = collate([trees[i] for i in mine or indices[:1]], runtime.device)
        log_prob_SN = log_probabilities(batch).double()
        if sums is None:  # The last row counts the targets that were added.
            sums = torch.zeros(len(log_prob_SN) + 1, texts, dtype=torch.float64, device=runtime.device)
        if mine:
            sums.index_add_(1, batch.text_ids_N, torch.cat([log_prob_SN, torch.ones_like(log_prob_SN[:1])]))
    if sums is None:
        raise UserError(
            "the tasks have nothing to score: every text is empty or equals its alternatives; fetch them again"
        )
    if runtime.world_size > 1:
        torch.distributed.all_reduce(sums)
    scores_SI, counted_I = sums[:-1].cpu(), sums[-1].cpu()
    text_ids = torch.tensor(list(chain.from_iterable(tree.text_ids for tree in trees)))
    if not torch.equal(counted_I.long(), torch.bincount(text_ids, minlength=texts)):
        raise ValueError("some tokens were scored by no rank or by several")
    if not scores_SI.isfinite().all():
        raise UserError("a score is not finite: the model has diverged, or its weights are damaged; take another")
    return scores_SI


def collate(trees: Sequence[TokenTree], device: torch.device) -> TreeBatch:
    """Returns trees as one batch. No token attends to padding, and nothing is predicted from it."""
    length = max(len(tree.tokens) for tree in trees)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists], device=device)

    def joined(lists: list[list[int]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(lists)), device=device)

    rows, state_ids = [], []
    for b, tree in enumerate(trees):
        state_ids.append([len(rows) + state_id for state_id in tree.state_ids])
        rows += [b * length + row for row in tree.rows]
    return TreeBatch(
        tokens_BL=padded([tree.tokens for tree in trees], 0),
        position_ids_BL=padded([tree.position_ids for tree in trees], 0),
        # Padding attends to itself, because the softmax over nothing would be NaN.
        subtree_ends_BL=padded([tree.subtree_ends for tree in trees], length),
        branched=any(min(tree.subtree_ends) < len(tree.tokens) for tree in trees),
        rows_U=torch.tensor(rows, device=device),
        targets_N=joined([tree.targets for tree in trees]),
        state_ids_N=joined(state_ids),
        text_ids_N=joined([tree.text_ids for tree in trees]),
    )


def model_log_probabilities(models: Sequence[LanguageModel], omega: Sequence[float] | None = None) -> LogProbabilities:
    """Returns `target_log_probabilities` as a function of a batch, for models of one vocabulary."""

    def log_probabilities(batch: TreeBatch) -> Tensor:
        streams = []
        for model in models:
            if batch.branched:
                tree = batch.tokens_BL, batch.position_ids_BL, batch.subtree_ends_BL, batch.rows_U
                streams.append(model.project(model.tree_states(*tree)))
            else:
                streams.append(model.project(model(batch.tokens_BL, batch.rows_U)))
        return target_log_probabilities(streams, batch.state_ids_N, batch.targets_N, omega)

    return log_probabilities


def cohort_log_probabilities(cohort: Cohort, omega: Sequence[float] | None = None) -> LogProbabilities:
    """Returns what `model_log_probabilities` does for the students of a run, however ZeRO shards them.

    The trees must not share prefixes. Call the function under `cohort.evaluating()`.
    """

    def log_probabilities(batch: TreeBatch) -> Tensor:
        with cohort.streams(Batch(batch.tokens_BL, batch.targets_N, batch.rows_U)) as streams:
            return target_log_probabilities(streams, batch.state_ids_N, batch.targets_N, omega)

    return log_probabilities


def target_log_probabilities(
    streams: Sequence[Projected], state_ids_N: Tensor, targets_N: Tensor, omega: Sequence[float] | None = None
) -> Tensor:
    """Returns the log-probabilities of the targets in nats, [S, N] fp32, from logits in fp32.

    Each target is predicted by one of every model's hidden states [U, D]. With several models the last row is the
    ensemble's: the log-softmax of the mean of their logits, weighted by ω [S], whose sum is 1 (None: equal weights).
    """
    heads = [(weight.float(), None if bias is None else bias.float()) for _, weight, bias in streams]
    several = len(streams) > 1
    omega = omega or [1 / len(streams)] * len(streams)
    chunk = max(1, MAX_LOGITS // len(streams[0].weight))
    log_prob_SN = torch.empty(len(streams) + several, len(targets_N), device=targets_N.device)
    for start in range(0, len(streams[0].hidden), chunk):
        in_chunk_n = ((state_ids_N >= start) & (state_ids_N < start + chunk)).nonzero().squeeze(1)
        state_ids_n, targets_n = state_ids_N[in_chunk_n] - start, targets_N[in_chunk_n]
        mean_uV: Tensor | None = None
        for i, (stream, (weight_VD, bias_V)) in enumerate(zip(streams, heads, strict=True)):
            logits_uV = stream.hidden[start : start + chunk].float() @ weight_VD.T
            if bias_V is not None:
                logits_uV += bias_V
            if several:
                mean_uV = omega[i] * logits_uV if mean_uV is None else mean_uV.add_(logits_uV, alpha=omega[i])
            log_prob_SN[i, in_chunk_n] = _log_softmax_at(logits_uV, state_ids_n, targets_n)
        if mean_uV is not None:
            log_prob_SN[-1, in_chunk_n] = _log_softmax_at(mean_uV, state_ids_n, targets_n)
    return log_prob_SN


def _log_softmax_at(logits_uV: Tensor, rows_n: Tensor, columns_n: Tensor) -> Tensor:
    """Returns log_softmax(logits)[rows, columns], with fewer passes over the logits than log_softmax makes.

    It subtracts no maximum before the exponential. Where that overflows, or a row's sum vanishes, it takes log_softmax.
    """
    total_u = logits_uV.exp().sum(-1)
    if not ((total_u > 1e-30) & (total_u < torch.inf)).all():
        return logits_uV.log_softmax(-1)[rows_n, columns_n]
    return logits_uV[rows_n, columns_n] - total_u.log()[rows_n]
