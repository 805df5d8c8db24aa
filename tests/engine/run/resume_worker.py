"""One rank of the resume tests: runs that are killed, asked to stop, and taken up again, in one process group.

Run by test_resume.py, first with one rank, then with two in the same folder. `train` is the engine's own; a death is an
exception that unwinds it at the end of a given step. (A real SIGKILL is in tests/recipes/test_mutual.py.)
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.config.loading import build
from engine.config.settings import Config
from engine.data.batches import Step
from engine.run.checkpoint import latest, read_state, read_student
from engine.run.run import Run
from engine.students.cohort import Verdict
from engine.students.gradients import Tally
from engine.system.distributed import exit_process, init_distributed
from engine.train import train

STEPS = 24  # an epoch is about 11
STUDENTS = [
    {"name": "a", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "learning_rate": 3e-3, "seed": 1},
    {"name": "b", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "learning_rate": 3e-3, "seed": 2, "tied": False},
]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def config(folder: Path, name: str, *overrides: str) -> Config:
    settings = {
        "students": STUDENTS,
        "run": {"name": name, "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 6000, "tokenizer": {"vocab_size": 400}},
        "objective": {"ce_weight": 0.5, "peer_weight": 0.5, "weighted": True},
        "outer": {"every": 3, "sequences": 2},
        "optimizer": {"warmup": 3},
        "train": {"steps": STEPS, "batch": 16, "length": 64, "micro_batch": 4},
        "evaluation": {"every": 10, "tokens": 500, "pairs": "none", "samples": 1, "sample_tokens": 4},
        "checkpoint": {"every": 4},
    }
    return build(Config, settings, overrides)


@contextmanager
def at_step(number: int, act: Callable[[], None]) -> Any:
    """Do something when step `number` has been recorded."""
    original = Run.after_step

    def record(self: Run, step: Step, tally: Tally, verdict: Verdict) -> None:
        original(self, step, tally, verdict)
        if step.number == number:
            act()

    Run.after_step = record
    try:
        yield
    finally:
        Run.after_step = original


def die() -> None:
    raise Killed


def killed(settings: Config, step: int) -> None:
    try:
        with at_step(step, die):
            train(settings)
    except Killed:
        return
    raise AssertionError("the run was to be killed and was not")


def asked_to_stop(settings: Config, step: int, number: signal.Signals, rank: int) -> None:
    """The signal reaches one rank alone, in the middle of a sitting."""
    with at_step(step, lambda: os.kill(os.getpid(), number) if int(os.environ["RANK"]) == rank else None):
        train(settings)


def final(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = latest(folder / "runs" / name / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint).step == STEPS, checkpoint
    return {
        f"{student['name']}/{key}": tensor
        for student in STUDENTS
        for key, tensor in read_student(checkpoint, student["name"]).items()
    }


def history(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock."""
    records = []
    for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "event":  # of another number of ranks or ZeRO stage
            continue
        for key in ("seconds", "tokens_per_second", "mfu", "hfu"):
            record.pop(key, None)
        for student in record["students"].values() if isinstance(record.get("students"), dict) else ():
            student.pop("tokens_per_second", None)
            student.pop("model_flops_per_second", None)
        records.append(record)
    return records


def same_bits(folder: Path, one: str, other: str) -> bool:
    a, b = final(folder, one), final(folder, other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights(records: list[dict[str, Any]]) -> dict[str, Any]:
    """How often ω was updated, how far it got from equal, and by how much each step's loss is not
    S·ω_i·ce·CE_i + Σ_j S·ω_j·peers·KL_ij, ω the last before it: relative."""
    names = [student["name"] for student in STUDENTS]
    omega, updates, errors = dict.fromkeys(names, 1 / len(names)), 0, []
    for record in records:
        if record["kind"] == "outer":
            omega, updates = record["omega"], updates + 1
        if record["kind"] != "step":
            continue
        for i, name in enumerate(names):
            student, rows = record["students"][name], zip(names, record["kl"][i], strict=True)
            taught = sum(omega[peer] * kl for peer, kl in rows if peer != name)
            expected = len(names) * 0.5 * (omega[name] * student["ce"] + taught)
            errors.append(abs(student["loss"] / expected - 1))
    return {"updates": updates, "moved": abs(omega[names[0]] - 1 / len(names)), "error": greatest(errors)}


def greatest(values: list[float]) -> float:
    """NaN if one is: Python's own max would pass over it."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def main(folder: Path) -> None:
    runtime = init_distributed()
    whole, broken, stopped = (f"{name}-{runtime.world_size}" for name in ("whole", "broken", "stopped"))
    train(config(folder, whole))

    killed(config(folder, broken), 7)  # inside the first epoch, three steps after a checkpoint
    killed(config(folder, broken), 18)  # in the second
    train(config(folder, broken))

    asked_to_stop(config(folder, stopped), 5, signal.SIGTERM, runtime.world_size - 1)
    stopped_at = read_state(latest(folder / "runs" / stopped / "checkpoints") or Path()).step
    asked_to_stop(config(folder, stopped), 13, signal.SIGUSR1, 0)
    train(config(folder, stopped))

    for name in ("bf16", "bf16-broken") if runtime.world_size == 2 else ():
        settings = config(folder, name, "train.precision=bf16", "train.zero_stage=2")
        if name == "bf16-broken":
            killed(settings, 7)
        train(settings)

    if runtime.world_size == 1:
        asked_to_stop(config(folder, "moved", "train.zero_stage=0"), 5, signal.SIGTERM, 0)
    else:
        asked_to_stop(config(folder, "moved", "train.zero_stage=1"), 10, signal.SIGTERM, 0)
        asked_to_stop(config(folder, "moved", "train.zero_stage=2", "train.micro_batch=8"), 15, signal.SIGTERM, 1)
        train(config(folder, "moved", "train.zero_stage=3", "train.recompute=true"))
    runtime.barrier()
    if runtime.is_main_process:
        findings = {
            "broken": same_bits(folder, whole, broken),
            "broken_history": history(folder, whole) == history(folder, broken),
            "stopped": same_bits(folder, whole, stopped),
            "stopped_history": history(folder, whole) == history(folder, stopped),
            "weights": weights(history(folder, whole)),
            "stopped_at": stopped_at,
            "epochs": [r["epoch"] for r in history(folder, whole) if r["kind"] == "step"],
            "checkpoints": sorted(p.name for p in (folder / "runs" / broken / "checkpoints").iterdir()),
            "best": read_state(latest(folder / "runs" / broken / "checkpoints") or Path()).best_step,
            "pid_file": (folder / "runs" / broken / "ranks.pid").exists(),
        }
        if runtime.world_size == 2:
            pairs = [
                (a["students"][name]["ce"], b["students"][name]["ce"])
                for a, b in zip(history(folder, "whole-1"), history(folder, "moved"), strict=True)
                if a["kind"] == "step"
                for name in a["students"]
            ]
            findings["bf16"] = same_bits(folder, "bf16", "bf16-broken")
            findings["moved_losses"] = greatest([abs(a / b - 1) for a, b in pairs])
            one, other = final(folder, "whole-1"), final(folder, "moved")
            findings["moved_weights"] = greatest(
                [((one[k] - other[k]).norm() / one[k].norm()).item() for k in one if "/weight/" in k]
            )
        (folder / f"findings-{runtime.world_size}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process()
