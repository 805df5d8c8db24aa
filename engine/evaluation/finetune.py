"""Fine-tuning on classification: the (Super)GLUE sets of BabyLM's evaluation data, and MSGS.

    <data>/glue_filtered/<task>.train.jsonl, <task>.valid.jsonl            `label` and the texts of TEXTS
    <data>/msgs_filtered/<set>.train.json, <set>.validation.json           `sentence` and `label` (Warstadt et al. 2020)

A head on the hidden state of the last token, which has read everything (of a masked model on the first one's, before
the layer that predicts), trains with the whole model. The recipes:

    babylm-2025   the head, optimizer, schedule and settings of BabyLM 2025's own code, epochs chosen by the validation
                  set as there: `score` is the best epoch's, `strict` the last one's
    baby-llama    learning rate, batch, epochs and seed of each task as on Baby Llama's model card, the rest as Hugging
                  Face's trainer has it (linear decay, no weight decay, gradients clipped at 1); the same head

Every (set, seed) is a job of its own, a student in the engine's loop whose tokens are classes. Ranks share out every
batch. A job that was stopped goes on from its last whole epoch, bit for bit.

B sequences, L positions, N examples, D hidden, C classes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.config.settings import FinetuneConfig, ObjectiveConfig, OptimizerConfig, StudentConfig, TrainConfig
from engine.data.batches import IGNORED, Batch, Step
from engine.data.tokenizer import Tokenizer
from engine.evaluation.results import SetScore, TaskScore
from engine.evaluation.scoring import TokenTree, collate, plan
from engine.evaluation.tasks import folder_of, json_lines
from engine.models.base import LanguageModel
from engine.models.classifier import DROPOUT, Classifier
from engine.models.families import new_model
from engine.students import schedule
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.student import Student, set_weights
from engine.system.distributed import Runtime
from engine.system.errors import UserError

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


BABYLM_2025 = {"boolq": Settings(batch=16), "multirc": Settings(batch=16), "wsc": Settings(epochs=30)}
BABY_LLAMA = {
    "boolq": Settings(3e-4, 16, 10, 12),
    "cola": Settings(4e-5, 64, 3, 12),
    "mrpc": Settings(3e-5, 64, 3, 12),
    "msgs": Settings(5e-5, 64, 10, 12),
    "multirc": Settings(1e-4, 64, 7, 42),
    "qqp": Settings(4e-5, 64, 10, 12),
    "wsc": Settings(5e-7, 1, 10, 12),
}


@dataclass(frozen=True)
class Examples:
    texts: list[tuple[str, ...]]
    labels: list[int]


@dataclass(frozen=True)
class Classification:
    task: str
    name: str  # of the set
    train: Examples
    valid: Examples

    @property
    def classes(self) -> int:
        return max(*self.train.labels, *self.valid.labels) + 1


def read_classification(task: str, data: Path) -> list[Classification]:
    """The sets of a task, one but for MSGS's eleven. Raises ValueError for a part that is missing or malformed."""
    folder = folder_of(task, data, "msgs_filtered" if task == "msgs" else "glue_filtered")
    names = (task,) if task != "msgs" else MSGS
    parts = ("train.jsonl", "valid.jsonl") if task != "msgs" else ("train.json", "validation.json")
    return [
        Classification(task, name, *(_examples(task, folder / f"{name}.{part}") for part in parts)) for name in names
    ]


def _examples(task: str, file: Path) -> Examples:
    if not file.is_file():
        raise UserError(f"{task}: no {file}: fetch it, or leave the task out")
    texts, labels = [], []
    for number, item in enumerate(json_lines(file, label=int), 1):
        try:
            texts.append(tuple(template.format(**item) for template in TEXTS[task]))
        except KeyError as error:
            raise UserError(f"{file}:{number}: expected {error.args[0]} in the JSON object") from None
        if item["label"] < 0:
            raise UserError(f"{file}:{number}: label {item['label']}: expected 0 or more")
        labels.append(item["label"])
    if not labels:
        raise UserError(f"{file} holds no examples: fetch it again, or leave the task out")
    return Examples(texts, labels)


def finetune(
    sets: Sequence[Classification],
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: FinetuneConfig,
    folder: Path,
    runtime: Runtime,
    say: Callable[[str], None] = print,
) -> TaskScore:
    """The scores of one task's sets, of every seed; `model` stays as it is. Jobs leave their results in `folder`, and
    are not done again. A collective call. Raises ValueError where a loss is not finite."""
    jobs = []
    for one in sets:
        usual = (BABY_LLAMA if config.recipe == "baby-llama" else BABYLM_2025).get(one.task)
        usual = usual or (Settings(5e-5, 64, 6, 12) if config.recipe == "baby-llama" else Settings())
        given = {key: value for key, value in asdict(config).items() if key in asdict(usual) and value is not None}
        jobs += [(one, replace(usual, seed=seed, **given)) for seed in config.seeds or (usual.seed,)]
    optimizer = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.01, clip=0.0, min_lr_ratio=0.1)
    if config.recipe == "baby-llama":
        optimizer = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0, clip=1.0, schedule="linear")
    say = say if runtime.is_main_process else lambda _: None
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"{one.name}-{_identity(model, one, optimizer, settings)}.json" for one, settings in jobs]
    for (one, settings), file in zip(jobs, results, strict=True):
        runtime.barrier()  # what rank 0 has written, all see
        state = file.with_suffix(".pt")
        if not file.is_file():
            history = _Job(one, settings, optimizer, model, tokenizer, runtime, say).run(state)
            if runtime.is_main_process:
                _replace(file, lambda path, history=history: path.write_text(json.dumps(history)))
        if runtime.is_main_process:
            state.unlink(missing_ok=True)  # not before the result is there
    runtime.barrier()
    found = [
        _judge(one, settings, json.loads(file.read_text())) for (one, settings), file in zip(jobs, results, strict=True)
    ]
    return TaskScore(sets[0].task, tuple(found))


def _identity(model: LanguageModel, one: Classification, optimizer: OptimizerConfig, settings: Settings) -> str:
    """Of all that decides a job's result."""
    digest = hashlib.sha256(repr((one, optimizer, settings)).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    aside = file.with_suffix(".partial")
    write(aside)
    os.replace(aside, file)


def _judge(one: Classification, settings: Settings, history: list[list[int]]) -> SetScore:
    """From the predictions after every epoch. MSGS is judged by Matthews' correlation, the rest by accuracy; the best
    epoch of MRPC and QQP is the one of the best F1, as in BabyLM 2025."""
    labels = np.array(one.valid.labels)
    measures = {"msgs": _matthews, "mrpc": _f1, "qqp": _f1}
    chosen = max(map(np.array, history), key=lambda guess: measures.get(one.task, _accuracy)(guess, labels))
    measure = _matthews if one.task == "msgs" else _accuracy
    score, last = measure(chosen, labels), measure(np.array(history[-1]), labels)
    n, majority = len(labels), float(np.bincount(labels).max() / len(labels))
    name = f"{one.name}, seed {settings.seed}"
    if one.task == "msgs":
        return SetScore(name, n, score, last, (1 - score**2) / math.sqrt(n), 0.0, 0.0)
    return SetScore(name, n, score, last, math.sqrt(score * (1 - score) / n), 1 / one.classes, majority)


def _accuracy(guess: np.ndarray, labels: np.ndarray) -> float:
    return float((guess == labels).mean())


def _f1(guess: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1."""
    both = ((guess == 1) & (labels == 1)).sum()
    return float(2 * both / max(1, (guess == 1).sum() + (labels == 1).sum()))


def _matthews(guess: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes; 0 where one of them never occurs."""
    return float(np.corrcoef(guess, labels)[0, 1]) if guess.std() > 0 and labels.std() > 0 else 0.0


class _Job:
    """One set, one seed: a student of a copy of the model, and the examples as strands that end where the head reads.

    A step is the engine's (`accumulate`, `Cohort.step`), an example's label its only target; ranks share out a batch.
    """

    def __init__(
        self,
        one: Classification,
        settings: Settings,
        optimizer: OptimizerConfig,
        model: LanguageModel,
        tokenizer: Tokenizer,
        runtime: Runtime,
        say: Callable[[str], None],
    ) -> None:
        self.one, self.settings, self.runtime, self.say = one, settings, runtime, say
        longest, self.masked = min(LONGEST, model.shape.max_length), not model.shape.causal
        self.train, self.valid = (
            _trees(part, tokenizer, longest, say, one.name, first=self.masked) for part in (one.train, one.valid)
        )
        self.per_epoch = -(-len(self.train) // settings.batch)
        steps = settings.epochs * self.per_epoch
        warmup = int(0.06 * steps) if optimizer.schedule == "cosine" else 0
        self.optimizer, self.steps = replace(optimizer, warmup=warmup), steps
        self.objective = LossWeighting(ObjectiveConfig(), 1, runtime.device).coefficients()
        self.body = model
        self.history: list[list[int]] = []  # the predictions after every epoch

    def run(self, state: Path) -> list[list[int]]:
        """The predictions after every epoch, from what `state` holds on. A collective call."""
        student = self._student(state)
        cohort = Cohort([student], self.runtime)
        while len(self.history) < self.settings.epochs:
            loss = self._epoch(cohort, len(self.history))
            self.history.append(self._predict(cohort))
            share = _accuracy(np.array(self.history[-1]), np.array(self.one.valid.labels))
            self.say(
                f"{self.one.name}, seed {self.settings.seed}, epoch {len(self.history)} of {self.settings.epochs}: "
                f"loss {loss:.4f}, accuracy {share:.2%}"
            )
            saved = {"history": self.history, "record": student.state()}
            if self.runtime.is_main_process:
                _replace(state, lambda path, saved=saved: torch.save(saved, path))
        return self.history

    def _student(self, state: Path) -> Student:
        settings = self.settings
        with torch.random.fork_rng():
            body = new_model(self.body.shape)
        body.load_state_dict(self.body.state_dict())
        model = Classifier(body, self.one.classes, settings.seed)
        saved: dict[str, Any] | None = torch.load(state) if state.is_file() else None
        self.runtime.barrier()  # nobody writes the next state while another still looks for this one
        if saved is not None:
            set_weights(model, saved["record"])
            self.history = saved["history"]
        shape = body.shape
        about = StudentConfig(
            *(self.one.name, shape.layers, shape.hidden, shape.heads, shape.ffn),
            dropout=DROPOUT,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
        )
        student = Student(about, model, TrainConfig(zero_stage=0), self.optimizer, self.runtime)
        for group in student.optimizer.param_groups:  # vectors too, as in BabyLM 2025's code
            group["weight_decay"] = self.optimizer.weight_decay
        if saved is not None:
            student.restore(saved["record"], len(self.history) * self.per_epoch)
        return student

    def _epoch(self, cohort: Cohort, epoch: int) -> float:
        """One pass over the training part in an order of (seed, epoch); its mean loss in nats an example."""
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.train))
        total = torch.zeros(1, dtype=torch.float64, device=self.runtime.device)
        for turn in range(self.per_epoch):
            chosen = order[turn * self.settings.batch : (turn + 1) * self.settings.batch].tolist()
            number = epoch * self.per_epoch + turn + 1
            micro_batches = self._batches([self.train[i] for i in chosen], epoch)
            tokens = sum(len(self.train[i].tokens) for i in chosen)
            step = Step(number, number / self.per_epoch, len(chosen), tokens, 0, micro_batches)
            tally = accumulate(cohort, step, self.objective)
            rate = self.settings.learning_rate * schedule.factor(self.optimizer, number, self.steps)
            outcome = cohort.update(tally.losses_S, tally.ce_S, [rate], stop=False)
            if outcome.skipped:
                raise UserError(f"{self.one.name}: loss not finite in epoch {epoch + 1}: lower finetune.learning_rate")
            total += tally.ce_S
        return self.runtime.all_reduce_sum(total)[0] / len(self.train)

    def _batches(self, trees: Sequence[TokenTree], epoch: int) -> list[Batch]:
        """This rank's part of a batch, in pieces of like length; dropout draws from an example's number and the epoch.

        A rank for whom nothing is left takes an example that does not count, as every rank must take part in a step.
        """
        batches = []
        for indices in plan(trees, self.runtime.world_size, padding=not self.masked):
            mine = [trees[i] for i in indices[self.runtime.rank :: self.runtime.world_size]]
            if mine:
                batches.append(self._batch(mine, epoch))
        if not batches:
            idle = self._batch([trees[0]], epoch)
            batches.append(replace(idle, targets_N=torch.full_like(idle.targets_N, IGNORED)))
        return batches

    def _batch(self, trees: list[TokenTree], epoch: int) -> Batch:
        batch = collate(trees, self.runtime.device)
        samples_B = batch.owners_N + epoch * len(self.train)
        return Batch(batch.tokens_BL, batch.targets_N, batch.rows_U, samples_B=samples_B)

    def _predict(self, cohort: Cohort) -> list[int]:
        (student,) = cohort
        guesses = torch.zeros(len(self.valid), dtype=torch.float64, device=self.runtime.device)
        world_size, rank = self.runtime.world_size, self.runtime.rank
        with cohort.evaluating():
            for indices in plan(self.valid, world_size, padding=not self.masked):
                mine = indices[rank::world_size]
                if mine:
                    hidden_ND, head, bias = student.project(student.body(self._batch([self.valid[i] for i in mine], 0)))
                    logits_NC = F.linear(hidden_ND, head, bias)
                    # The likeliest of NaNs would be class 0.
                    finite_N = logits_NC.isfinite().all(-1)
                    guesses[mine] = torch.where(finite_N, logits_NC.argmax(-1).double(), torch.nan)
        found = self.runtime.all_reduce_sum(guesses)
        if not all(map(math.isfinite, found)):
            raise UserError(f"{self.one.name}: predictions are not finite: lower finetune.learning_rate")
        return list(map(int, found))


def _trees(
    part: Examples, tokenizer: Tokenizer, longest: int, say: Callable[[str], None], name: str, *, first: bool = False
) -> list[TokenTree]:
    """A boundary token, where the tokenizer has one, before each text of an example, as its own template puts it. The
    label belongs to the last token, or to the `first`."""
    front = [] if tokenizer.boundary is None else [tokenizer.boundary]
    encoded = iter(tokenizer.encode_batch([text for texts in part.texts for text in texts]))
    trees, cut = [], 0
    for number, (texts, label) in enumerate(zip(part.texts, part.labels, strict=True)):
        vocab_size = [front + next(encoded) for _ in texts]
        cut += sum(map(len, vocab_size)) > longest
        while sum(map(len, vocab_size)) > longest:
            max(vocab_size, key=len).pop()
        ids = [token for piece in vocab_size for token in piece]
        places, ends = list(range(len(ids))), [len(ids)] * len(ids)
        trees.append(TokenTree(ids, places, ends, [0 if first else len(ids) - 1], [0], [label], [number]))
    if cut:
        say(f"{name}: {cut} of {len(trees)} examples are longer than {longest} tokens and were cut")
    return trees


CLASSIFICATION = tuple(TEXTS)
