"""BabyLM's zero-shot tasks, read from the files of its evaluation data.

A question is a list of answers, as whole texts, of which the first is right; or one text to score behind a context.

    blimp                    67 sets of minimal pairs, sentence_good and sentence_bad, full or filtered (Warstadt et al.
                             2020)
    blimp_supplement         five more sets
    ewok                     Context1 + " " + Target1 against Context1 + " " + Target2, a set for each Domain
    entity_tracking          input_prefix + each of options, a set for each file and number of operations (numops)
    wug_adj_nominalization   two made-up nouns, -ity and -ness, in `sentences`; `ratio` of people chose the first. The
                             score is the rank correlation of the model's probability with it (Hofmann et al. 2024)
    reading                  surprisal against reading times in reading_data.csv (de Varda et al. 2023)
    blimp_fast, supplement_fast   200 and 50 pairs a set, for milestones
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import numpy as np

from engine.evaluation.metrics import SetScore, accuracy, correlation, explained_variance
from engine.system.errors import UserError

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
CONTROLS = ("Subtlex_log10", "length", "context_length")
SELF_PACED = "self_paced_reading_time"
READING_TEXTS = ("item", "word", "prev_item", "prev_word")
READING_NUMBERS = (*CONTROLS, "prev_length", *EYE_TRACKING, SELF_PACED)

Numbers = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Question:
    subset: str  # the name of its set
    answers: tuple[str, ...]  # The first is right.
    context: str = ""  # what stands before a single answer; it is cut into tokens by itself
    phenomenon: str | None = None


# Makes set scores of questions, their answers' log-probabilities in nats, and their answers' lengths in tokens.
Metric = Callable[[Sequence[Question], Numbers, Sequence[Sequence[int]]], list[SetScore]]


@dataclass(frozen=True)
class Task:
    name: str
    questions: list[Question]
    metric: Metric


def read_tasks(names: Sequence[str], data: Path) -> list[Task]:
    """Returns the tasks. Raises UserError for an unknown name, and for files that are missing or malformed."""
    for name in names:
        if name not in ZERO_SHOT:
            raise UserError(f"tasks: {name!r} is not known: expected some of {', '.join(ZERO_SHOT)}")
    return [ZERO_SHOT[name](name, data) for name in names]


def minimal_pairs(name: str, path: Path, sets: int | None = None) -> Task:
    """Returns the pairs of a JSON-lines file or of all in a folder.

    A pair's set is its phenomenon or else its UID or else the file's name. Raises UserError where there are no pairs,
    or files for another number of sets than `sets`.
    """
    questions = []
    for file, _, item in read_items(name, path, sets, sentence_good=str, sentence_bad=str):
        subset = item.get("phenomenon") or item.get("UID") or file.stem
        phenomenon = item.get("linguistics_term")
        if phenomenon == "s-selection":
            phenomenon = "argument_structure"  # BabyLM counts it there.
        answers = item["sentence_good"], item["sentence_bad"]
        questions.append(Question(subset, answers, phenomenon=phenomenon))
    return Task(name, questions, accuracies)


def read_items(name: str, path: Path, sets: int | None = None, **types: type) -> Iterator[tuple[Path, int, dict]]:
    """Yields file, line number and object for every line of a JSON-lines file, or of all in a folder.

    Raises UserError for a missing or empty file, for files of another number than `sets`, and for an object in which a
    key of `types` is missing, has a value of another type, or an empty text; then it names file and line.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{name}={path}: expected a file or folder of *.jsonl: fetch it, or leave the task out")
    if len(files) != (sets or len(files)):
        raise UserError(f"{name}: {path} holds {len(files)} sets, expected {sets}: fetch the missing ones")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
        if not text:
            raise UserError(f"{name}: {file} holds no items: fetch it again, or leave the task out")
        # JSON may hold line separators that splitlines would split at.
        for number, line in enumerate(text.split("\n"), 1):
            try:
                item = json.loads(line)
                if not all(isinstance(item[key], kind) and item[key] != "" for key, kind in types.items()):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError):
                expected = " and ".join(f"{key} ({kind.__name__})" for key, kind in types.items())
                raise UserError(
                    f"{file}:{number}: expected {expected} in a JSON object; fetch the file again"
                ) from None
            yield file, number, item


def accuracies(questions: Sequence[Question], scores: Numbers, lengths: Sequence[Sequence[int]]) -> list[SetScore]:
    """Returns the accuracy on each set of questions."""
    sets = defaultdict(list)
    for i, question in enumerate(questions):
        sets[question.subset, question.phenomenon].append(i)
    return [
        accuracy(name, [scores[i] for i in indices], [lengths[i] for i in indices], phenomenon)
        for (name, phenomenon), indices in sets.items()
    ]


def folder_of(name: str, data: Path, *choices: str) -> Path:
    """Returns the first of these folders of `data` that exists; `data` itself may be one of them.

    Raises UserError where none exists.
    """
    for choice in (*choices, *(f"fast/{choice}" for choice in choices)):
        if (data / choice).is_dir():
            return data / choice
        if data.name == choice and data.is_dir():
            return data
    raise UserError(f"{name}: no {' or '.join(choices)} in {data}: name the folder of the evaluation data, or drop it")


def _pairs(*choices: str, sets: int) -> Callable[[str, Path], Task]:
    return lambda name, data: minimal_pairs(name, folder_of(name, data, *choices), sets)


def _ewok(name: str, data: Path) -> Task:
    folder = folder_of(name, data, "ewok_filtered", "ewok_fast", "ewok")
    questions = [
        Question(item["Domain"], tuple(f"{item['Context1']} {item[target]}" for target in ("Target1", "Target2")))
        for _, _, item in read_items(name, folder, 11, Context1=str, Target1=str, Target2=str, Domain=str)
    ]
    return Task(name, questions, accuracies)


def _entity_tracking(name: str, data: Path) -> Task:
    questions = []
    folder = folder_of(name, data, "entity_tracking", "entity_tracking_fast")
    sets = 3 if folder.name == "entity_tracking" else None  # The milestones' data has fewer.
    for file, number, item in read_items(name, folder, sets, input_prefix=str, options=list, numops=int):
        if len(item["options"]) < 2 or not all(isinstance(option, str) and option for option in item["options"]):
            raise UserError(f"{file}:{number}: expected at least two texts in options; fetch the file again")
        answers = tuple(item["input_prefix"] + option for option in item["options"])
        questions.append(Question(f"{file.stem}_{item['numops']}_ops", answers))
    return Task(name, questions, accuracies)


def _wug(name: str, data: Path) -> Task:
    questions, ratios = [], []
    folder = folder_of(name, data, "wug_adj_nominalization")
    for file, number, item in read_items(name, folder, 1, sentences=str, ratio=Real):
        answers = tuple(item["sentences"].split("\t"))
        if len(answers) != 2 or not all(answers) or not 0 <= item["ratio"] <= 1:
            raise UserError(f"{file}:{number}: expected two sentences with a tab between, and a ratio of 0 to 1")
        questions.append(Question(name, answers))
        ratios.append(item["ratio"])

    def metric(_: Sequence[Question], scores: Numbers, lengths: Sequence[Sequence[int]]) -> list[SetScore]:
        return [correlation("correlation with people", [a - b for a, b in scores], ratios, lengths)]

    return Task(name, questions, metric)


def _reading(name: str, data: Path) -> Task:
    """Returns the words of the reading task, and for each but the first of a sentence also the word before it.

    Its two sets are eye tracking, the mean over four measures, and self-paced reading, in which the word before counts
    too. Predictors and measures are those of BabyLM 2025. There a word of several tokens is joined to its context
    before the second token is predicted; here context and word are cut into tokens once, which is the same for words of
    one token.
    """
    rows = _reading_rows(name, folder_of(name, data, "reading") / "reading_data.csv")
    columns = {key: np.array([float(row[key] or "nan") for row in rows]) for key in READING_NUMBERS}
    # The published file has an empty context for a sentence that begins with "None", which was read as a gap.
    questions = [Question(name, (row["word"],), row["item"] or "None") for row in rows]
    questions += [Question(name, (row["prev_word"],), row["prev_item"]) for row in rows if row["prev_word"]]
    has_word_before = np.array([bool(row["prev_word"]) for row in rows])

    def metric(_: Sequence[Question], scores: Numbers, lengths: Sequence[Sequence[int]]) -> list[SetScore]:
        surprisals, before = -np.array(scores)[:, 0], np.full(len(rows), math.nan)
        surprisal, before[has_word_before] = surprisals[: len(rows)], surprisals[len(rows) :]
        controls = np.column_stack([columns[key] for key in CONTROLS])
        measures = [explained_variance(key, columns[key], controls, surprisal) for key in EYE_TRACKING]
        score = float(np.mean([measure.score for measure in measures]))
        # The measures are of the same words, so that their mean is no surer than each of them.
        error = float(np.mean([measure.standard_error for measure in measures]))
        eye_tracking = replace(measures[0], name="eye tracking", score=score, strict_score=score, standard_error=error)
        controls = np.column_stack([controls, columns["prev_length"], before])
        return [eye_tracking, explained_variance("self-paced reading", columns[SELF_PACED], controls, surprisal)]

    return Task(name, questions, metric)


def _reading_rows(name: str, file: Path) -> list[dict[str, str]]:
    """Returns the rows of reading_data.csv. Raises UserError for a value that is missing or no number."""
    if not file.is_file():
        raise UserError(f"{name}: no {file}: fetch it, or leave the task out")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        raise UserError(f"{name}: {file} holds no words: fetch it again, or leave the task out")
    for number, row in enumerate(rows, 2):
        for key in (*READING_TEXTS, *READING_NUMBERS):
            value = row.get(key)
            try:
                valid = value is not None and (key in READING_TEXTS or math.isfinite(float(value or "0")))
            except ValueError:
                valid = False
            if not valid:
                expected = "a text" if key in READING_TEXTS else "a number"
                raise UserError(f"{file}:{number}: {key}={value!r}: expected {expected}; fetch the file again")
    return rows


ZERO_SHOT: dict[str, Callable[[str, Path], Task]] = {
    "blimp": _pairs("blimp_filtered", "blimp", sets=67),
    "blimp_supplement": _pairs("supplement_filtered", "blimp_supplement", sets=5),
    "ewok": _ewok,
    "entity_tracking": _entity_tracking,
    "wug_adj_nominalization": _wug,
    "reading": _reading,
    "blimp_fast": _pairs("blimp_fast", sets=67),
    "supplement_fast": _pairs("supplement_fast", sets=5),
}
