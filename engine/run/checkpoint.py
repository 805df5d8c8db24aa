"""Checkpoints: one folder per saved step, whole or absent, independent of the number of ranks and the ZeRO stage.

checkpoints/step-00000200/
    <student>.safetensors     fp32 weights and both Adam moments
    state.json                the run's state (engine.run.state)
    COMMIT                    the SHA-256 of every other file
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.run.state import RunState
from engine.students.cohort import Cohort
from engine.students.student import StudentState
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.system.files import remove, sha256, written_aside


def save(folder: Path, cohort: Cohort, state: RunState, runtime: Runtime, *, keep: int) -> None:
    """Writes `folder`/step-<n> and removes all but the last `keep` checkpoints and the best; a collective call.

    Raises UserError on every rank where it could not be written, on a full disk for example, or where a number is not
    finite; what was there before stays.
    """
    students = {student.name: student.state() for student in cohort}
    with runtime.main_process_first():
        if runtime.is_main_process:
            target = at_step(folder, state.step)
            _require_finite(students, state.step, folder)
            try:
                _write(target, students, state)
                _prune(folder, keep, state.best_step)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"checkpoint {target} could not be written ({error}): make room and run again; "
                    f"the last good one is {latest(folder) or 'none'}"
                ) from None


def latest(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint, None where there is none."""
    return max(_whole_checkpoints(folder), default=None)


def at_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_state(path: Path) -> RunState:
    """Checks every file against COMMIT and returns the state; UserError names the file that differs."""
    try:
        checksums = json.loads((path / "COMMIT").read_text())
    except ValueError:
        raise UserError(f"{path / 'COMMIT'} is damaged: delete {path} to go on from the one before it") from None
    for name, expected in checksums.items():
        file = path / name
        if not file.is_file() or sha256(file) != expected:
            raise UserError(
                f"checkpoint file {file} differs from its checksum: delete {path} to go on from the one before it"
            )
    return pydantic.TypeAdapter(RunState).validate_json((path / "state.json").read_bytes())


def read_student(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Returns one student's state, fp32 on the CPU."""
    return load_file(path / f"{name}.safetensors")


def _require_finite(students: Mapping[str, StudentState], step: int, folder: Path) -> None:
    for name, state in students.items():
        for key, tensor in state.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{name}: {key} is not finite after step {step}, so it was not saved: lower the learning rate; the "
                    f"last good checkpoint is {latest(folder) or 'none'}"
                )


def _write(target: Path, students: Mapping[str, StudentState], state: RunState) -> None:
    with written_aside(target) as aside:
        aside.mkdir()
        for name, student in students.items():
            save_file(dict(student), aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1))
        checksums = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        (aside / "COMMIT").write_text(json.dumps(checksums, indent=1))


def _prune(folder: Path, keep: int, best_step: int | None) -> None:
    for path in _whole_checkpoints(folder)[:-keep]:
        if best_step is None or path != at_step(folder, best_step):
            remove(path)


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Returns them from the oldest to the newest."""
    return sorted(commit.parent for commit in folder.glob(f"step-{'[0-9]' * 8}/COMMIT"))
