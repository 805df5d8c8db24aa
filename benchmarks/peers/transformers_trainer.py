"""Distillation as Baby Llama does it (Timiryasov & Tastet 2023): the loss of a Hugging Face Trainer runs the teachers.

Without teachers it is plain training by the Trainer. It needs `accelerate`.

B sequences, L positions, N = B·L tokens, V vocabulary, K teachers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.gate import Gate
from benchmarks.peers.eager import objective_losses
from benchmarks.peers.transformers_loop import logits, read
from engine.config.settings import Config
from engine.data.batches import Step


class DistillationTrainer(Trainer):
    def __init__(self, config: Config, device: torch.device, steps: Iterator[Step], gate: Gate) -> None:
        (student,), optimizer, train = config.students, config.optimizer, config.train
        self.objective = config.objective
        self.teachers = [read(teacher.path, device).eval().requires_grad_(False) for teacher in config.teachers]
        self.gate = gate
        super().__init__(
            model=read(student.init, device),
            train_dataset=_Batches(steps),
            callbacks=[_Pause(gate)],
            args=TrainingArguments(
                output_dir=config.run.folder,
                max_steps=train.steps,
                per_device_train_batch_size=train.batch,
                learning_rate=student.learning_rate,
                lr_scheduler_type="constant",
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_epsilon=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                max_grad_norm=optimizer.clip,
                bf16=train.precision == "bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                report_to="none",
                logging_steps=train.steps,
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
        )

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)  # pyright: ignore[reportArgumentType]

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        (student,) = logits([model], inputs["input_ids"])
        with torch.no_grad():
            teacher_logits = logits(self.teachers, inputs["input_ids"])
        (loss,) = objective_losses([student], teacher_logits, inputs["targets"], self.objective)
        self.gate.losses = [loss.item()]
        return loss


class _Batches(IterableDataset):
    """The whole batches that the engine reads."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in self.steps:
            (batch,) = step.micro_batches
            yield {"input_ids": batch.tokens_BL, "targets": batch.targets_N}


class _Pause(TrainerCallback):
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.pause()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.gate.pause()
