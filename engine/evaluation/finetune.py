"""Fine-tuning on classification: the (Super)GLUE sets of BabyLM's evaluation data, and MSGS.

    <data>/glue_filtered/<task>.train.jsonl, <task>.valid.jsonl            `label` and the texts of TEXTS
    <data>/msgs_filtered/<set>.train.json, <set>.validation.json           `sentence` and `label` (Warstadt et al. 2020)

A head on the hidden state of the last token, which has read everything (of a masked model on the first one's, before
the layer that predicts), trains with the whole model. The recipes:

    babylm-2025   the head, optimizer, schedule and settings of BabyLM 2025's own code, epochs chosen by the validation
                  set as there: `score` is the best epoch's, `strict` the last one's
    baby-llama    learning rate, batch, epochs and seed of each task as on Baby Llama's model card, the rest as Hugging
                  Face's trainer has it (linear decay, no weight decay, gradients clipped at 1); the same head

Every (set, seed) is a job of its own, and ranks share out the jobs. A job that was stopped goes on from its last whole
epoch, bit for bit.

B sequences, L positions, D hidden, C classes.
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
from torch import Tensor, nn

from engine import schedule
from engine.config import FinetuneConfig, OptimizerConfig
from engine.evaluation.results import SetScore, TaskScore
from engine.evaluation.scoring import Strand, batch_of, plan
from engine.evaluation.tasks import folder_of, json_lines
from engine.models.dropout import draws
from engine.models.families import Model, model_of
from engine.models.llama import Llama
from engine.models.roberta import Roberta
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer

LONGEST = 512  # tokens; longer examples are cut, the longer of two texts first
DROPOUT = 0.1  # before the head's last layer

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
    """The sets of a task, one but for MSGS. Raises ValueError for a part that is missing or malformed."""
    folder = folder_of(task, data, "msgs_filtered" if task == "msgs" else "glue_filtered")
    names = [task] if task != "msgs" else sorted(file.name.split(".train.")[0] for file in folder.glob("*.train.json*"))
    if not names:
        raise ValueError(f"{task}: no *.train.json in {folder}: fetch them, or leave the task out")
    parts = ("train.jsonl", "valid.jsonl") if task != "msgs" else ("train.json", "validation.json")
    return [
        Classification(task, name, *(_examples(task, folder / f"{name}.{part}") for part in parts)) for name in names
    ]


def _examples(task: str, file: Path) -> Examples:
    if not file.is_file():
        raise ValueError(f"{task}: no {file}: fetch it, or leave the task out")
    texts, labels = [], []
    for number, item in enumerate(json_lines(file, label=int), 1):
        try:
            texts.append(tuple(template.format(**item) for template in TEXTS[task]))
        except KeyError as error:
            raise ValueError(f"{file}:{number}: expected {error.args[0]} in the JSON object") from None
        if item["label"] < 0:
            raise ValueError(f"{file}:{number}: label {item['label']}: expected 0 or more")
        labels.append(item["label"])
    if not labels:
        raise ValueError(f"{file} holds no examples: fetch it again, or leave the task out")
    return Examples(texts, labels)


def finetune(
    sets: Sequence[Classification],
    model: Model,
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
    optimizer = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.01, clip=0.0, floor=0.1)
    if config.recipe == "baby-llama":
        optimizer = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0, clip=1.0, schedule="linear")
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"{one.name}-{_identity(model, one, optimizer, settings)}.json" for one, settings in jobs]
    for number, ((one, settings), file) in enumerate(zip(jobs, results, strict=True)):
        if number % runtime.world == runtime.rank and not file.is_file():
            history = _Job(one, settings, optimizer, model, tokenizer, runtime.device, say).run(file.with_suffix(".pt"))
            _replace(file, lambda path, history=history: path.write_text(json.dumps(history)))
    runtime.barrier()
    found = [
        _judge(one, settings, json.loads(file.read_text())) for (one, settings), file in zip(jobs, results, strict=True)
    ]
    return TaskScore(sets[0].task, tuple(found))


def _identity(model: Model, one: Classification, optimizer: OptimizerConfig, settings: Settings) -> str:
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
    """One set, one seed: the model's copy with its head, and the examples as strands that end where the head reads."""

    def __init__(
        self,
        one: Classification,
        settings: Settings,
        optimizer: OptimizerConfig,
        model: Model,
        tokenizer: Tokenizer,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.one, self.settings, self.say, self.device = one, settings, say, device
        longest, self.masked = min(LONGEST, model.shape.positions), isinstance(model, Roberta)
        self.train, self.valid = (
            _strands(part, tokenizer, longest, say, one.name, first=self.masked) for part in (one.train, one.valid)
        )
        steps = settings.epochs * -(-len(self.train) // settings.batch)
        warmup = int(0.06 * steps) if optimizer.schedule == "cosine" else 0
        self.schedule, self.steps = replace(optimizer, warmup=warmup), steps

        with torch.random.fork_rng():
            body = model_of(model.shape)
            torch.manual_seed(settings.seed)
            head = _head(model.shape.hidden, one.classes)
        body.load_state_dict(model.state_dict())
        self.model = nn.ModuleDict({"body": body, "head": head}).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    def run(self, state: Path) -> list[list[int]]:
        """The predictions after every epoch, from what `state` holds on; it is gone at the end."""
        history: list[list[int]] = []
        if state.is_file():
            saved: dict[str, Any] = torch.load(state, map_location=self.device)
            history = saved["history"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        while len(history) < self.settings.epochs:
            loss = self._epoch(len(history))
            history.append(self._predict())
            share = _accuracy(np.array(history[-1]), np.array(self.one.valid.labels))
            self.say(
                f"{self.one.name}, seed {self.settings.seed}, epoch {len(history)} of {self.settings.epochs}: loss "
                f"{loss:.4f}, accuracy {share:.2%}"
            )
            saved = {
                "history": history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            _replace(state, lambda path, saved=saved: torch.save(saved, path))
        state.unlink(missing_ok=True)
        return history

    def _epoch(self, epoch: int) -> float:
        """One pass over the training part in an order of (seed, epoch); its mean loss in nats an example."""
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.train))
        per_epoch, total = -(-len(order) // self.settings.batch), 0.0
        self.model.train()
        with torch.random.fork_rng():  # the head's dropout alone draws from it
            torch.manual_seed(self.settings.seed * 1000 + epoch)
            for turn in range(per_epoch):
                chosen = [self.train[i] for i in order[turn * self.settings.batch : (turn + 1) * self.settings.batch]]
                factor = schedule.factor(self.schedule, epoch * per_epoch + turn + 1, self.steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.settings.learning_rate * factor
                self.optimizer.zero_grad()
                for indices in plan(chosen, 1, padding=not self.masked):  # a batch in pieces of like length
                    logits_BC, labels_B, _ = self._logits([chosen[i] for i in indices], epoch)
                    loss = F.cross_entropy(logits_BC, labels_B, reduction="sum") / len(chosen)
                    loss.backward()
                    total += loss.item() * len(chosen)
                if self.schedule.clip > 0:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
                self.optimizer.step()
        if not math.isfinite(total):
            raise ValueError(f"{self.one.name}: loss not finite in epoch {epoch + 1}: lower finetune.learning_rate")
        return total / len(self.train)

    @torch.no_grad()
    def _predict(self) -> list[int]:
        self.model.eval()
        guesses = torch.empty(len(self.valid), dtype=torch.long)
        for indices in plan(self.valid, 1, padding=not self.masked):
            logits_BC, _, owners_B = self._logits([self.valid[i] for i in indices], epoch=0)
            if not logits_BC.isfinite().all():  # the likeliest of NaNs is class 0
                raise ValueError(f"{self.one.name}: predictions are not finite: lower finetune.learning_rate")
            guesses[owners_B.cpu()] = logits_BC.argmax(-1).cpu()
        return guesses.tolist()

    def _logits(self, strands: list[Strand], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, C], labels [B] and numbers [B] of some examples; dropout draws from number and epoch."""
        batch = batch_of(strands, self.device)
        body = self.model["body"]
        numbers_B = batch.owners_N + epoch * len(self.train)
        dropout = () if isinstance(body, Llama) else (draws(self.settings.seed, numbers_B),)
        states = body.states if isinstance(body, Roberta) else body
        hidden_BD = states(batch.tokens_BL, batch.rows_U, *dropout)
        return self.model["head"](hidden_BD), batch.targets_N, batch.owners_N


def _head(hidden: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden, elementwise_affine=False),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.LayerNorm(hidden, elementwise_affine=False),
        nn.Dropout(DROPOUT),
        nn.Linear(hidden, classes),
    )


def _strands(
    part: Examples, tokenizer: Tokenizer, longest: int, say: Callable[[str], None], name: str, *, first: bool = False
) -> list[Strand]:
    """A boundary token, where the tokenizer has one, before each text of an example, as its own template puts it. The
    label belongs to the last token, or to the `first`."""
    front = [] if tokenizer.boundary is None else [tokenizer.boundary]
    encoded = iter(tokenizer.encode_batch([text for texts in part.texts for text in texts]))
    strands, cut = [], 0
    for number, (texts, label) in enumerate(zip(part.texts, part.labels, strict=True)):
        pieces = [front + next(encoded) for _ in texts]
        cut += sum(map(len, pieces)) > longest
        while sum(map(len, pieces)) > longest:
            max(pieces, key=len).pop()
        ids = [token for piece in pieces for token in piece]
        places, ends = list(range(len(ids))), [len(ids)] * len(ids)
        strands.append(Strand(ids, places, ends, [0 if first else len(ids) - 1], [0], [label], [number]))
    if cut:
        say(f"{name}: {cut} of {len(strands)} examples are longer than {longest} tokens and were cut")
    return strands


CLASSIFICATION = tuple(TEXTS)
