"""DeepSpeed's settings for a student, and every private name of torch or DeepSpeed that training depends on.

A private name may change with any release, so each function says what breaks then. The pins in pyproject.toml hold the
names still, and tests/engine/students/test_zero.py keeps them in this file and in engine/system/private_api.py.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from engine.config.settings import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of its state
LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's own default, far above what a small student needs


def engine_settings(train: TrainConfig, parameters: int, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's settings for one student: the loop makes the batches, DeepSpeed reduces and updates."""
    stage = train.stage(world_size)
    bucket = min(parameters, LARGEST_BUCKET)  # It is allocated whole for each student: the default would be 2 GB.
    return {
        "train_batch_size": world_size,  # DeepSpeed wants a number; the loop makes its own batches.
        "gradient_clipping": 0.0,  # The default is 1; `Student.step` clips within the optimizer's one pass.
        # DeepSpeed need not look for infinities and wait for them: `Cohort.update` does, for all students at once.
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
        # If this were fp32, bf16 at stage 1 would get another optimizer, which does not work for several engines.
        "data_types": {"grad_accum_dtype": "bf16" if train.precision == "bf16" else "fp32"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "compute_grad_norm": stage not in (1, 2),  # Only stages 1 and 2 can do without.
            "contiguous_gradients": stage == 3,  # At 1 and 2 it would copy each gradient twice.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LARGEST_BUCKET,
            "stage3_param_persistence_threshold": 0,
        },
    }


def set_divisor(optimizer: torch.optim.AdamW, divisor: Tensor) -> None:
    """Has the fused AdamW divide every gradient by `divisor`, a 0-d tensor, in the pass that it makes anyhow.

    `grad_scale` is where torch's own gradient scaler puts its loss scale. If it moved, gradients would not be clipped:
    tests/engine/students/test_parity.py compares clipped steps with plain torch.
    """
    optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]


def skip_needless_copies(engine: Any, world_size: int, stage: int) -> None:
    """Keeps a single rank at stage 0 from copying all gradients together and back before the update.

    `enable_backward_allreduce` decides that. If it were renamed, steps would only be slower again.
    """
    engine.enable_backward_allreduce = world_size > 1 or stage > 0


def make_moments(engine: Any, optimizer: torch.optim.AdamW, parameters: Sequence[Tensor], stage: int) -> None:
    """Gives AdamW its state before the first step, on the tensors that ZeRO put in the parameters' place.

    AdamW itself would make it in its first step. But DeepSpeed's accessors, which checkpoints need, link to the state
    after the first parameter group has stepped, and so would find none for the second group, nor any before a step.
    `fp32_partitioned_groups_flat` and `single_partition_of_fp32_groups` are those tensors, at stage 3 and below it;
    `_lazy_init_hp_params_optimizer_state` links the accessors. If one is renamed, no run begins at that stage.
    """
    if stage == 0:
        tensors = parameters
    elif stage == 3:
        tensors = engine.optimizer.fp32_partitioned_groups_flat
    else:
        tensors = engine.optimizer.single_partition_of_fp32_groups
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def squared_gradient_norm(engine: Any, parameters: Sequence[Tensor], stage: int) -> Tensor:
    """Returns Σ g² over the gradients that this rank holds after the last micro-batch's reduction, 0-d fp32.

    At stage 0 it holds the whole gradients, otherwise its share of them: `averaged_gradients` is where ZeRO keeps it.
    If that moved, norms would be wrong: test_parity.py compares them. On a GPU `_foreach_norm` is one launch for many
    gradients; if it were gone, every step would fail. The norms in torch.nn.utils would be rounded to bf16.
    """
    if stage == 0:
        gradients = [p.grad for p in parameters if p.grad is not None]
    else:
        gradients = [g for group in engine.optimizer.averaged_gradients.values() for g in group]
    norms = torch._foreach_norm(gradients, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def discard_gradients(engine: Any, stage: int) -> None:
    """Does what `Student.discard_gradients` says.

    ZeRO keeps reduced gradients in many places and knows how to drop them all in one case: when it looks for a NaN on
    its way to the update, and meets one. So it is told to look this once (`check_grad_overflow`), and meets a NaN on
    every rank. If that stopped working, a skipped step would poison the run: tests/engine/run/test_run.py skips steps.
    """
    if stage == 0:
        engine.zero_grad()
        return
    for group in engine.optimizer.averaged_gradients.values():
        for gradient in group:
            gradient.fill_(math.nan)
    engine.optimizer.check_grad_overflow = True
    engine.step()
    engine.optimizer.check_grad_overflow = False


def full_tensor(parameter: nn.Parameter, optimizer: torch.optim.AdamW, stage: int, kind: str) -> Tensor:
    """Returns the whole fp32 "weight", or one of MOMENTS, on every rank; a collective call where ZeRO shards it.

    DeepSpeed's accessors, which are public, do not work at stage 0, where the result is the tensor itself. Write with
    `set_full_tensor` only.
    """
    if stage == 0:
        return parameter.detach() if kind == "weight" else optimizer.state[parameter][kind]
    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, f"DeepSpeed has no fp32 {kind} for a parameter"
    return value


def set_full_tensor(
    parameter: nn.Parameter, optimizer: torch.optim.AdamW, stage: int, kind: str, value: Tensor
) -> None:
    """Overwrites the whole tensor that `full_tensor` returns with `value`."""
    if stage == 0:
        full_tensor(parameter, optimizer, stage, kind).copy_(value)
    elif kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


@contextmanager
def torch_linear() -> Iterator[None]:
    """Puts torch's own F.linear back in place for the block.

    Once an engine is under ZeRO 3, DeepSpeed replaces F.linear for the whole process, and that one has no forward mode
    of differentiation. If `torch._C._nn.linear` moved, the outer loop would fail at its first update.
    """
    linear, F.linear = F.linear, torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.linear = linear
