"""Dropout without a generator: whether an element is kept depends on its sample's number and its place alone.

So the mask is the same for any number of ranks, size of micro-batch and device, under recomputation, and after a
resume. It is a hash of (seed, site, element): each row of a tensor gets a well mixed 32-bit key, and each element one
round of mixing.

B sequences, L positions, H heads.
"""

import math

import torch
from torch import Tensor

import kernels

_GOLDEN = 0x9E3779B9  # 2^32/φ: its multiples spread evenly.


def dropout_seeds(seed: int, samples_B: Tensor) -> Tensor:
    """Returns one seed per sequence, [B] int64, from the model's and the sequences' numbers, which differ each step."""
    return _mix(samples_B + seed * _GOLDEN % 2**63)


def seeds_in_use(dropout_seeds_B: Tensor | None, probability: float, *, training: bool) -> Tensor | None:
    """Returns the seeds where something is dropped, else None; raises ValueError where they are missing."""
    if not training or probability == 0:
        return None
    if dropout_seeds_B is None:
        raise ValueError(f"dropout={probability} in training needs dropout_seeds_B, a number for every sequence")
    return dropout_seeds_B


def dropout(x: Tensor, probability: float, dropout_seeds_B: Tensor | None, site: int) -> Tensor:
    """Returns x [B, ..., W], where each element is 0 with `probability` and else divided by 1 − probability.

    The source is Srivastava et al. 2014. Without seeds it returns x itself. Every place in a model where something is
    dropped has a number of its own, `site`.
    """
    if dropout_seeds_B is None or probability == 0:
        return x
    rows = torch.arange(x[0].numel() // x.shape[-1], device=x.device)
    keys = _mix(_mix(dropout_seeds_B + site * _GOLDEN)[:, None] + rows).to(torch.int32).view(*x.shape[:-1], 1)
    columns = (torch.arange(x.shape[-1], device=x.device) * _GOLDEN).to(torch.int32)
    hashed = keys + columns
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):  # lowbias32 (Wellons 2018)
        hashed.bitwise_xor_(hashed >> shift).mul_(factor)
    return torch.where(hashed >= int((probability - 0.5) * 2**32), x * (1 / (1 - probability)), 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, probability: float, dropout_seeds_B: Tensor | None, site: int, *, causal: bool
) -> Tensor:
    """Returns `kernels.attention` of q, k, v [B, L, H, D_head]; with seeds, its weights are dropped out."""
    if dropout_seeds_B is None:
        return kernels.attention(q, k, v, causal=causal)
    # Fused attention draws its dropout from a generator and not per sample, so the scores are formed here.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores_BHLL = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        later_LL = torch.ones(scores_BHLL.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores_BHLL = scores_BHLL.masked_fill(later_LL, -torch.inf)
    return (dropout(scores_BHLL.softmax(-1), probability, dropout_seeds_B, site) @ v).transpose(1, 2)


def _mix(x: Tensor) -> Tensor:
    """Applies SplitMix64's finalizer (Steele et al. 2014) with arithmetic shifts: every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)
