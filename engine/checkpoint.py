"""Checkpoints: one directory a step, whole or absent, independent of world size and ZeRO stage.

    checkpoints/step-00000200/
        <student>.safetensors     fp32 weights and both Adam moments
        state.json                step, updates, position in metrics.jsonl, best step, ledger, random state
        COMMIT                    sha256 of every other file; written last

A directory is written beside, under a name that is never read, and comes into place by one rename. What is restored is
checked against COMMIT first.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.cohort import Cohort, Record
from engine.ledger import Ledger
from engine.runtime import Runtime

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on beside its students."""

    data: str  # hash of the prepared data
    teachers: tuple[str, ...] = ()  # of each one's folder (engine.teachers)
    place: str = ""  # ranks and ZeRO stage, for the record: neither matters to what is stored
    step: int = 0  # finished
    tokens: int = 0  # of the text, so far
    words: int = 0  # begun by them
    updates: int = 0  # optimizer steps applied: steps less those skipped
    skipped_in_a_row: int = 0
    ledger: Ledger = Ledger()
    metrics_position: int = 0  # bytes of metrics.jsonl
    best_step: int | None = None
    best_loss: float | None = None  # nats per token, mean over students
    best: tuple[dict[str, Any], ...] = ()  # per student: what the evaluation at best_step found
    omega: tuple[float, ...] = ()  # the students' weights; (): as the settings have them
    outer_updates: int = 0  # of them
    random_state: str = ""  # torch's generator on rank 0, base64


def random_state() -> str:
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def set_random_state(state: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


def save(folder: Path, cohort: Cohort, state: State, runtime: Runtime, *, keep: int) -> None:
    """Write `folder`/step-<n> and prune to the last `keep` and the best; a collective call.

    Raises ValueError on every rank where it could not be written (a full disk, say); what was there before stays.
    """
    records = {student.name: student.record() for student in cohort}
    with runtime.main_first():
        if runtime.is_main:
            target = folder / f"step-{state.step:08d}"
            _require_finite(records, state.step, folder)
            try:
                _write(target, records, state)
                _prune(folder, keep, state.best_step)
            except (OSError, SafetensorError) as error:
                last = latest(folder)
                raise ValueError(
                    f"checkpoint {target} could not be written ({error}): make room and run again; "
                    f"the last good one is {last or 'none'}"
                ) from None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    return max(_committed(folder), default=None)


def at_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_state(path: Path) -> State:
    """Check every file against COMMIT, then read the state. ValueError names the file that differs."""
    try:
        checksums = json.loads((path / "COMMIT").read_text())
    except ValueError:
        raise ValueError(f"{path / 'COMMIT'} is damaged: delete {path} to go on from the one before it") from None
    for name, expected in checksums.items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            raise ValueError(
                f"checkpoint file {file} differs from its checksum: delete {path} to go on from the one before it"
            )
    return pydantic.TypeAdapter(State).validate_json((path / "state.json").read_bytes())


def read_student(path: Path, name: str) -> dict[str, torch.Tensor]:
    """One student's record, fp32 on the CPU."""
    return load_file(path / f"{name}.safetensors")


def _require_finite(records: Mapping[str, Record], step: int, folder: Path) -> None:
    for name, record in records.items():
        for key, tensor in record.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{name}: {key} is not finite after step {step}, so it was not saved: lower the learning rate; the "
                    f"last good checkpoint is {latest(folder) or 'none'}"
                )


def _write(target: Path, records: Mapping[str, Record], state: State) -> None:
    for partial in target.parent.glob(".step-*.partial"):  # of a sitting that was killed
        shutil.rmtree(partial)
    aside = target.with_name(f".{target.name}.partial")
    aside.mkdir(parents=True)
    try:
        for name, record in records.items():
            save_file(dict(record), aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1))
        checksums = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        (aside / "COMMIT").write_text(json.dumps(checksums, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)  # of a sitting that went further and lost its later metrics
        aside.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _prune(folder: Path, keep: int, best_step: int | None) -> None:
    for path in sorted(_committed(folder))[:-keep]:
        if best_step is None or path != at_step(folder, best_step):
            shutil.rmtree(path)


def _committed(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "COMMIT").is_file()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
