"""Every setting a user can change, as frozen dataclasses, and how YAML and the command line fill them.

Three layers, the later over the earlier: the defaults below, a YAML file (`--config`), and dotted
overrides (`students.0.layers=8`). Unknown keys and values of the wrong type are errors, never ignored.
"""

import argparse
import dataclasses
import difflib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from engine.models.presets import PRESETS

C = TypeVar("C")

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _no_truth_value(value: Any) -> Any:
    """YAML's true, yes and on would pass for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


_Number = pydantic.BeforeValidator(_no_truth_value)
Count = Annotated[int, pydantic.Field(ge=1), _Number]
Natural = Annotated[int, pydantic.Field(ge=0), _Number]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), _Number]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), _Number]
Share = Annotated[float, pydantic.Field(ge=0, le=1), _Number]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1), _Number]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # it becomes a folder's name

_STRICT = pydantic.ConfigDict(extra="forbid")  # pydantic reads __pydantic_config__ off a dataclass


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids. Trained on the training split alone."""

    __pydantic_config__ = _STRICT
    kind: Literal["sentencepiece", "byte-bpe"] = "sentencepiece"  # BPE with byte fallback | byte-level BPE (Baby Llama)
    pieces: Count | None = None  # vocabulary size; None: 16000 for real text, 1000 for the generated grammar
    normalization: Literal["nfkc", "none"] = "nfkc"
    lowercase: bool = False
    mask: bool = False  # a mask token, as RoBERTas need; and the padding token is number 1, as theirs


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is prepared; two equal ones name the same prepared folder."""

    __pydantic_config__ = _STRICT
    path: str = (
        "grammar"  # grammar | wikipedia-leads | a folder of *.txt or *.train | a Hugging Face dataset | prepared
    )
    words: Count | None = (
        None  # grammar: words to generate (None: 1,000,000); other text: use at most so many (None: all)
    )
    cleaner: Literal["none", "baby-llama", "babies"] = "none"  # per-corpus, by file name: cleaners | normalizer
    quirks: bool = False  # with baby-llama: also reproduce the quirks of the published notebook
    boundary: bool = True  # a boundary token before every document; False: none at all, as Baby Llama did
    validation: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.05  # share of documents held out
    seed: Natural = 0  # of the grammar and of the split
    folder: str = "prepared"  # where token files are kept
    tokenizer: TokenizerConfig = TokenizerConfig()


@dataclass(frozen=True)
class StudentConfig:
    """One student: its shape, its learning rate, its seed. `preset` names a published shape (engine.models.PRESETS)."""

    __pydantic_config__ = _STRICT
    name: Name
    layers: Count
    hidden: Count
    heads: Count
    ffn: Count
    preset: str | None = None
    kv_heads: Count | None = None  # llama; None: as many as heads
    tied: bool = True  # the head shares the embedding's weight
    positions: Count = 256  # longest sequence
    rope_theta: Positive | None = None  # llama; None: 10000
    norm_eps: Positive | None = None  # None: 1e-6 for llama, 1e-5 for the others
    family: Literal["llama", "gpt2", "roberta"] = "llama"  # roberta predicts masked tokens, as must all students then
    dropout: Decay = 0.0  # gpt2, roberta
    learning_rate: Positive = 1e-3
    seed: Natural = 0  # of the initial weights and of dropout
    init: str | None = None  # start from the weights of this Hugging Face folder instead


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen model to learn from."""

    __pydantic_config__ = _STRICT
    path: str  # a Hugging Face folder of a known family, or the folder of a run that has exported one student
    weight: Positive = 1.0  # beside the other teachers'; only their ratios matter


@dataclass(frozen=True)
class CacheConfig:
    """The teachers' predictions for every chunk of the training text, computed once and kept (fixed chunks only)."""

    __pydantic_config__ = _STRICT
    path: str  # the folder; made where it is missing, and refused where it holds anything else's predictions
    k: Count = 32  # the most probable tokens that are kept of each prediction; the rest is one bucket


@dataclass(frozen=True)
class ObjectiveConfig:
    """loss_i = ce · CE_i + T² · [peers/(S−1) · Σ_{j≠i} KL(p_j ‖ p_i) + teachers · Σ_k ω_k · KL(q_k ‖ p_i)].

    Peers p and teachers q are constant; ω are the teachers' weights, their sum 1. Baby Llama (Timiryasov & Tastet 2023)
    has ce = α and teachers = 1 − α; deep mutual learning (Zhang et al. 2018) has ce = peers = 1; weighted mutual
    learning (Iyer 2024) is `weighted`, with ce = 1 − α and peers = α.
    """

    __pydantic_config__ = _STRICT
    ce: NonNegative = 1.0
    peers: NonNegative = 1.0  # 0: the students do not learn from one another
    weighted: bool = False  # students' weights ω (OuterConfig), their sum 1: S·ω_i·ce, and S·ω_j·peers from peer j
    teachers: NonNegative = 1.0
    mix: Literal["logits", "each"] = "logits"  # one teacher, the weighted mean of all raw logits | each a teacher
    temperature: Positive = 1.0
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    reduction: Literal["token", "sequence"] = "token"  # sequence: divergences are summed over it, as the papers' code
    kl_everywhere: bool = (
        False  # divergences also where a sequence ends, its last token without a target: the same code
    )


@dataclass(frozen=True)
class OuterConfig:
    """The students' weights ω where objective.weighted, and how an outer loop learns them (engine.outer_loop)."""

    __pydantic_config__ = _STRICT
    initial: tuple[Positive, ...] | None = None  # ω at the start, in proportion; None: equal
    every: Count | None = None  # steps between updates; None: ω stays as it is
    step_size: NonNegative = 0.25  # of mirror descent; falls over the run as half a cosine ...
    last_step_size: NonNegative = 0.0025  # ... to this
    floor: Share = 1e-4  # no weight falls below about this
    sequences: Count = 16  # held-out sequences an update reads, over all ranks
    ensemble: Literal["logits", "probabilities"] = "logits"  # what ω mixes: the paper's weighted logits | a mixture
    terms: Literal["both", "first"] = "both"  # first: ∂L2/∂ω alone
    inner: Literal["exact", "lagged"] = "exact"  # La at the parameters before the step (kept: a copy) | after it
    precondition: Literal["none", "adamw"] = "none"  # the inner step as SGD, as in the paper | as AdamW scales it
    method: Literal["forward", "backward", "central"] = "forward"  # S JVPs | S² backward passes | 2S more forwards


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; matrices decay, norms and biases do not. The schedule multiplies each student's own learning rate."""

    __pydantic_config__ = _STRICT
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: NonNegative = 1.0  # largest gradient norm, per student; 0: no clipping
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"
    warmup: Natural = 50  # steps
    decay: Share = 0.2  # trapezoid: the share of all steps, at the end, over which the rate falls
    floor: Share = 0.0  # the last learning rate, as a share of the highest


@dataclass(frozen=True)
class TrainConfig:
    """The loop. In fp32, results depend on none of micro_batch, zero_stage, recompute, compile and the number of
    ranks."""

    __pydantic_config__ = _STRICT
    steps: Count = 500
    epochs: Positive | None = None  # in place of steps: so many times through the text, in whole steps
    batch: Count = 16  # sequences a step, over all ranks
    micro_batch: Count | None = None  # sequences a rank takes at once; None: all of its share
    length: Annotated[int, pydantic.Field(ge=2), _Number] = 128  # tokens a sequence
    chunks: Literal["fixed", "random"] = "fixed"  # random: each begins anywhere in its chunk, as in Baby Llama
    seed: Natural = 0  # of the data order
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"  # auto: 0 for one rank in fp32, with nothing to shard; else 1
    recompute: bool = False  # recompute activations in the backward pass: less memory, about a third more time
    compile: bool = False  # bodies by torch.compile: for small models on a GPU, which wait for their host
    skip_limit: Count = 5  # so many skipped steps in a row stop the run

    def stage(self, world: int) -> int:
        """The ZeRO stage on `world` ranks."""
        if self.zero_stage != "auto":
            return self.zero_stage
        return 0 if world == 1 and self.precision == "fp32" else 1


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured during training, on the held-out split."""

    __pydantic_config__ = _STRICT
    every: Count = 100  # steps; the last step always is
    tokens: Count = 100_000  # of the held-out split, evenly spread over it
    pairs: str = "auto"  # minimal pairs: auto (the prepared folder's own) | none | a file or folder of *.jsonl
    every_words: Count | None = None  # also when so many more words have been read
    tasks: tuple[str, ...] = ()  # zero-shot tasks (engine.evaluation.tasks) for every student and their ensemble
    data: str | None = None  # the folder of their files
    samples: Natural = 3  # texts each student generates for the report
    sample_tokens: Count = 60  # each, and at most a student's positions


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved. The best by mean validation loss is kept beside the last `keep`."""

    __pydantic_config__ = _STRICT
    every: Count = 200  # steps; the last step always is
    keep: Count = 2
    milestones: bool = False  # export every student after 1M, 2M, … 10M, 20M, … words, as BabyLM asks (chck_1M, …)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, and whether it goes on from its last checkpoint."""

    __pydantic_config__ = _STRICT
    name: Name = "mutual"
    folder: str = "runs"
    resume: Literal["auto", "never", "always"] = "auto"  # never: an existing run is an error; always: a missing one is
    log_every: Count = 1  # steps between lines of metrics.jsonl
    profile: tuple[Count, Count] | None = None  # the first and the last step to trace (engine.profiling)
    memory_snapshot: bool = False  # of a GPU, at the end of those steps


@dataclass(frozen=True)
class Config:
    """One run, whole: what `runs/<name>/config.yaml` holds."""

    __pydantic_config__ = _STRICT
    students: tuple[StudentConfig, ...]
    teachers: tuple[TeacherConfig, ...] = ()
    cache: CacheConfig | None = None  # of the teachers' predictions
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    outer: OuterConfig = OuterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def masked(self) -> bool:
        """Whether the students predict masked tokens, rather than the next one; all alike (engine.checks)."""
        return any(student.family == "roberta" for student in self.students)


@dataclass(frozen=True)
class PrepareConfig:
    """Preparation alone, without a run."""

    __pydantic_config__ = _STRICT
    data: DataConfig = DataConfig()


@dataclass(frozen=True)
class FinetuneConfig:
    """Classification tasks. What is None is the recipe's, task by task (engine.evaluation.finetune)."""

    __pydantic_config__ = _STRICT
    recipe: Literal["babylm-2025", "baby-llama"] = "babylm-2025"
    seeds: tuple[Natural, ...] | None = None  # each trains anew; None: the recipe's one
    learning_rate: Positive | None = None
    batch: Count | None = None
    epochs: Count | None = None


@dataclass(frozen=True)
class ScoreConfig:
    """What recipes/score.py scores."""

    __pydantic_config__ = _STRICT
    model: str  # a run's folder: its exported students and their ensemble; or a Hugging Face folder of a known family
    data: str  # the folder of the tasks' files
    tasks: tuple[str, ...] = ("blimp", "blimp_supplement", "entity_tracking", "wug_adj_nominalization", "reading")
    folder: str = "scores"  # where results go: <folder>/<name of the model>/
    finetune: FinetuneConfig = FinetuneConfig()


@dataclass(frozen=True)
class VaryConfig:
    """Where a hyperparameter is looked for: between low and high, or among choices."""

    __pydantic_config__ = _STRICT
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # evenly in the logarithm
    choices: tuple[float | int | str, ...] = ()


@dataclass(frozen=True)
class SweepConfig:
    """A search for hyperparameters (recipes/sweep.py)."""

    __pydantic_config__ = _STRICT
    base: str  # the YAML of the run that is varied, of recipes/pretrain.py
    parameters: dict[str, VaryConfig]  # by dotted key, such as students.0.learning_rate
    name: Name = "sweep"
    folder: str = "sweeps"
    trials: Count = 20  # finished or pruned
    seed: Natural = 0  # of the proposals
    overrides: tuple[str, ...] = ()  # of every trial's run


def load(cls: type[C], argv: Sequence[str], *, description: str | None, default: Path) -> C:
    """The run's settings: defaults, then `--config` (or the recipe's own YAML), then `key=value` overrides.

    Raises ValueError naming the key, what was expected and the nearest known key.
    """
    arguments = argument_parser(description, default).parse_intermixed_args(argv)  # options may stand between overrides
    return build(cls, read_yaml(arguments.config), arguments.overrides)


def argument_parser(description: str | None, default: Path) -> argparse.ArgumentParser:
    """The command line every recipe has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=default, help=f"YAML file of settings (default: {default.name})")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=1000 students.0.layers=8")
    return parser


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file; name a YAML file of settings")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: expected a mapping of settings, got {type(settings).__name__}")
    return settings


def build(cls: type[C], settings: dict[str, Any], overrides: Sequence[str] = ()) -> C:
    """Fill dataclass `cls` from nested settings and `a.b.0.c=value` overrides; ValueError for what does not fit."""
    for override in overrides:
        _override(settings, override)
    settings = _with_presets(settings)
    try:
        return pydantic.TypeAdapter(cls).validate_python(settings)
    except pydantic.ValidationError as error:
        raise ValueError(_one_line(cls, error)) from None


def save(config: Config, path: Path, **extra: str) -> None:
    """Write the resolved settings as YAML, with `extra` (the git commit) as leading comment lines."""
    comments = "".join(f"# {key}: {value}\n" for key, value in extra.items())
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(comments + yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(aside, path)  # a full disk leaves what was there


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries and lists, equal to what YAML reads back."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def flat(config: Any) -> dict[str, Any]:
    """The settings by dotted key, as overrides name them."""

    def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict | list):
            yield prefix, value
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{prefix}.{key}".lstrip("."))

    return dict(leaves(as_dict(config), ""))


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake (ValueError), or a disk that refuses, ends the command with exit code 2, and with one line, of
    the rank that met it first."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_REFUSES:
            raise
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _end(2)
    except RuntimeError as error:
        if "gloo" not in str(error) or _is_first_to_fail():
            raise
        _end(2)  # a lost connection: another rank has said why


def _is_first_to_fail() -> bool:
    runtime = sys.modules.get("engine.runtime")  # not imported for this: it takes seconds
    return os.environ.get("RANK", "0") == "0" if runtime is None else runtime.is_first_to_fail()


def _end(code: int) -> None:
    runtime = sys.modules.get("engine.runtime")
    sys.exit(code) if runtime is None else runtime.end(code)


def _override(settings: dict[str, Any], override: str) -> None:
    """Set one `a.b.0.c=value` in nested dictionaries and lists, in place."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ValueError(f"{override!r}: expected key=value, such as train.steps=1000")
    *parents, last = path.split(".")
    place: Any = settings
    for depth, (key, following) in enumerate(pairwise([*parents, last])):
        new: Any = [] if following == "0" else {}
        place = place[_index(place, key, path, new)] if isinstance(place, list) else place.setdefault(key, new)
        if not isinstance(place, dict | list):
            raise ValueError(f"{override!r}: {'.'.join(parents[: depth + 1])} is a value and has no {last!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{override!r}: the value is not YAML; put quotes around text with special signs") from None
    if isinstance(place, list):
        place[_index(place, last, path, None)] = value
    else:
        place[last] = value


def _index(items: list[Any], key: str, path: str, new: Any) -> int:
    """The place of an item; behind the last one, where `new` is put."""
    if not key.isdecimal() or int(key) > len(items):
        raise ValueError(f"{path}: {key!r} is neither one of its {len(items)} places nor the next, {len(items)}")
    if int(key) == len(items):
        items.append(new)
    return int(key)


def _with_presets(settings: dict[str, Any]) -> dict[str, Any]:
    """Students that name a preset take its shape; what they say themselves goes over it."""
    students = settings.get("students")
    if not isinstance(students, list):
        return settings
    return {**settings, "students": [_with_preset(s) if isinstance(s, dict) else s for s in students]}


def _with_preset(student: dict[str, Any]) -> dict[str, Any]:
    name = student.get("preset")
    if name is None:
        return student
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known: expected one of {', '.join(PRESETS)}")
    return {**PRESETS[name], **student}


def _one_line(cls: type, error: pydantic.ValidationError) -> str:
    errors = error.errors()
    # A misspelt key also leaves the right one missing; the misspelling is what to mend.
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        known = _keys_at(cls, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"unknown key {key!r}: " + (
            f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        )
    if first["type"] == "missing":
        return f"{key} is missing: give it a value"
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys_at(cls: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys of the dataclass that stands at a location such as ("students", 0)."""
    for part in location:
        if isinstance(part, int):
            continue
        kind = {f.name: f.type for f in dataclasses.fields(cls)}[part]
        cls = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return [f.name for f in dataclasses.fields(cls)]
