"""The students: each a model in a DeepSpeed engine of its own, all stepping together or not at all.

Every rank holds every student; ZeRO shards a student's optimizer state, gradients and, at stage 3, parameters.
Gradients reach an engine through its own loss alone, so that no graph is shared between engines.

B sequences, L positions, N tokens, D hidden, V vocabulary, S students.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from engine.config import OptimizerConfig, StudentConfig, TrainConfig
from engine.data import Batch
from engine.models.classifier import Classifier
from engine.models.compiled import compile_body
from engine.models.dropout import draws
from engine.models.families import Model, model_of, projected, shape_of
from engine.models.llama import initialise
from engine.models.roberta import Roberta
from engine.runtime import Runtime
from kernels import Projected

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's own default, far above what a small student needs

Record = Mapping[
    str, Tensor
]  # one student's fp32 state on the CPU: "weight/<name>", "exp_avg/<name>", "exp_avg_sq/<name>"


@dataclass
class Stopwatch:
    """Seconds spent on one student's own work: on a GPU between events on its stream, else by the wall clock."""

    device: torch.device
    _wall: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._wall += time.perf_counter() - begin

    def take(self) -> float:
        """Seconds since the last call; on a GPU, waits for the events."""
        seconds = self._wall
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._wall, self._events = 0.0, []
        return seconds


class Student:
    """One model and its engine."""

    def __init__(
        self,
        config: StudentConfig,
        model: Model | Classifier,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
    ) -> None:
        """`model` as training begins with it: the engine copies, casts and shards what it holds."""
        self.config, self.name, self.runtime = config, config.name, runtime
        self.zero_stage = train.stage(runtime.world)
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
        # What the fused AdamW divides every gradient by, in the pass that it makes anyhow (torch's own gradient scaler
        # sets it for its loss scale).
        self.clip, self.divisor = optimizer.clip, torch.ones((), device=runtime.device)
        self.optimizer.grad_scale = self.divisor  # pyright: ignore[reportAttributeAccessIssue]
        self.engine: Any = deepspeed.initialize(
            model=model.to(runtime.device),
            optimizer=self.optimizer,
            config=engine_settings(train, self.parameters, runtime.world),
        )[0]
        # At stage 0 it would copy all gradients together and back, even for one rank.
        self.engine.enable_backward_allreduce = runtime.world > 1 or self.zero_stage > 0
        self.model: Model = self.engine.module
        if train.compile:
            compile_body(self.model, learns=True)
        self._parameters = list(self.model.parameters())
        self._make_moments()

    def body(self, batch: Batch) -> Tensor:
        """Hidden states [N, D] of the batch, through the engine, so that its hooks see the pass."""
        inputs = [batch.tokens_BL, batch.rows_N]
        if self.config.dropout > 0 and batch.samples_B is not None:
            inputs.append(draws(self.config.seed, batch.samples_B))
        with self.clock.running() if torch.is_grad_enabled() else nullcontext():  # evaluation is not training time
            return self.engine(*inputs)

    def project(self, hidden_ND: Tensor) -> Projected:
        return projected(self.model, hidden_ND)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` micro-batch of a step: also reduce it over the ranks.

        ZeRO divides by the number of ranks, but the loss is normalised by the tokens of all of them: hence the factor.
        """
        with self.clock.running():
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * self.runtime.world, scale_wrt_gas=False)

    def squared_gradient_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm, 0-d fp32, after the last micro-batch's reduction."""
        if self.zero_stage == 0:  # every rank holds the whole gradient
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            share = 1 / self.runtime.world
        else:
            gradients = [g for group in self.engine.optimizer.averaged_gradients.values() for g in group]
            share = 1.0
        # On a GPU one launch for many gradients; what torch.nn.utils has would round bf16's norms to bf16.
        norms = torch._foreach_norm(gradients, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack(norms).square().sum() * share

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """One update, the gradient scaled down to the norm `clip` where its own is larger (0: never)."""
        with self.clock.running():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            excess = (gradient_norm + 1e-6) / self.clip if self.clip > 0 else 1.0
            self.divisor.fill_(max(1.0, excess))
            self.engine.step()

    def discard(self) -> None:
        """Forget the accumulated gradients; parameters and optimizer state stay bit for bit."""
        if self.zero_stage == 0:
            self.engine.zero_grad()
            return
        # ZeRO keeps reduced gradients in many places and knows how to drop them all in one case: when it looks for a
        # NaN on its way to the update, and meets one. So it looks, this once, and meets one, on every rank.
        for group in self.engine.optimizer.averaged_gradients.values():
            for gradient in group:
                gradient.fill_(math.nan)
        self.engine.optimizer.check_grad_overflow = True
        self.engine.step()
        self.engine.optimizer.check_grad_overflow = False

    def record(self) -> dict[str, Tensor]:
        """The whole fp32 state, on every rank, whatever shards it; a collective call.

        DeepSpeed's accessors gather what ZeRO shards; they know nothing of stage 0, where all is read off directly.
        """
        record: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if self.zero_stage == 0:
                state = self.optimizer.state[parameter]
                values = [parameter.detach(), *(state[moment] for moment in MOMENTS)]
            else:
                values = [safe_get_full_fp32_param(parameter)]
                values += [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
            for kind, value in zip(("weight", *MOMENTS), values, strict=True):
                assert value is not None, f"DeepSpeed has no fp32 {kind} for {name}"
                record[f"{kind}/{name}"] = value.to("cpu", copy=True)
        return record

    def restore(self, record: Record, updates: int) -> None:
        """Set fp32 weights and moments from `record`, after `updates` steps; the model was made with these weights."""
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
        for name, parameter in self.model.named_parameters():
            if self.zero_stage > 0:
                safe_set_full_fp32_param(parameter, record[f"weight/{name}"].to(self.runtime.device))
            for moment in MOMENTS:
                value = record[f"{moment}/{name}"].to(self.runtime.device)
                if self.zero_stage == 0:
                    self.optimizer.state[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _make_moments(self) -> None:
        """Give AdamW its state now, on whatever tensors ZeRO put in the parameters' place.

        By itself it would do so in its first step. But DeepSpeed's accessors, which checkpoints need, link to the state
        after the first parameter group has stepped, and so would find none for the second; nor any before a step.
        """
        if self.zero_stage == 0:
            optimized = list(self.model.parameters())
        elif self.zero_stage == 3:
            optimized = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            optimized = self.engine.optimizer.single_partition_of_fp32_groups
        for tensor in optimized:
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


@dataclass(frozen=True)
class Outcome:
    """How a step ended, the same on every rank."""

    gradient_norms: list[float]  # per student, before clipping; NaN or infinite where that student's step was bad
    bad: list[int]  # students that are the cause of a loss or gradient that is not finite: if any, nobody stepped
    stop: bool  # some rank was asked to stop


def new_model(
    config: StudentConfig, vocabulary: int, weights: Record | None = None, *, recompute: bool = False
) -> Model:
    """A student's model: with those weights, or as its seed draws them."""
    model = model_of(shape_of(config, vocabulary), recompute=recompute)
    if weights is None:
        initialise(model, config.seed)
    else:
        set_weights(model, weights)
    return model


@torch.no_grad()
def set_weights(model: nn.Module, weights: Record) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[f"weight/{name}"])


class Cohort(Sequence[Student]):
    """All students of a run."""

    def __init__(self, students: Sequence[Student], runtime: Runtime) -> None:
        self._students, self._runtime = list(students), runtime

    def __len__(self) -> int:
        return len(self._students)

    def __getitem__(self, index: Any) -> Any:
        return self._students[index]

    @contextmanager
    def heads(self) -> Iterator[None]:
        """Every head whole on every rank: under ZeRO 3 from the loss to the end of the backward pass.

        Begin after the bodies have run: a body releases the embedding it has used, and with it a tied head.
        """
        models = [student.model for student in self if student.zero_stage == 3]
        sharded = [model.head for model in models] + [m.head_bias for m in models if isinstance(m, Roberta)]
        with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
            yield

    def step(self, losses_S: Tensor, ce_S: Tensor, learning_rates: Sequence[float], *, stop: bool) -> Outcome:
        """Every student steps, or none if the loss or the gradient of one is not finite on any rank.

        `losses_S` and their cross-entropies `ce_S` are this rank's, summed over micro-batches. One collective and one
        wait for the device decide it, and carry the wish to stop along.
        """
        squares_S = torch.stack([student.squared_gradient_norm() for student in self])
        # Multiplied by zero, what is finite vanishes, and what is not becomes NaN.
        verdict = torch.cat([squares_S + 0.0 * losses_S.float(), 0.0 * ce_S.float(), squares_S.new_tensor([stop])])
        numbers = self._runtime.agree(verdict)
        norms = [math.sqrt(square) if square >= 0 else math.nan for square in numbers[: len(self)]]
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        # Through the divergence one student's NaN reaches the losses of all; a cross-entropy is a student's own.
        own = [i for i, zero in enumerate(numbers[len(self) : -1]) if zero != 0]
        for student, learning_rate, norm in zip(self, learning_rates, norms, strict=True):
            if bad or own:
                student.discard()
            else:
                student.step(learning_rate, norm)
        return Outcome(norms, own or bad, stop=numbers[-1] > 0)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        for student in self:
            student.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for student in self:
                student.engine.train()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, the vectors, do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def engine_settings(train: TrainConfig, parameters: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one student: the loop owns batches and boundaries, it reduces and updates."""
    stage = train.stage(world)
    bucket = min(parameters, LARGEST_BUCKET)  # allocated whole, for each student: its default would be 2 GB
    return {
        "train_micro_batch_size_per_gpu": 1,  # it wants one; the loop makes its own batches
        "train_batch_size": world,
        "gradient_clipping": 0.0,  # its default is 1; `Student.step` clips within the optimizer's one pass
        # Nor does it look for infinities and norms, and wait for them: `Cohort.step` has, for all students at once.
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
        # With fp32 here, bf16 at stage 1 would get another optimizer, one that does not do for several engines.
        "data_types": {"grad_accum_dtype": "bf16" if train.precision == "bf16" else "fp32"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "compute_grad_norm": stage not in (1, 2),  # only they can do without
            "contiguous_gradients": stage == 3,  # at 1 and 2, two copies of each gradient, one parameter at a time
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LARGEST_BUCKET,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
