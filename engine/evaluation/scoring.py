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
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.cohort import Cohort
from engine.data import Batch
from engine.models.families import Model, projected
from engine.models.llama import Block, Llama, rotary_table
from engine.runtime import Runtime
from kernels import Projected

TOKENS_A_BATCH = 4096
TOKENS_A_STRAND = 64  # longer ones share more and attend to more
LONGEST = 512  # of strands whose texts have most in common
LOGITS_AT_ONCE = 2**23  # elements: more rows feed the matrix product better, fewer stay in the cache


@dataclass(frozen=True)
class Strand:
    tokens: list[int]
    positions: list[int]  # of each token in its own text
    ends: list[int]  # behind the last token that has this one on its way from the root, and so sees it
    rows: list[int]  # places in `tokens` that predict something
    sources: list[int]  # per target: the place in `rows` that predicts it
    targets: list[int]
    owners: list[int]  # per target: the text it belongs to


@dataclass(frozen=True)
class StrandBatch:
    tokens_BL: Tensor
    positions_BL: Tensor
    ends_BL: Tensor
    branched: bool  # False: plain causal texts
    rows_U: Tensor  # places in the flattened tokens
    sources_N: Tensor  # places in rows_U
    targets_N: Tensor
    owners_N: Tensor


LogProbabilities = Callable[[StrandBatch], Tensor]  # [S, N] fp32, nats, of a batch's targets


def causal_strands(texts: Sequence[list[int]], firsts: Sequence[int], *, share: bool) -> list[Strand]:
    """The strands of texts for a model that reads from left to right.

    Args:
        texts: token ids.
        firsts: the place in each text where its scored part begins; nothing predicts the very first token.
        share: compute what texts begin with once (`hidden_states`); else each text is a strand of its own.
    """
    strands: list[Strand] = []
    whole = [i for i, (ids, first) in enumerate(zip(texts, firsts, strict=True)) if len(ids) > max(first, 1)]
    path: list[int] = []  # places in the strand of the last text's tokens
    last: list[int] = []
    for i in sorted(whole, key=lambda i: texts[i]) if share else whole:
        inputs = texts[i][:-1]
        common = in_common((last, inputs))
        size = len(inputs) - common + (len(strands[-1].tokens) if strands else 0)
        if not share or not strands or (size > TOKENS_A_STRAND and (2 * common < len(inputs) or size > LONGEST)):
            strands.append(Strand([], [], [], [], [], [], []))
            path, common = [], 0
        strand = strands[-1]
        del path[common:]
        path += range(len(strand.tokens), len(strand.tokens) + len(inputs) - common)
        strand.tokens.extend(inputs[common:])
        strand.positions.extend(range(common, len(inputs)))
        strand.ends.extend([0] * (len(inputs) - common))
        for place in path:
            strand.ends[place] = len(strand.tokens)
        known = {row: number for number, row in enumerate(strand.rows)}
        for at in range(max(firsts[i], 1), len(texts[i])):
            row = path[at - 1]
            strand.sources.append(known.setdefault(row, len(known)))
            if len(known) > len(strand.rows):
                strand.rows.append(row)
        strand.targets.extend(texts[i][max(firsts[i], 1) :])
        strand.owners.extend([i] * (len(texts[i]) - max(firsts[i], 1)))
        last = inputs
    return strands


def in_common(texts: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with."""
    first, last = min(texts), max(texts)  # what these two share, those between share too
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def masked_strands(ids: list[int], scored: Sequence[int], mask: int, owner: int) -> list[Strand]:
    """The copies of a text whose log-probabilities make its pseudo-log-likelihood: in each, one token is masked
    (Salazar et al. 2020, eq. 1). `ids` with whatever the model wants around a text, `scored` the places of the text."""
    places, ends = list(range(len(ids))), [len(ids)] * len(ids)
    return [Strand([*ids[:at], mask, *ids[at + 1 :]], places, ends, [at], [0], [ids[at]], [owner]) for at in scored]


def plan(strands: Sequence[Strand], world: int, *, padding: bool) -> list[list[int]]:
    """Strands by length, in rounds of bounded size, the same on every rank; without `padding` all of equal length."""
    order = sorted(range(len(strands)), key=lambda i: len(strands[i].tokens))
    rounds: list[list[int]] = []
    for i in order:
        length = len(strands[i].tokens)
        full = not rounds or (len(rounds[-1]) + 1) * length > TOKENS_A_BATCH * world
        if full or (not padding and len(strands[rounds[-1][-1]].tokens) != length):
            rounds.append([])
        rounds[-1].append(i)
    return rounds


def score(
    strands: Sequence[Strand], texts: int, log_probabilities: LogProbabilities, runtime: Runtime, *, padding: bool
) -> Tensor:
    """[S, I] float64 on the CPU: each text's summed log-probability, 0 where it has nothing to predict; collective.

    Every rank takes every world-th strand of a round, and meets the others in every round, as sharded models need it.
    Raises ValueError where a score is not finite or not whole.
    """
    sums: Tensor | None = None
    for indices in plan(strands, runtime.world, padding=padding):
        mine = indices[runtime.rank :: runtime.world]
        batch = batch_of([strands[i] for i in mine or indices[:1]], runtime.device)
        found_SN = log_probabilities(batch).double()
        if sums is None:  # the last row counts what was added
            sums = torch.zeros(len(found_SN) + 1, texts, dtype=torch.float64, device=runtime.device)
        if mine:
            sums.index_add_(1, batch.owners_N, torch.cat([found_SN, torch.ones_like(found_SN[:1])]))
    if sums is None:
        raise ValueError("nothing to score: every text is empty, or equal to its alternatives")
    if runtime.world > 1:
        torch.distributed.all_reduce(sums)
    scores_SI, counted_I = sums[:-1].cpu(), sums[-1].cpu()
    expected_I = torch.bincount(torch.tensor([owner for s in strands for owner in s.owners]), minlength=texts)
    if not torch.equal(counted_I.long(), expected_I):
        raise ValueError("some tokens were not scored on any rank: no score of a part is given out as the whole")
    if not scores_SI.isfinite().all():
        raise ValueError("a score is not finite: the model has diverged, or its weights are damaged")
    return scores_SI


def batch_of(strands: list[Strand], device: torch.device) -> StrandBatch:
    """The strands one below the other. Padding stands behind, and takes no part in anything."""
    length = max(len(s.tokens) for s in strands)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([x + [fill] * (length - len(x)) for x in lists], device=device)

    def joined(lists: Sequence[Sequence[int]], step: Sequence[int]) -> Tensor:
        return torch.tensor([x + shift for xs, shift in zip(lists, step, strict=True) for x in xs], device=device)

    before = [0]  # hidden states of the strands above
    for strand in strands:
        before.append(before[-1] + len(strand.rows))
    return StrandBatch(
        tokens_BL=padded([s.tokens for s in strands], 0),
        positions_BL=padded([s.positions for s in strands], 0),
        ends_BL=padded([s.ends for s in strands], length),  # padding sees itself: a row that sees nothing would be NaN
        branched=any(min(s.ends) < len(s.tokens) for s in strands),
        rows_U=joined([s.rows for s in strands], [b * length for b in range(len(strands))]),
        sources_N=joined([s.sources for s in strands], before[:-1]),
        targets_N=torch.tensor(list(chain.from_iterable(s.targets for s in strands)), device=device),
        owners_N=torch.tensor(list(chain.from_iterable(s.owners for s in strands)), device=device),
    )


def model_log_probabilities(models: Sequence[Model], omega: Sequence[float] | None = None) -> LogProbabilities:
    """Scores by models of one vocabulary and, where there are several, their ensemble, weighted by ω (None: alike)."""

    def log_probabilities(batch: StrandBatch) -> Tensor:
        hidden = [hidden_states(model, batch) for model in models]
        streams = [projected(model, hidden_UD) for model, hidden_UD in zip(models, hidden, strict=True)]
        return project(streams, batch.sources_N, batch.targets_N, omega)

    return log_probabilities


def cohort_log_probabilities(cohort: Cohort, omega: Sequence[float] | None = None) -> LogProbabilities:
    """The same by the students of a run, wherever ZeRO keeps them; their strands must not share (`causal_strands`).

    Call it under `cohort.evaluating()`.
    """

    def log_probabilities(batch: StrandBatch) -> Tensor:
        hidden = [student.body(Batch(batch.tokens_BL, batch.targets_N, batch.rows_U)) for student in cohort]
        with cohort.heads():
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
    chunk = max(1, LOGITS_AT_ONCE // len(streams[0].weight))
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


def hidden_states(model: Model, batch: StrandBatch) -> Tensor:
    """[U, D] of the batch's rows.

    The model's own forward pass where no strand branches. Else, of a LLaMA alone, its layers, one by one, with each
    token's position in its own text, and attention along the way from the root; all the rest sees one long row of
    tokens.
    """
    if not batch.branched:
        return model(batch.tokens_BL, batch.rows_U)
    assert isinstance(model, Llama), "strands of other families do not branch: ZeroShot(share=False)"
    rows, length = batch.tokens_BL.shape
    table = rotary_table(model.shape.positions, model.shape.head_width, model.shape.rope_theta, batch.tokens_BL.device)
    cos, sin = (x[batch.positions_BL.flatten()] for x in table)
    places_L = torch.arange(length, device=batch.ends_BL.device)
    hidden_BLL = (batch.ends_BL[:, None, :] <= places_L[:, None]) | (places_L > places_L[:, None])
    bias_B1LL = torch.zeros(rows, 1, length, length, device=places_L.device, dtype=model.head.dtype)
    bias_B1LL.masked_fill_(hidden_BLL[:, None], -torch.inf)

    branch_1ND, residual_1ND = model.embed_tokens(batch.tokens_BL.view(1, -1)), None
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention = layer.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        x_1ND, between_1ND = layer.input_layernorm(branch_1ND, residual_1ND)
        q, k, v = (project(x_1ND).unflatten(-1, (-1, attention.width)) for project in projections)
        q, k = kernels.rotary(q, k, cos, sin)
        q, k, v = (x.view(rows, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        mixed_BHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1LL, enable_gqa=q.shape[1] != k.shape[1])
        mixed_1ND = attention.o_proj(mixed_BHLd.transpose(1, 2).reshape(1, rows * length, -1))
        x_1ND, residual_1ND = layer.post_attention_layernorm(mixed_1ND, between_1ND)
        branch_1ND = layer.mlp(x_1ND)
    assert residual_1ND is not None, "there is at least one layer"
    hidden_UD, _ = model.norm(branch_1ND[0, batch.rows_U], residual_1ND[0, batch.rows_U])
    return hidden_UD
