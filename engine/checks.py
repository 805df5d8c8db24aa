"""What is wrong with a run's settings, before anything is written: each is a ValueError of one line."""

from pathlib import Path

from engine import checkpoint
from engine.config import Config, ObjectiveConfig, OptimizerConfig, OuterConfig, RunConfig, build, flat, read_yaml
from engine.export import require_folder
from engine.models.families import shape_of
from engine.outer_loop import check as check_outer
from engine.runtime import Runtime
from engine.teachers import folder_of

STREAMS_AT_MOST = 8  # of one loss

# A run may go on with other values of these: they change what it costs or shows, not what it learns.
_FREE_TO_CHANGE = (
    "run.resume",
    "run.log_every",
    "run.folder",
    "run.profile",
    "run.memory_snapshot",
    "data.path",  # what it holds is compared by hash
    "data.folder",
    "cache.path",  # of teachers, k and all else that it holds, compared by hash
    "train.micro_batch",
    "train.zero_stage",
    "train.recompute",
    "train.compile",
    "train.skip_limit",
    "checkpoint",
)


def check(config: Config, *, teachers: bool = True) -> None:
    """What can be known to be wrong before anything starts; `teachers`: also in their folders. Raises ValueError."""
    names = [student.name for student in config.students]
    if not 1 <= len(names) <= STREAMS_AT_MOST:
        raise ValueError(f"students: {len(names)} of them; expected 1 to {STREAMS_AT_MOST}")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"students: {name!r} stands {names.count(name)} times; give each a name of its own")
    if "ensemble" in names and len(names) > 1:
        raise ValueError("students: 'ensemble' is what all of them together are called; choose another name")
    begun = checkpoint.latest(Path(config.run.folder) / config.run.name / "checkpoints") is not None
    for student in config.students:
        try:
            shape_of(student, vocabulary=1)
        except ValueError as error:
            raise ValueError(f"students.{student.name}: {error}") from None
        if student.init is not None and not begun:
            require_folder(Path(student.init), f"students.{student.name}.init={student.init}")
        if student.positions < config.train.length:
            raise ValueError(
                f"students.{student.name}.positions={student.positions} is less than train.length="
                f"{config.train.length}: raise it"
            )
    for teacher in config.teachers if teachers else ():
        folder_of(teacher)
    _check_masked(config)
    _check_objective(config)
    if config.train.epochs is None:
        check_warmup(config, config.train.steps)
    if config.evaluation.tasks and config.evaluation.data is None:
        raise ValueError("evaluation.tasks needs evaluation.data, the folder of the tasks' files: name it")
    if config.evaluation.data is not None and not config.evaluation.tasks:
        raise ValueError("evaluation.data is the folder of evaluation.tasks' files, and there are none: name some")
    if config.optimizer.decay != OptimizerConfig().decay and config.optimizer.schedule != "trapezoid":
        raise ValueError(f"optimizer.decay is of a trapezoid, and schedule={config.optimizer.schedule}: drop it")
    if config.optimizer.floor > 0 and config.optimizer.schedule == "constant":
        raise ValueError(f"optimizer.floor={config.optimizer.floor}: a constant rate falls to no floor: drop it")
    if config.train.precision == "bf16" and config.train.zero_stage == 0:
        raise ValueError(
            "train.zero_stage=0 with train.precision=bf16: DeepSpeed keeps no fp32 weights that can be read there; "
            "take train.zero_stage=1"
        )
    if config.train.compile and config.train.zero_stage == 3:
        raise ValueError(
            "train.compile with train.zero_stage=3: it gathers parameters layer by layer, which no compiled body does; "
            "take train.zero_stage=2"
        )


def steps_of(config: Config, chunks: int) -> int:
    """The steps of a run over a text of so many sequences; ValueError where they are fewer than its warmup."""
    epochs, batch = config.train.epochs, config.train.batch
    steps = config.train.steps if epochs is None else max(1, round(epochs * chunks / batch))
    check_warmup(config, steps)
    return steps


def check_warmup(config: Config, steps: int) -> None:
    if config.optimizer.warmup >= steps:
        raise ValueError(f"optimizer.warmup={config.optimizer.warmup} is not less than train.steps={steps}: lower it")


def _check_masked(config: Config) -> None:
    """Refuse what does not go with masked tokens."""
    if not config.masked:
        return
    for student in config.students:
        if student.family != "roberta":
            raise ValueError(
                f"students.{student.name}.family={student.family} predicts the next token, and the roberta beside it "
                "masked ones: take one kind"
            )
    if not config.data.tokenizer.mask:
        raise ValueError("students of family roberta predict masked tokens: set data.tokenizer.mask=true")
    if config.cache is not None:
        raise ValueError("cache: what is masked changes with every epoch, and with it what teachers predict: drop it")
    if config.objective.kl_everywhere or config.objective.reduction == "sequence":
        raise ValueError(
            "objective.kl_everywhere and reduction=sequence are of whole sequences, and students of family roberta "
            "predict only what is masked: drop them"
        )


def _check_objective(config: Config) -> None:
    """Refuse what would have no effect, and what the loss cannot do."""
    objective, teachers = config.objective, len(config.teachers)
    streams = len(config.students) + (teachers if objective.mix == "each" else min(teachers, 1))
    if streams > STREAMS_AT_MOST:
        raise ValueError(
            f"{streams} students and teachers: expected at most {STREAMS_AT_MOST}; take mix=logits or fewer"
        )
    if teachers and objective.teachers == 0:
        raise ValueError("objective.teachers=0 with teachers: nobody would learn from them; raise it, or drop them")
    if not teachers and objective.teachers not in (0, ObjectiveConfig().teachers):
        raise ValueError(f"objective.teachers={objective.teachers} without teachers: name them, or drop it")
    if teachers < 2 and objective.mix != "logits":
        raise ValueError(f"objective.mix={objective.mix} with {teachers} teacher(s): drop it, or name more teachers")
    if config.cache is not None and not teachers:
        raise ValueError("cache without teachers: name those whose predictions it holds, or drop it")
    if config.cache is not None and config.train.chunks != "fixed":
        raise ValueError(
            f"cache with train.chunks={config.train.chunks}: it holds fixed chunks; take train.chunks=fixed"
        )
    if objective.weighted and (len(config.students) == 1 or objective.peers == 0):
        raise ValueError(
            "objective.weighted says how much each student counts for the others, and here none learns from another: "
            "drop it, or raise objective.peers and the number of students"
        )
    if not objective.weighted and config.outer != OuterConfig():
        raise ValueError("outer says how the students' weights are learnt, and they have none: objective.weighted=true")
    check_outer(config.outer, len(config.students))
    if objective.kl_everywhere and config.outer.every is not None:
        raise ValueError(
            "objective.kl_everywhere with outer.every: the outer loop knows only rows with a target; drop one of them"
        )
    alone = not teachers and (len(config.students) == 1 or objective.peers == 0)
    plain = ObjectiveConfig()
    for name in ("temperature", "divergence", "reduction", "kl_everywhere"):
        if alone and getattr(objective, name) != getattr(plain, name):
            raise ValueError(
                f"objective.{name} says how students learn from others, and here none does: drop it, name teachers, or "
                "raise objective.peers and the number of students"
            )


def check_profile(config: RunConfig, steps: int, runtime: Runtime) -> None:
    first, last = config.profile or (1, 1)
    if not first <= last <= steps:
        raise ValueError(f"run.profile={[first, last]}: expected the first and the last step to trace, of {steps}")
    if config.memory_snapshot and (config.profile is None or runtime.device.type != "cuda"):
        raise ValueError("run.memory_snapshot is of a GPU's memory at the end of run.profile's steps: drop it, or both")


def check_same(config: Config, path: Path) -> None:
    """Refuse to go on with other settings than the run began with, but for those that change no result."""
    before, now = flat(build(Config, read_yaml(path))), flat(config)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(_FREE_TO_CHANGE) or before.get(key) == now.get(key):
            continue
        raise ValueError(
            f"{path.parent} is a run of another configuration: {key} was {before.get(key)!r} and is now "
            f"{now.get(key)!r}; choose another run.name, or set it back"
        )
