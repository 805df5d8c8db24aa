"""What is wrong with a run's settings, found before anything is written: each fault is a UserError of one line."""

from pathlib import Path

from engine.config.loading import build, flatten, read_yaml
from engine.config.settings import Config, ObjectiveConfig, OptimizerConfig, OuterConfig
from engine.models.families import shape_of
from engine.models.huggingface import require_folder
from engine.run import checkpoint
from engine.system.errors import UserError
from engine.teachers.teachers import folder_of

MAX_STREAMS = 8  # of one loss (kernels.linear_ensemble_kl)

# A run may go on with other values of these: they change what it costs or shows, not what it learns.
_FREE_TO_CHANGE = (
    "run.resume",
    "run.log_every",
    "run.folder",
    "run.profile",
    "data.path",  # What the text holds is compared by its hash.
    "data.folder",
    "cache.path",  # Whose states the cache holds is compared by hashes.
    "train.micro_batch",
    "train.zero_stage",
    "train.recompute",
    "train.compile",
    "train.skip_limit",
    "checkpoint",
)


def check(config: Config, *, teachers: bool = True) -> None:
    """Raises UserError for what is wrong before anything starts, with `teachers` also for what is in their folders."""
    _check_students(config)
    for teacher in config.teachers if teachers else ():
        folder_of(teacher)
    _check_masked(config)
    _check_objective(config)
    _check_outer(config)
    _check_training(config)
    _check_evaluation(config)


def number_of_steps(config: Config, chunks: int) -> int:
    """Returns the steps of a run over a text of so many sequences; UserError where warmup or profile need more."""
    epochs, batch = config.train.epochs, config.train.batch
    steps = config.train.steps if epochs is None else max(1, round(epochs * chunks / batch))
    if config.optimizer.warmup >= steps:
        raise UserError(
            f"optimizer.warmup={config.optimizer.warmup} is not less than the run's train.steps={steps}: lower it"
        )
    first, last = config.run.profile or (1, 1)
    if not first <= last <= steps:
        raise UserError(
            f"run.profile={[first, last]}: expected the first and the last step to trace, of {steps}; change it"
        )
    return steps


def check_same(config: Config, path: Path) -> None:
    """Raises UserError where a run would go on with other settings than it began with, but for those that change no
    result."""
    before, now = flatten(build(Config, read_yaml(path))), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_FREE_TO_CHANGE):
            raise UserError(
                f"{path.parent} is a run of another configuration: {key} was {before.get(key)!r} and is now "
                f"{now.get(key)!r}; choose another run.name, or set it back"
            )


def _check_students(config: Config) -> None:
    names = [student.name for student in config.students]
    if not 1 <= len(names) <= MAX_STREAMS:
        raise UserError(f"students: {len(names)} are listed; expected 1 to {MAX_STREAMS}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"students: the name {name!r} is used {names.count(name)} times; give each student a name of its own"
            )
    if "ensemble" in names and len(names) > 1:
        raise UserError("students: all of them together are called 'ensemble' in the records; choose another name")
    begun = checkpoint.latest(Path(config.run.folder) / config.run.name / "checkpoints") is not None
    for student in config.students:
        try:
            shape_of(student, vocab_size=1)
        except UserError as error:
            raise UserError(f"students.{student.name}: {error}") from None
        if student.init is not None and not begun:
            require_folder(Path(student.init), f"students.{student.name}.init={student.init}")
        if student.max_length < config.train.length:
            raise UserError(
                f"students.{student.name}.max_length={student.max_length} is less than train.length="
                f"{config.train.length}: raise it"
            )


def _check_masked(config: Config) -> None:
    if not config.masked:
        return
    for student in config.students:
        if student.family != "roberta":
            raise UserError(
                f"students.{student.name}.family={student.family} predicts the next token, and the roberta beside it "
                "predicts masked tokens: take one kind"
            )
    if not config.data.tokenizer.mask:
        raise UserError("students of family roberta predict masked tokens: set data.tokenizer.mask=true")
    if config.cache is not None:
        raise UserError(
            "cache: every epoch masks other tokens, so the teachers' hidden states change with it and cannot be kept; "
            "drop the cache"
        )
    if any(teacher.context == "stream" for teacher in config.teachers):
        raise UserError(
            "teachers.context=stream: a teacher of robertas reads the sequences that were masked for them; take chunk"
        )
    if config.objective.kl_everywhere or config.objective.reduction == "sequence":
        raise UserError(
            "objective.kl_everywhere and reduction=sequence concern whole sequences, and students of family roberta "
            "predict only what is masked: drop them"
        )


def _check_objective(config: Config) -> None:
    objective, teachers = config.objective, len(config.teachers)
    learns_from_peers = len(config.students) > 1 and objective.peer_weight > 0
    if objective.weighted and not learns_from_peers:
        raise UserError(
            "objective.weighted=true weighs students for one another, and here none learns from another: drop it, or "
            "raise objective.peer_weight and the number of students"
        )
    if objective.kl_everywhere and config.outer.every is not None:
        raise UserError(
            "objective.kl_everywhere=true with outer.every: the outer loop knows only rows with a target; drop one"
        )
    for name in ("temperature", "divergence", "reduction", "kl_everywhere"):
        changed = getattr(objective, name) != getattr(ObjectiveConfig(), name)
        if changed and not teachers and not learns_from_peers:
            raise UserError(
                f"objective.{name}={getattr(objective, name)} says how students learn from others, and here none does: "
                "drop it, name teachers, or raise objective.peer_weight and the number of students"
            )
    streams = len(config.students) + (teachers if objective.mix == "each" else min(teachers, 1))
    if streams > MAX_STREAMS:
        raise UserError(
            f"{streams} students and teachers: expected at most {MAX_STREAMS}; take objective.mix=logits, or fewer"
        )
    if teachers and objective.teacher_weight == 0:
        raise UserError("objective.teacher_weight=0 with teachers: nobody would learn from them; raise it or drop them")
    if not teachers and objective.teacher_weight not in (0, ObjectiveConfig().teacher_weight):
        raise UserError(f"objective.teacher_weight={objective.teacher_weight} without teachers: name them, or drop it")
    if teachers < 2 and objective.mix != "logits":
        raise UserError(f"objective.mix={objective.mix} with {teachers} teacher(s): drop it, or name more teachers")
    if config.cache is not None and not teachers:
        raise UserError("cache without teachers: name the teachers whose states it keeps, or drop it")
    for teacher in config.teachers:
        if teacher.context == "chunk" and config.cache is not None and config.train.chunks != "fixed":
            raise UserError(
                f"cache with train.chunks={config.train.chunks}: a teacher with context=chunk reads other sequences in "
                "every epoch, so that its states cannot be kept; take teachers.context=stream, or train.chunks=fixed"
            )
        if teacher.context == "chunk" and teacher.window is not None:
            raise UserError(
                f"teachers: window={teacher.window} belongs to context=stream, and context=chunk reads the students' "
                "sequences; drop it"
            )


def _check_outer(config: Config) -> None:
    outer, students = config.outer, len(config.students)
    if not config.objective.weighted and outer != OuterConfig():
        raise UserError(
            "outer says how the students' weights are learnt, and they have none: set objective.weighted=true, or drop "
            "outer"
        )
    if outer.initial is not None and len(outer.initial) != students:
        raise UserError(f"outer.initial has {len(outer.initial)} weights for {students} students: give one to each")
    if not 0 < outer.min_weight * students < 1:
        raise UserError(
            f"outer.min_weight={outer.min_weight}: expected between 0 and 1/{students}, the equal weight; lower it"
        )
    if outer.every is None:
        for name, value in vars(outer).items():
            if name not in ("initial", "every") and value != getattr(OuterConfig(), name):
                raise UserError(f"outer.{name}={value} has no effect without outer.every: drop it, or set outer.every")


def _check_training(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    if train.epochs is None:
        number_of_steps(config, chunks=0)  # It refuses a warmup or profile beyond them; epochs need the text for that.
    if optimizer.decay_fraction != OptimizerConfig().decay_fraction and optimizer.schedule != "trapezoid":
        raise UserError(
            f"optimizer.decay_fraction={optimizer.decay_fraction} belongs to schedule=trapezoid, and schedule="
            f"{optimizer.schedule}: drop it"
        )
    if optimizer.min_lr_ratio > 0 and optimizer.schedule == "constant":
        raise UserError(
            f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} with schedule=constant: a constant rate does not fall; "
            "drop it"
        )
    if train.precision == "bf16" and train.zero_stage == 0:
        raise UserError(
            "train.zero_stage=0 with train.precision=bf16: DeepSpeed keeps no fp32 weights there that can be read; "
            "take train.zero_stage=1"
        )
    if train.compile and train.zero_stage == 3:
        raise UserError(
            "train.compile=true with train.zero_stage=3: stage 3 gathers parameters layer by layer, which a compiled "
            "body cannot; take train.zero_stage=2"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if evaluation.tasks and evaluation.data is None:
        raise UserError("evaluation.tasks needs evaluation.data, the folder with the tasks' files: name it")
    if evaluation.data is not None and not evaluation.tasks:
        raise UserError(
            f"evaluation.data={evaluation.data} is the folder of evaluation.tasks' files, and there are no tasks: name "
            "some, or drop it"
        )
