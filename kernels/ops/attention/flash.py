"""Attention by flash-attn (Dao 2023), where it is installed and supports the inputs."""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.registration import constant_when_traced


def usable(q: Tensor) -> bool:
    """Returns whether flash-attn can run: on CUDA from Ampere on, in bf16 or fp16, with D_head ≤ 256."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _runs_on(q.device)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """See `kernels.attention`. Its backward pass sums in no fixed order, unless torch's deterministic mode is on."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q, k, v, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled())


@functools.cache
@constant_when_traced  # A tracer cannot follow the search for a module, but it does look through a cache.
def _runs_on(device: torch.device) -> bool:
    return find_spec("flash_attn") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
