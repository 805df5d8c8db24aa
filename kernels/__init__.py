"""The kernels of a training engine: normalisation, rotary embedding, SwiGLU, attention, and the losses of distillation
and mutual learning. They know nothing of training. Each op is defined in plain torch by `kernels.ops.<op>.reference`.
"""

from kernels.dispatch import backend
from kernels.name_conflict import refuse_name_conflict
from kernels.ops.attention import attention
from kernels.ops.ensemble_kl import EnsembleKL, ensemble_kl
from kernels.ops.linear_ensemble_kl import LinearEnsembleKL, Projected, linear_ensemble_kl
from kernels.ops.rms_norm import rms_norm
from kernels.ops.rotary import rotary
from kernels.ops.swiglu import swiglu

__all__ = [
    "EnsembleKL",
    "LinearEnsembleKL",
    "Projected",
    "attention",
    "backend",
    "ensemble_kl",
    "linear_ensemble_kl",
    "rms_norm",
    "rotary",
    "swiglu",
]

refuse_name_conflict()
