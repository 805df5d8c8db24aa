"""Dropout without a generator: whether an element is kept depends on its sample's number, its place and nothing else.

So it is the same for any number of ranks, size of micro-batch, device, recomputation, and after a resume. A mask is a
hash of (draw, site, element): each row of a tensor gets a well mixed 32-bit key, and each element one round of mixing.

B sequences, L positions, H heads.
"""

import math

import torch
from torch import Tensor

import kernels

_GOLDEN = 0x9E3779B9  # 2^32/φ: multiples of it spread evenly


def draws(seed: int, samples_B: Tensor) -> Tensor:
    """[B] int64: what the dropout of sequences is drawn from, given a model's seed and the sequences' numbers, which
    are different in every step."""
    return _mixed(samples_B + seed * _GOLDEN % 2**63)


def dropped(x: Tensor, probability: float, draws_B: Tensor | None, site: int) -> Tensor:
    """x [B, ..., W] with each element 0 with `probability`, else divided by 1 − probability (Srivastava et al. 2014).

    None: x itself. `site` tells the places in a model apart where something is dropped.
    """
    if draws_B is None or probability == 0:
        return x
    rows = torch.arange(x[0].numel() // x.shape[-1], device=x.device)
    keys = _mixed(_mixed(draws_B + site * _GOLDEN)[:, None] + rows).to(torch.int32).view(*x.shape[:-1], 1)
    columns = (torch.arange(x.shape[-1], device=x.device) * _GOLDEN).to(torch.int32)
    hashed = keys + columns
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):  # Wellons's lowbias32
        hashed.bitwise_xor_(hashed >> shift).mul_(factor)
    return torch.where(hashed >= int((probability - 0.5) * 2**32), x * (1 / (1 - probability)), 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, probability: float, draws_B: Tensor | None, site: int, *, causal: bool
) -> Tensor:
    """`kernels.attention` of q, k, v [B, L, H, d]; given draws, with dropout of its weights."""
    if draws_B is None:
        return kernels.attention(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # whoever fuses it draws from a generator, and not per sample
    scores_BHLL = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        later_LL = torch.ones(scores_BHLL.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores_BHLL = scores_BHLL.masked_fill(later_LL, -torch.inf)
    return (dropped(scores_BHLL.softmax(-1), probability, draws_B, site) @ v).transpose(1, 2)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014), but for arithmetic shifts: every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)
