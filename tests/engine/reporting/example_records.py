"""The records of a small run: two students and a teacher, eight steps, an evaluation."""

from engine.reporting.records import EvaluationRecord, Record, StepRecord


def step_record(step: int, ce: float = 3.0) -> StepRecord:
    student = {"loss": ce, "ce": ce, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 9e3}
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 100,
        "tokens": 512 * step,
        "seconds": 0.1,
        "tokens_per_second": 5120.0,
        "students": {name: {**student, "model_flops_per_second": 1e9, "clipped": False} for name in ("small", "large")},  # pyright: ignore[reportReturnType]
        "kl": [[0.0, 0.25, 0.75], [0.5, 0.0, 1.5]],
    }


EVALUATION: EvaluationRecord = {
    "kind": "evaluation",
    "step": 4,
    "students": {
        "small": {"validation_loss": 3.5, "pairs_accuracy": 0.625},
        "large": {"validation_loss": 3.25, "pairs_accuracy": 0.75},
    },
}

RUN: list[Record] = [
    {"kind": "streams", "step": 0, "students": ["small", "large"], "teachers": ["gpt2"]},
    *(step_record(step, ce=4 - step / 4) for step in range(1, 5)),
    EVALUATION,
    *(step_record(step, ce=4 - step / 4) for step in range(5, 9)),
]
