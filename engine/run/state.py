"""What a run has come to: everything that a checkpoint keeps beside the students."""

import base64
from dataclasses import dataclass
from typing import Any

import torch

from engine.compute.usage import Usage


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on, beside its students. `engine.run.run.Run` owns it; others only read it."""

    data: str  # hash of the prepared data
    teachers: tuple[str, ...] = ()  # one hash per teacher's folder (engine.teachers.teachers)
    topology: str = ""  # ranks and ZeRO stage, for the record: what is stored depends on neither
    step: int = 0  # steps finished
    tokens: int = 0  # tokens of text read
    words: int = 0  # words that began in them
    updates: int = 0  # optimizer updates: the steps less those that were skipped
    skipped_in_a_row: int = 0
    usage: Usage = Usage()
    metrics_position: int = 0  # bytes of metrics.jsonl
    best_step: int | None = None
    best_loss: float | None = None  # nats per token, mean over the students
    best: tuple[dict[str, Any], ...] = ()  # per student: what the evaluation at best_step gave
    omega: tuple[float, ...] = ()  # the students' weights; empty where they have none
    outer_updates: int = 0  # updates of omega
    random_state: str = ""  # torch's generator on rank 0, base64


def random_state() -> str:
    """Returns the state of torch's generator on the CPU, in base64."""
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def set_random_state(state: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
