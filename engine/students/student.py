"""A student: a model in a DeepSpeed engine of its own.

Every rank holds every student; ZeRO shards a student's optimizer state, gradients and, at stage 3, parameters.

B sequences, L positions, N tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from engine.config.settings import OptimizerConfig, StudentConfig, TrainConfig
from engine.data.batches import Batch
from engine.models.base import LanguageModel, initial_weights
from engine.models.compiled import compile_body
from engine.models.dropout import dropout_seeds
from engine.models.families import new_model, shape_of
from engine.students import zero
from engine.students.stopwatch import Stopwatch
from engine.system.distributed import Runtime

# One student's fp32 state on the CPU: "weight/<parameter>", "exp_avg/<parameter>" and "exp_avg_sq/<parameter>".
StudentState = Mapping[str, Tensor]


class Student:
    """One model and its engine."""

    def __init__(
        self,
        config: StudentConfig,
        model: LanguageModel,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
    ) -> None:
        """Makes the engine, which copies, casts and shards the weights of `model`: training begins with them."""
        self.config, self.name, self.runtime = config, config.name, runtime
        self.zero_stage = train.stage(runtime.world_size)
        self.shape = model.shape
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.clock = Stopwatch(runtime.device)
        self.optimizer = torch.optim.AdamW(
            decay_groups(model, optimizer.weight_decay),
            lr=config.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self.clip = optimizer.clip
        self.divisor = torch.ones((), device=runtime.device)  # AdamW divides every gradient by it.
        zero.set_divisor(self.optimizer, self.divisor)
        self.engine: Any = deepspeed.initialize(
            model=model.to(runtime.device),
            optimizer=self.optimizer,
            config=zero.engine_settings(train, self.parameters, runtime.world_size),
        )[0]
        zero.skip_needless_copies(self.engine, runtime.world_size, self.zero_stage)
        self.model: LanguageModel = self.engine.module
        if train.compile:
            compile_body(self.model, learns=True)
        self._parameters = list(self.model.parameters())
        zero.make_moments(self.engine, self.optimizer, self._parameters, self.zero_stage)

    def body(self, batch: Batch) -> Tensor:
        """Returns the hidden states [N, D] of the batch, through the engine, whose hooks must see the pass."""
        inputs = [batch.tokens_BL, batch.rows_N]
        if self.config.dropout > 0 and batch.samples_B is not None:
            inputs.append(dropout_seeds(self.config.seed, batch.samples_B))
        # Evaluation is not training time.
        with self.clock.running() if torch.is_grad_enabled() else nullcontext():
            return self.engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient of `loss`; after the last micro-batch of a step, reduces it over the ranks.

        ZeRO divides by the number of ranks, but the loss is normalised by the tokens of all of them: hence the factor.
        """
        with self.clock.running():
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * self.runtime.world_size, scale_wrt_gas=False)

    def squared_gradient_norm(self) -> Tensor:
        """Returns this rank's share of the squared gradient norm, 0-d fp32, after the last micro-batch's reduction."""
        # At stage 0 every rank holds the whole gradient.
        share = 1 / self.runtime.world_size if self.zero_stage == 0 else 1.0
        return zero.squared_gradient_norm(self.engine, self._parameters, self.zero_stage) * share

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Makes one update. The gradient is scaled down to the norm `clip` where its own norm is larger."""
        with self.clock.running():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            norm_over_clip = (gradient_norm + 1e-6) / self.clip if self.clip > 0 else 1.0
            self.divisor.fill_(max(1.0, norm_over_clip))
            self.engine.step()

    def discard_gradients(self) -> None:
        """Drops the accumulated gradients; parameters and optimizer state stay bit for bit."""
        zero.discard_gradients(self.engine, self.zero_stage)

    def state(self) -> dict[str, Tensor]:
        """Returns the whole fp32 state on the CPU of every rank, whatever shards it; a collective call."""
        return {
            f"{kind}/{name}": zero.full_tensor(parameter, self.optimizer, self.zero_stage, kind).to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            for kind in ("weight", *zero.MOMENTS)
        }

    def restore(self, state: StudentState, updates: int) -> None:
        """Sets the fp32 weights and moments as they were after `updates` steps."""
        for optimizer_state in self.optimizer.state.values():
            optimizer_state["step"].fill_(updates)
        for name, parameter in self.model.named_parameters():
            for kind in ("weight", *zero.MOMENTS):
                value = state[f"{kind}/{name}"].to(self.runtime.device)
                zero.set_full_tensor(parameter, self.optimizer, self.zero_stage, kind, value)

    def full_parameters(self) -> dict[str, Tensor]:
        """Returns the whole fp32 parameters by name, on every rank; a collective call where ZeRO shards them.

        Do not write to them.
        """
        return {
            name: p.detach()
            if self.zero_stage < 3 and p.dtype == torch.float32
            else zero.full_tensor(p, self.optimizer, self.zero_stage, "weight")
            for name, p in self.model.named_parameters()
        }


def student_model(
    config: StudentConfig, vocab_size: int, state: StudentState | None = None, *, recompute: bool = False
) -> LanguageModel:
    """Returns a student's model, with the weights of `state` or as its seed draws them."""
    model = new_model(shape_of(config, vocab_size), recompute=recompute)
    if state is None:
        initial_weights(model, config.layers, config.seed)
    else:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state[f"weight/{name}"])
    return model


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups: matrices decay; norms and biases, which are vectors, do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
