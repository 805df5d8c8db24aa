"""Plain training, distillation and deep mutual learning (Zhang et al. 2018) as a user of `transformers` writes them.

The loop computes the logits of every student and teacher and the losses in torch, and has one AdamW per student. With
`compiled` models and loss go through `torch.compile`; with `liger` they use Liger's kernels. bf16 is autocast over fp32
weights.

B sequences, L positions, N = B·L tokens, V vocabulary, S students, K teachers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# AutoModelForCausalLM would import these later, when memory counts as the variant's.
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.utils import logging

from benchmarks.peers import eager
from engine.config.settings import Config


class Loop:
    """S students and their optimizers, K teachers, from the folders that the settings name."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        compiled: bool = False,
        fused: bool | None = None,
        liger: bool = False,
    ) -> None:
        """Reads the models. `fused` is AdamW's; its default on a CPU is a loop over parameters."""
        optimizer = config.optimizer
        self.objective, self.clip, self.device = config.objective, optimizer.clip, device
        self.bf16 = config.train.precision == "bf16"
        self.models = [read(student.init, device).train() for student in config.students]
        teachers = [read(teacher.path, device).eval().requires_grad_(False) for teacher in config.teachers]
        self.losses: Any = eager.objective_losses
        if liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            from benchmarks.peers.liger import objective_losses

            self.losses = objective_losses
            for model in (*self.models, *teachers):  # Their own losses give no logits, which ours need.
                _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
        self.optimizers = []
        for student, model in zip(config.students, self.models, strict=True):
            groups = [
                {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ]
            self.optimizers.append(
                torch.optim.AdamW(
                    groups, lr=student.learning_rate, betas=optimizer.betas, eps=optimizer.eps, fused=fused
                )
            )
        self.forwards: list[Any] = self.models
        self.teachers: list[Any] = teachers
        if compiled:
            self.forwards = [torch.compile(model) for model in self.models]
            self.teachers = [torch.compile(model) for model in teachers]
            self.losses = torch.compile(self.losses)

    def step(self, tokens_BL: Tensor, targets_N: Tensor) -> list[float]:
        """Makes one update of every student, and returns their losses before it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                teacher_logits = logits(self.teachers, tokens_BL)
            losses = self.losses(logits(self.forwards, tokens_BL), teacher_logits, targets_N, self.objective)
        torch.stack(losses).sum().backward()  # Peers are detached, so a student gets the gradient of its own loss.
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).tolist()


def logits(models: Sequence[Any], tokens_BL: Tensor) -> list[Tensor]:
    """Returns the logits [N, V] of each model."""
    return [model(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1) for model in models]


def read(folder: str | None, device: torch.device) -> Any:
    """Returns a model in fp32, as `transformers` reads it."""
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.to(device)
