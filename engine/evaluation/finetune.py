"""Fine-tuning on classification: the (Super)GLUE sets of BabyLM's evaluation data, and MSGS.

    <data>/glue_filtered/<task>.train.jsonl, <task>.valid.jsonl            `label` and the texts of TEXTS
    <data>/msgs_filtered/<set>.train.json, <set>.validation.json           `sentence` and `label` (Warstadt et al. 2020)

The whole model trains with a new head, which reads the hidden state of the last token, because that has seen all the
others; for a masked model it reads the first token's state before the layer that predicts. The epoch is chosen by the
validation part, as in BabyLM 2025's own code: `score` is the best epoch's and `strict_score` the last one's.

Every set with every seed is a job: a student in the engine's own step, whose targets are classes instead of tokens. The
ranks share out each batch. A job that was stopped goes on from its last whole epoch, bit for bit.

B sequences, L positions, N examples, D hidden, C classes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine.config.settings import FinetuneConfig, ObjectiveConfig, OptimizerConfig, StudentConfig, TrainConfig
from engine.data.batches import IGNORED, Batch, Step
from engine.data.tokenizer import Tokenizer
from engine.evaluation.log_probabilities import TokenTree, collate, plan_batches, single_text
from engine.evaluation.metrics import SetScore, TaskScore, binomial_error, pearson
from engine.evaluation.tasks import folder_of, read_items
from engine.models.base import LanguageModel
from engine.models.classifier import DROPOUT, Classifier
from engine.models.families import new_model
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.schedule import learning_rate
from engine.students.student import Student
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.system.files import write_text, written_aside

LONGEST = 512  # tokens; longer examples are cut, the longer of two texts first

TEXTS: dict[str, tuple[str, ...]] = {
    "boolq": ("{question}", "{passage}"),
    "cola": ("{sentence}",),
    "mnli": ("{premise}", "{hypothesis}"),
    "mrpc": ("{sentence1}", "{sentence2}"),
    "multirc": ("Question: {question} Answer: {answer}", "{paragraph}"),
    "qnli": ("{question}", "{sentence}"),
    "qqp": ("{question1}", "{question2}"),
    "rte": ("{sentence1}", "{sentence2}"),
    "sst2": ("{sentence}",),
    "wsc": ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"),
    "msgs": ("{sentence}",),
}
MSGS = (  # BabyLM 2023's: five features by themselves, and six pairs of a linguistic and a surface one
    *("main_verb_control", "control_raising_control", "syntactic_category_control"),
    *("lexical_content_the_control", "relative_position_control"),
    *("main_verb_lexical_content_the", "main_verb_relative_token_position"),
    *("control_raising_lexical_content_the", "control_raising_relative_token_position"),
    *("syntactic_category_lexical_content_the", "syntactic_category_relative_position"),
)


@dataclass(frozen=True)
class Settings:
    learning_rate: float = 3e-5
    batch: int = 32
    epochs: int = 10
    seed: int = 42


@dataclass(frozen=True)
class Recipe:
    usual: Settings
    by_task: dict[str, Settings]  # those of tasks that differ
    optimizer: OptimizerConfig
    warmup: float  # share of the steps


RECIPES = {
    "babylm-2025": Recipe(  # the same as in BabyLM 2025's own code
        Settings(),
        {"boolq": Settings(batch=16), "multirc": Settings(batch=16), "wsc": Settings(epochs=30)},
        OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.01, clip=0.0, min_lr_ratio=0.1),
        warmup=0.06,
    ),
    "baby-llama": Recipe(  # settings as on Baby Llama's model card; the rest is Hugging Face's trainer's
        Settings(5e-5, 64, 6, 12),
        {
            "boolq": Settings(3e-4, 16, 10, 12),
            "cola": Settings(4e-5, 64, 3, 12),
            "mrpc": Settings(3e-5, 64, 3, 12),
            "msgs": Settings(5e-5, 64, 10, 12),
            "multirc": Settings(1e-4, 64, 7, 42),
            "qqp": Settings(4e-5, 64, 10, 12),
            "wsc": Settings(5e-7, 1, 10, 12),
        },
        OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0, clip=1.0, schedule="linear"),
        warmup=0.0,
    ),
}


@dataclass(frozen=True)
class Examples:
    texts: list[tuple[str, ...]]
    labels: list[int]


@dataclass(frozen=True)
class Dataset:
    """One set of a task."""

    task: str
    name: str
    train: Examples
    validation: Examples

    @property
    def classes(self) -> int:
        return max(*self.train.labels, *self.validation.labels) + 1


def read_datasets(task: str, data: Path) -> list[Dataset]:
    """Returns the sets of a task: MSGS has eleven, every other task one.

    Raises UserError for a file that is missing or malformed.
    """
    folder = folder_of(task, data, "msgs_filtered" if task == "msgs" else "glue_filtered")
    names = MSGS if task == "msgs" else (task,)
    parts = ("train.json", "validation.json") if task == "msgs" else ("train.jsonl", "valid.jsonl")
    return [Dataset(task, name, *(_read_examples(task, folder / f"{name}.{part}") for part in parts)) for name in names]


def _read_examples(task: str, file: Path) -> Examples:
    if not file.is_file():
        raise UserError(f"{task}: no {file}: fetch it, or leave the task out")
    texts, labels = [], []
    for _, number, item in read_items(task, file, label=int):
        try:
            texts.append(tuple(template.format(**item) for template in TEXTS[task]))
        except KeyError as error:
            raise UserError(f"{file}:{number}: expected {error.args[0]} in the object; fetch the file again") from None
        if item["label"] < 0:
            raise UserError(f"{file}:{number}: label {item['label']}: expected 0 or more; fetch the file again")
        labels.append(item["label"])
    return Examples(texts, labels)


def finetune(
    datasets: Sequence[Dataset],
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: FinetuneConfig,
    folder: Path,
    runtime: Runtime,
    say: Callable[[str], None] = print,
) -> TaskScore:
    """Returns the scores of a task's sets with every seed; a collective call. `model` stays as it is.

    Each job writes its result to `folder`, and a job whose result is there is not done again. Raises UserError where a
    loss or a prediction is not finite.
    """
    recipe = RECIPES[config.recipe]
    say = say if runtime.is_main_process else lambda _: None
    names = ("learning_rate", "batch", "epochs")
    overrides = {name: value for name in names if (value := getattr(config, name)) is not None}
    scores = []
    for dataset in datasets:
        usual = recipe.by_task.get(dataset.task, recipe.usual)
        for seed in config.seeds or (usual.seed,):
            settings = replace(usual, seed=seed, **overrides)
            result = folder / f"{dataset.name}-{_identity(model, dataset, recipe, settings)}.json"
            state = result.with_suffix(".pt")
            runtime.barrier()  # All ranks see what rank 0 has written before.
            if not result.is_file():
                history = _Job(dataset, settings, recipe, model, tokenizer, runtime, say).run(state)
                if runtime.is_main_process:
                    write_text(result, json.dumps(history))
            runtime.barrier()
            if runtime.is_main_process:
                state.unlink(missing_ok=True)  # It was needed until the result was whole.
            scores.append(_score(dataset, seed, json.loads(result.read_text())))
    return TaskScore(datasets[0].task, tuple(scores))


def _identity(model: LanguageModel, dataset: Dataset, recipe: Recipe, settings: Settings) -> str:
    digest = hashlib.sha256(repr((dataset, recipe.optimizer, recipe.warmup, settings)).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _score(dataset: Dataset, seed: int, predictions: list[list[int]]) -> SetScore:
    """Returns the score of the predictions after every epoch: MSGS by Matthews' correlation, the rest by accuracy.

    Matthews' correlation is Pearson's of two classes. The best epoch of MRPC and QQP has the highest F1, as in BabyLM.
    """
    labels = np.array(dataset.validation.labels)
    measure = pearson if dataset.task == "msgs" else _accuracy
    chooses_epoch = _f1 if dataset.task in ("mrpc", "qqp") else measure
    best = max(map(np.array, predictions), key=lambda predicted: chooses_epoch(predicted, labels))
    score, last = measure(best, labels), measure(np.array(predictions[-1]), labels)
    name, items = f"{dataset.name}, seed {seed}", len(labels)
    if dataset.task == "msgs":
        return SetScore(name, items, score, last, (1 - score**2) / math.sqrt(items), 0.0, 0.0)
    majority = float(np.bincount(labels).max() / items)
    return SetScore(name, items, score, last, binomial_error(score, items), 1 / dataset.classes, majority)


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the F1 score of class 1."""
    true_positives = ((predicted == 1) & (labels == 1)).sum()
    return float(2 * true_positives / max(1, (predicted == 1).sum() + (labels == 1).sum()))


@dataclass
class _Job:
    """The training of a copy of the model on one set with one seed.

    Every example is a tree of one text, whose one target is its label (engine.evaluation.log_probabilities).
    """

    dataset: Dataset
    settings: Settings
    recipe: Recipe
    model: LanguageModel
    tokenizer: Tokenizer
    runtime: Runtime
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.masked = not self.model.shape.causal
        self.train, self.validation = self._trees(self.dataset.train), self._trees(self.dataset.validation)
        self.steps_per_epoch = -(-len(self.train) // self.settings.batch)
        self.steps = self.settings.epochs * self.steps_per_epoch
        self.optimizer = replace(self.recipe.optimizer, warmup=int(self.recipe.warmup * self.steps))
        self.coefficients = LossWeighting(ObjectiveConfig(), 1, self.runtime.device).coefficients()
        self.history: list[list[int]] = []  # the predictions after every epoch

    def _trees(self, examples: Examples) -> list[TokenTree]:
        """Returns every example as a tree of one text, cut to what the model can read, with its number as the text's.

        Before each text of an example stands a boundary token, where the tokenizer has one. The label is predicted at
        the last token or, by a masked model, at the first.
        """
        boundary = [] if self.tokenizer.boundary is None else [self.tokenizer.boundary]
        longest = min(LONGEST, self.model.shape.max_length)
        encoded = iter(self.tokenizer.encode_batch([text for texts in examples.texts for text in texts]))
        trees, cut = [], 0
        for number, (texts, label) in enumerate(zip(examples.texts, examples.labels, strict=True)):
            parts = [boundary + next(encoded) for _ in texts]
            cut += sum(map(len, parts)) > longest
            while sum(map(len, parts)) > longest:
                max(parts, key=len).pop()
            ids = [token for part in parts for token in part]
            trees.append(single_text(ids, 0 if self.masked else len(ids) - 1, label, number))
        if cut:
            self.say(
                f"{self.dataset.name}: {cut} of {len(trees)} examples are longer than {longest} tokens and were cut"
            )
        return trees

    def run(self, state: Path) -> list[list[int]]:
        """Trains from the epoch on that `state` holds; returns the predictions after every epoch; a collective call."""
        student, settings = self._student(state), self.settings
        cohort = Cohort([student], self.runtime)
        labels = np.array(self.dataset.validation.labels)
        for epoch in range(len(self.history), settings.epochs):
            loss = self._epoch(cohort, epoch)
            self.history.append(self._predict(cohort))
            accuracy = _accuracy(np.array(self.history[-1]), labels)
            self.say(
                f"{self.dataset.name}, seed {settings.seed}, epoch {epoch + 1} of {settings.epochs}: "
                f"loss {loss:.4f}, accuracy {accuracy:.2%}"
            )
            saved = {"history": self.history, "student": student.state()}
            if self.runtime.is_main_process:
                with written_aside(state) as aside:
                    torch.save(saved, aside)
        return self.history

    def _student(self, state: Path) -> Student:
        shape = self.model.shape
        with torch.random.fork_rng():
            body = new_model(shape)
        body.load_state_dict(self.model.state_dict())
        rate, seed = self.settings.learning_rate, self.settings.seed
        classifier = Classifier(body, self.dataset.classes, seed)
        size = shape.layers, shape.hidden, shape.heads, shape.ffn
        config = StudentConfig(self.dataset.name, *size, dropout=DROPOUT, learning_rate=rate, seed=seed)
        student = Student(config, classifier, TrainConfig(zero_stage=0), self.optimizer, self.runtime)
        for group in student.optimizer.param_groups:
            group["weight_decay"] = self.optimizer.weight_decay  # In BabyLM 2025's code vectors decay too.
        if state.is_file():
            saved = torch.load(state)
            self.history = saved["history"]
            student.restore(saved["student"], len(self.history) * self.steps_per_epoch)
        self.runtime.barrier()  # No rank writes the next state while another still looks for this one.
        return student

    def _epoch(self, cohort: Cohort, epoch: int) -> float:
        """Trains on every example once, in an order that seed and epoch give; returns the mean loss in nats."""
        settings = self.settings
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self.train))
        total = torch.zeros(1, dtype=torch.float64, device=self.runtime.device)
        for i in range(self.steps_per_epoch):
            examples = [self.train[j] for j in order[i * settings.batch : (i + 1) * settings.batch]]
            number = epoch * self.steps_per_epoch + i + 1
            step = Step(
                number=number,
                epoch=number / self.steps_per_epoch,
                valid_tokens=len(examples),
                tokens=sum(len(tree.tokens) for tree in examples),
                words=0,
                micro_batches=self._batches(examples, epoch),
            )
            tally = accumulate(cohort, step, self.coefficients)
            rate = learning_rate(cohort[0].config, self.optimizer, number, self.steps)
            if cohort.update(tally.losses_S, tally.ce_S, [rate], stop=False).skipped:
                raise UserError(
                    f"{self.dataset.name}: loss not finite in epoch {epoch + 1}: lower finetune.learning_rate"
                )
            total += tally.ce_S
        return self.runtime.all_reduce_sum(total)[0] / len(self.train)

    def _batches(self, trees: Sequence[TokenTree], epoch: int) -> list[Batch]:
        """Returns this rank's part of a step, in micro-batches of similar lengths.

        A rank for which no example is left gets one that does not count, because every rank takes part in a step.
        """
        batches = [self._batch([trees[i] for i in mine], epoch) for mine in self._shares(trees)]
        if not batches:
            idle = self._batch([trees[0]], epoch)
            batches.append(replace(idle, targets_N=torch.full_like(idle.targets_N, IGNORED)))
        return batches

    def _shares(self, trees: Sequence[TokenTree]) -> list[list[int]]:
        """Returns this rank's part of every batch, where it has one, as indices of trees."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        batches = plan_batches(trees, world_size, padding=not self.masked)
        return [indices[rank::world_size] for indices in batches if len(indices) > rank]

    def _batch(self, trees: Sequence[TokenTree], epoch: int) -> Batch:
        """Returns examples as a batch. Their dropout depends on their numbers and the epoch."""
        batch = collate(trees, self.runtime.device)
        samples_B = batch.text_ids_N + epoch * len(self.train)
        return Batch(batch.tokens_BL, batch.targets_N, batch.rows_U, samples_B=samples_B)

    def _predict(self, cohort: Cohort) -> list[int]:
        """Returns the likeliest class of every example of the validation part; a collective call."""
        predicted = torch.zeros(len(self.validation), dtype=torch.float64, device=self.runtime.device)
        with cohort.evaluating():
            for mine in self._shares(self.validation):
                with cohort.streams(self._batch([self.validation[i] for i in mine], 0)) as [stream]:
                    logits_NC = F.linear(*stream)
                finite_N = logits_NC.isfinite().all(-1)  # The largest of NaNs would be class 0.
                predicted[mine] = torch.where(finite_N, logits_NC.argmax(-1).double(), torch.nan)
        classes = self.runtime.all_reduce_sum(predicted)
        if not all(map(math.isfinite, classes)):
            raise UserError(f"{self.dataset.name}: predictions are not finite: lower finetune.learning_rate")
        return list(map(int, classes))
