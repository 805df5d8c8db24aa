"""A run's students as Hugging Face folders."""

import json
from collections.abc import Sequence
from pathlib import Path

from engine.compute import usage as usages
from engine.config.settings import Config, StudentConfig
from engine.data.prepare import Prepared
from engine.data.tokenizer import Tokenizer
from engine.models.families import shape_of
from engine.models.huggingface import OMEGA, export_model
from engine.run import checkpoint
from engine.students.student import StudentState
from engine.system.errors import UserError


def export_student(
    folder: Path, student: StudentConfig, state: StudentState, tokenizer: Tokenizer, usage: usages.Usage
) -> None:
    """Writes a student's weights in `state` as a Hugging Face folder, with what its run has used."""
    weights = {name.removeprefix("weight/"): w for name, w in state.items() if name.startswith("weight/")}
    shape = shape_of(student, tokenizer.vocab_size)
    export_model(folder, shape, weights, tokenizer, {usages.FILE: usages.as_json(usage)})


def export_run(
    run: Path, config: Config, prepared: Prepared, step: int, to: Path, students: Sequence[StudentConfig]
) -> list[Path]:
    """Writes `students` of a run's checkpoint as Hugging Face folders in `to`, and their weights ω beside them.

    Returns the folders. Raises UserError where the checkpoint is missing or damaged, or was trained on other data, as
    its tokenizer is gone then.
    """
    source = checkpoint.at_step(run / "checkpoints", step)
    if not source.is_dir():
        raise UserError(f"{source}: no such checkpoint; train first, or name a step that was kept")
    state = checkpoint.read_state(source)
    if state.data != prepared.identity:
        raise UserError(
            f"{source} was trained on data {state.data[:8]}, but data.path={config.data.path} now gives "
            f"{prepared.identity[:8]}, and with it another tokenizer: restore the text"
        )
    for student in students:
        student_state = checkpoint.read_student(source, student.name)
        export_student(to / student.name, student, student_state, prepared.tokenizer, state.usage)
    if state.omega:
        weights = dict(zip((student.name for student in config.students), state.omega, strict=True))
        (to / OMEGA).write_text(json.dumps(weights, indent=1) + "\n")
    return [to / student.name for student in students]
