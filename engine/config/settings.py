"""Every setting that a user can change, as frozen dataclasses.

`engine.config.loading` fills them from YAML and the command line. The sentence below a setting is its documentation:
`--settings` prints it (`engine.config.describe`). `engine.run.check_settings` refuses settings that contradict one
another.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError


def _refuse_bool(value: Any) -> Any:
    """Refuses YAML's true, yes and on, which would pass for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


_Number = pydantic.BeforeValidator(_refuse_bool)
Count = Annotated[int, pydantic.Field(ge=1), _Number]
Even = Annotated[int, pydantic.Field(ge=2, multiple_of=2), _Number]
Natural = Annotated[int, pydantic.Field(ge=0), _Number]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), _Number]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), _Number]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1), _Number]
FractionBelowOne = Annotated[float, pydantic.Field(ge=0, lt=1), _Number]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # It becomes the name of a folder.


class Settings:
    """Settings of one kind: an unknown key is refused, and the docstring below a field describes it."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """How text becomes token ids. The tokenizer is trained on the training split alone."""

    kind: Literal["sentencepiece", "byte-bpe"] = "sentencepiece"
    """sentencepiece is BPE with byte fallback; byte-bpe is the byte-level BPE of Baby Llama."""
    vocab_size: Count | None = None
    """Number of tokens in the vocabulary; null takes 16000 for real text and 1000 for the generated grammar."""
    lowercase: bool = False
    """true makes all letters small before the text is cut into tokens."""
    mask: bool = False
    """true adds a mask token, which RoBERTas need, and gives the padding token id 1, as they have it."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the text comes from and how it is prepared. Equal settings and text share one prepared folder."""

    path: str = "grammar"
    """grammar, wikipedia-leads, a folder of *.txt or *.train, a Hugging Face dataset, or a prepared folder."""
    words: Count | None = None
    """Words to generate (null: 1,000,000 of the grammar), or the most words of other text to use (null: all)."""
    cleaner: Literal["none", "baby-llama", "babies"] = "none"
    """Chooses a cleaner for each file by the file's name: those of Baby Llama or of When Babies Teach Babies."""
    quirks: bool = False
    """true also reproduces the quirks of Baby Llama's published notebook; it needs cleaner=baby-llama."""
    boundary: bool = True
    """true puts a boundary token before every document; false uses none at all, as Baby Llama did."""
    validation: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.05
    """Share of the text that is held out for validation."""
    seed: Natural = 0
    """Seed of the generated grammar and of the split."""
    folder: str = "prepared"
    """Folder in which prepared token files are kept."""
    tokenizer: TokenizerConfig = TokenizerConfig()


@dataclass(frozen=True)
class StudentConfig(Settings):
    """One student: its shape, its learning rate and its seed."""

    name: Name
    """Name of the student in records and folders."""
    layers: Count
    """Number of transformer blocks."""
    hidden: Count
    """Width of the hidden states."""
    heads: Count
    """Number of attention heads."""
    ffn: Count
    """Inner width of the feed-forward layers."""
    preset: str | None = None
    """Name of a published shape (engine.config.presets). What is set explicitly overrides it."""
    kv_heads: Count | None = None
    """Number of key and value heads of a llama; null takes as many as heads."""
    tied: bool = True
    """true shares the embedding's weight with the output head."""
    max_length: Count = 256
    """Longest sequence, in tokens, that the student can read."""
    rope_theta: Positive | None = None
    """Base of a llama's rotary frequencies; null takes 10000."""
    norm_eps: Positive | None = None
    """Epsilon of the norms; null takes 1e-6 for a llama and 1e-5 for the other families."""
    family: Literal["llama", "gpt2", "roberta"] = "llama"
    """Architecture. A roberta predicts masked tokens; then all students must be robertas."""
    dropout: FractionBelowOne = 0.0
    """Dropout probability of a gpt2 or a roberta."""
    learning_rate: Positive = 1e-3
    """Highest learning rate of the student; optimizer.schedule scales it."""
    seed: Natural = 0
    """Seed of the initial weights and of dropout."""
    init: str | None = None
    """Hugging Face folder whose weights the student starts from; null draws them from the seed."""


@dataclass(frozen=True)
class TeacherConfig(Settings):
    """One frozen model to learn from."""

    path: str
    """Hugging Face folder of a known family, or the folder of a run that has exported one student."""
    weight: Positive = 1.0
    """Weight of this teacher beside the others; only their ratios matter."""
    context: Literal["chunk", "stream"] = "chunk"
    """chunk reads the students' own sequences; stream reads the text in windows that do not depend on them."""
    window: Even | None = None
    """stream: tokens of a window, half of which are context; null takes twice train.length, but at most the teacher's
    max_length and, where its run's folder is there, the length of the sequences that it was trained on."""


@dataclass(frozen=True)
class CacheConfig(Settings):
    """The teachers' hidden states for the training text, computed once and kept on disk."""

    path: str
    """Folder of the cache. It is made where it is missing, and refused where it holds other states."""
    dtype: Literal["exact", "int8"] = "exact"
    """exact keeps states as live teachers compute them; int8 takes a quarter of that in fp32, half in bf16, rounded."""


@dataclass(frozen=True)
class ObjectiveConfig(Settings):
    """The loss of the students.

    Student i pays

        ce_weight·CE_i + T²·[peer_weight/(S−1)·Σ_{j≠i} KL(p_j ‖ p_i) + teacher_weight·Σ_k ν_k·KL(q_k ‖ p_i)]

    Peers p and teachers q are constants; ν are the teachers' weights, which sum to 1. With weighted = true it is

        S·ω_i·ce_weight·CE_i + T²·[Σ_{j≠i} S·ω_j·peer_weight·KL(p_j ‖ p_i) + teacher_weight·Σ_k ν_k·KL(q_k ‖ p_i)]

    with the students' weights ω, which sum to 1. Baby Llama (Timiryasov & Tastet
    2023) has ce_weight = α and teacher_weight = 1 − α; deep mutual learning (Zhang et al. 2018) has ce_weight =
    peer_weight = 1; weighted mutual learning (Iyer 2024) has weighted = true, ce_weight = 1 − α and peer_weight = α.
    """

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy with the text."""
    peer_weight: NonNegative = 1.0
    """Weight of the divergence from the other students; 0 has the students learn independently."""
    teacher_weight: NonNegative = 1.0
    """Weight of the divergence from the teachers."""
    weighted: bool = False
    """true multiplies student i's ce_weight by S·ω_i, and weighs peer j by S·ω_j·peer_weight, not divided by S−1."""
    mix: Literal["logits", "each"] = "logits"
    """logits: the weighted mean of the teachers' raw logits is one teacher. each: every teacher is one of its own."""
    temperature: Positive = 1.0
    """Temperature T of the distributions in the divergences."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """forward is KL(p_j ‖ p_i), reverse KL(p_i ‖ p_j), jsd the Jensen-Shannon divergence."""
    reduction: Literal["token", "sequence"] = "token"
    """token averages divergences over tokens; sequence sums them over a sequence, as the papers' code does."""
    kl_everywhere: bool = False
    """true drops the target of a sequence's last position but counts divergences there, as the papers' code does."""


@dataclass(frozen=True)
class OuterConfig(Settings):
    """The students' weights ω, where objective.weighted is true, and how an outer loop learns them on held-out text."""

    initial: tuple[Positive, ...] | None = None
    """Weights ω at the start, in proportion to one another; null takes equal ones."""
    every: Count | None = None
    """Steps between two updates of ω; null leaves ω as it is."""
    step_size: NonNegative = 0.25
    """Step size of the mirror descent on ω at the start; it falls over the run as half a cosine."""
    last_step_size: NonNegative = 0.0025
    """Step size at the end of the run."""
    min_weight: Fraction = 1e-4
    """Smallest weight ω_i that an update leaves to a student, before the weights are scaled to sum to 1 again."""
    sequences: Count = 16
    """Held-out sequences that one update reads, over all ranks."""
    terms: Literal["all", "direct"] = "all"
    """all takes the whole hypergradient; direct takes ∂L2/∂ω alone and ignores how ω changes what students learn."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW. Weight decay applies to matrices, not to norms and biases."""

    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    clip: NonNegative = 1.0
    """Largest gradient norm of each student; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"
    """Course of the learning rate after the warmup."""
    warmup: Natural = 50
    """Steps over which the learning rate rises linearly to its highest value."""
    decay_fraction: Fraction = 0.2
    """Share of all steps, at the end of a trapezoid schedule, over which the learning rate falls."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the last step, as a share of the highest."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The loop. In fp32, micro_batch, zero_stage, recompute, compile and the number of ranks change only rounding."""

    steps: Count = 500
    """Number of optimizer steps."""
    epochs: Positive | None = None
    """Passes through the training text, rounded to whole steps, in place of steps."""
    batch: Count = 16
    """Sequences in one step, over all ranks."""
    micro_batch: Count | None = None
    """Sequences that a rank takes at once; null takes its whole share of the step."""
    length: Annotated[int, pydantic.Field(ge=2), _Number] = 128
    """Tokens in one sequence."""
    chunks: Literal["fixed", "random"] = "fixed"
    """fixed cuts the text at the same places in every epoch; random begins each sequence anywhere in its chunk."""
    seed: Natural = 0
    """Seed of the order in which the text is read."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Storage of weights and activations; master weights, logits and the loss are fp32 in either case."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; auto takes 0 for one rank in fp32, where there is nothing to shard, and otherwise 1."""
    recompute: bool = False
    """true recomputes activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """true runs the models' bodies under torch.compile, for small models on a GPU that wait for their host."""
    skip_limit: Count = 5
    """Number of skipped steps in a row that stops the run."""

    def stage(self, world_size: int) -> int:
        """Returns the ZeRO stage on `world_size` ranks."""
        if self.zero_stage != "auto":
            return self.zero_stage
        return 0 if world_size == 1 and self.precision == "fp32" else 1


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """What is measured during training."""

    every: Count = 100
    """Steps between two evaluations; the last step is always evaluated."""
    tokens: Count = 100_000
    """Tokens of the validation split to evaluate on, evenly spread over it."""
    pairs: str = "auto"
    """Minimal pairs: auto takes those of the prepared folder, none leaves them out; or a file or folder of *.jsonl."""
    every_words: Count | None = None
    """Evaluate also every so many words of text; null does not."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks to score every student and their ensemble on, by name (engine.evaluation.tasks)."""
    data: str | None = None
    """Folder with the files of these tasks."""
    samples: Natural = 3
    """Texts that each student writes for the report."""
    sample_tokens: Count = 60
    """Longest such text, in tokens."""


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """When a run is saved. The checkpoint with the best mean validation loss is kept beside the newest ones."""

    every: Count = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep: Count = 2
    """Number of newest checkpoints that are kept."""
    milestones: bool = False
    """true exports every student after 1M, 2M, … 10M, 20M, … words, as BabyLM asks (chck_1M, …)."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """Where a run lives, and whether it goes on from its last checkpoint."""

    name: Name = "mutual"
    """Name of the run's folder."""
    folder: str = "runs"
    """Folder that holds the runs."""
    resume: Literal["auto", "never", "always"] = "auto"
    """auto goes on where a run of this name stopped; never refuses an existing run, always a missing one."""
    log_every: Count = 1
    """Steps between two lines of metrics.jsonl."""
    profile: tuple[Count, Count] | None = None
    """First and last step to trace with the profiler."""


@dataclass(frozen=True)
class Config(Settings):
    """One run, whole: what `runs/<name>/config.yaml` holds."""

    students: tuple[StudentConfig, ...]
    teachers: tuple[TeacherConfig, ...] = ()
    cache: CacheConfig | None = None
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
        """Whether the students predict masked tokens rather than the next one (a mixture is refused)."""
        return any(student.family == "roberta" for student in self.students)


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Preparation of text alone, without a run (recipes/prepare.py)."""

    data: DataConfig = DataConfig()


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """Fine-tuning on classification tasks. A null takes the recipe's own value, task by task."""

    recipe: Literal["babylm-2025", "baby-llama"] = "babylm-2025"
    """Source of the hyperparameters: BabyLM 2025's code or Baby Llama's model card."""
    seeds: tuple[Natural, ...] | None = None
    """Seeds of the training runs, one after the other."""
    learning_rate: Positive | None = None
    """Highest learning rate."""
    batch: Count | None = None
    """Examples in one step."""
    epochs: Count | None = None
    """Passes through the training part."""


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """Scores on evaluation data (recipes/score.py)."""

    model: str
    """Folder of a run, for its exported students and their ensemble, or a Hugging Face folder of a known family."""
    data: str
    """Folder with the files of the tasks."""
    tasks: tuple[str, ...] = ("blimp", "blimp_supplement", "entity_tracking", "wug_adj_nominalization", "reading")
    """Tasks to score, by name."""
    folder: str = "scores"
    """Folder for the results, in a folder of the model's name."""
    finetune: FinetuneConfig = FinetuneConfig()


@dataclass(frozen=True)
class VaryConfig(Settings):
    """Where a hyperparameter is looked for: between low and high, or among choices."""

    low: float = 0.0
    """Smallest value."""
    high: float = 0.0
    """Largest value."""
    log: bool = False
    """true spreads the values evenly in the logarithm."""
    choices: tuple[float | int | str, ...] = ()
    """Values to choose among, in place of low and high."""


@dataclass(frozen=True)
class SweepConfig(Settings):
    """A search for hyperparameters (recipes/sweep.py)."""

    base: str
    """YAML file of the run that is varied, a run of recipes/pretrain.py."""
    parameters: dict[str, VaryConfig]
    """What is varied, by dotted key, such as students.0.learning_rate."""
    name: Name = "sweep"
    """Name of the sweep's folder."""
    folder: str = "sweeps"
    """Folder that holds the sweeps."""
    trials: Count = 20
    """Number of trials, finished or pruned."""
    seed: Natural = 0
    """Seed of the proposals."""
    overrides: tuple[str, ...] = ()
    """Further settings of every trial's run, as on the command line."""


@dataclass(frozen=True)
class SearchConfig(Settings):
    """A search for the students that learn together, by their size alone (recipes/search.py)."""

    method: Literal["exhaustive", "bayesian"] = "exhaustive"
    """exhaustive tries every shape; bayesian is the optimisation of When Babies Teach Babies."""
    students: Count = 4
    """Number of students. Student i is to have replaced_parameters / (i + 1) parameters."""
    replaced_parameters: Count = 124_697_433
    """Parameters of the model that the students replace; the default is RoBERTa-base's."""
    family: Literal["roberta", "llama", "gpt2"] = "roberta"
    """Architecture of all students."""
    layers: tuple[Count, ...] = (6, 8, 12, 16, 20)
    """Numbers of blocks to try."""
    hidden: tuple[Count, ...] = (256, 512, 768, 1024, 2048)
    """Widths to try."""
    heads: tuple[Count, ...] = (8, 16, 32)
    """Numbers of heads to try."""
    ffn: Count = 3072
    """Inner width of the feed-forward layers of all students."""
    max_length: Count = 512
    """Longest sequence of all students, in tokens."""
    vocab_size: Count = 50_265
    """Size of the vocabulary."""
    initial: Count = 30
    """bayesian: random evaluations at the start."""
    evaluations: Count = 70
    """bayesian: guided evaluations after them."""
    seed: Natural = 0
    """bayesian: seed; student i draws from seed + i − 1."""
    output: str = "students.yaml"
    """File for the students found; a plot of the same name is written beside it."""
