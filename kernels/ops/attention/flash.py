"""flash-attn (Dao 2023), where it is installed and fits.

Shapes: B sequences, L positions, H query heads, H_kv key and value heads.
"""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.registration import constant_when_traced

WIDEST_HEAD = 256


def usable(q: Tensor, segments: Tensor | None) -> bool:
    """Whether flash-attn can run: CUDA on Ampere or newer, bf16 or fp16, D_head ≤ 256, no segments (its variable-length
    form wants the lengths of segments, and counting them would wait for the device).
    """
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= WIDEST_HEAD
        and segments is None
        and _runs_on(q.device)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """See `kernels.attention`. Its backward adds in any order, unless torch is asked for deterministic algorithms."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(
        q, k, v, dropout_p=dropout, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled()
    )


@functools.cache
@constant_when_traced  # a tracer does not follow the search for a module, but looks through a cache
def _runs_on(device: torch.device) -> bool:
    return find_spec("flash_attn") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
