"""BabyLM's zero-shot tasks, from files in the formats of its evaluation data to questions.

A question is a list of answers of which the first is right, as whole texts; or, where one text is scored, a context and
what follows it.

    blimp                    67 sets of minimal pairs, sentence_good and sentence_bad, full or filtered (Warstadt et al.
                             2020)
    blimp_supplement         five more
    ewok                     Context1 + " " + Target1 against Context1 + " " + Target2, a set for each Domain
    entity_tracking          input_prefix + each of options, a set for each file and number of operations (numops)
    wug_adj_nominalization   two made-up nouns, -ity and -ness, in `sentences`; `ratio` of people chose the first. Its
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

from engine.evaluation import results
from engine.evaluation.results import SetScore
from engine.system.errors import UserError

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
CONTROLS = ("Subtlex_log10", "length", "context_length")
SELF_PACED = "self_paced_reading_time"


@dataclass(frozen=True)
class Question:
    subset: str
    answers: tuple[str, ...]  # the first is right
    context: str = ""  # with one answer: what stands before it, cut into tokens by itself
    group: str | None = None


Judge = Callable[[Sequence[Question], Sequence[Sequence[float]], Sequence[Sequence[int]]], list[SetScore]]


@dataclass(frozen=True)
class Task:
    name: str
    questions: list[Question]
    judge: Judge  # (questions, the answers' log-probabilities in nats, their lengths in tokens) -> a score for each set


def read_tasks(names: Sequence[str], data: Path) -> list[Task]:
    """Raises ValueError for a name that is not known, and what is missing or malformed in its files."""
    for name in names:
        if name not in ZERO_SHOT:
            raise UserError(f"tasks: {name!r} is not known: expected some of {', '.join(ZERO_SHOT)}")
    return [ZERO_SHOT[name](name, data) for name in names]


def json_lines(file: Path, **kinds: type) -> Iterator[dict]:
    """The objects of a JSON-lines file; ValueError names file and line of one without a key of `kinds`, or with another
    kind of value there, or an empty text."""
    try:
        text = file.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    for number, line in enumerate(text.split("\n") if text else [], 1):  # not splitlines: JSON may hold other line ends
        item: dict = {}
        try:
            item = json.loads(line)
            good = all(isinstance(item[key], kind) and item[key] != "" for key, kind in kinds.items())
        except (json.JSONDecodeError, KeyError, TypeError):
            good = False
        if not good:
            wanted = " and ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
            raise UserError(f"{file}:{number}: expected {wanted} in a JSON object")
        yield item


def minimal_pairs(name: str, path: Path, sets: int | None = None) -> Task:
    """The pairs of a JSON-lines file, or of all in a folder, by phenomenon, else UID, else the file's name."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{name}={path}: expected a file or folder of *.jsonl with minimal pairs")
    if sets is not None and len(files) != sets:
        raise UserError(f"{name}: {path} holds {len(files)} sets, not all {sets}: fetch the missing ones")
    questions = []
    for file in files:
        before = len(questions)
        for item in json_lines(file, sentence_good=str, sentence_bad=str):
            subset = item.get("phenomenon") or item.get("UID") or file.stem
            group = item.get("linguistics_term")
            group = "argument_structure" if group == "s-selection" else group  # which counts as such in all of BabyLM
            questions.append(Question(subset, (item["sentence_good"], item["sentence_bad"]), group=group))
        if len(questions) == before:
            raise UserError(f"{name}: {file} holds no pairs: fetch it again, or leave the task out")
    return Task(name, questions, _accuracies)


def _accuracies(
    questions: Sequence[Question], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> list[SetScore]:
    places = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.subset, question.group].append(place)
    return [
        results.accuracy(name, [scores[i] for i in at], [lengths[i] for i in at], group)
        for (name, group), at in places.items()
    ]


def folder_of(name: str, data: Path, *choices: str) -> Path:
    """The first of the folders that exists; `data` itself may be it."""
    for choice in (*choices, *(f"fast/{choice}" for choice in choices)):
        if (data / choice).is_dir():
            return data / choice
        if data.name == choice and data.is_dir():
            return data
    raise UserError(f"{name}: no {' or '.join(choices)} in {data}: name the folder of the evaluation data, or drop it")


def _pairs(*choices: str, sets: int) -> Callable[[str, Path], Task]:
    return lambda name, data: minimal_pairs(name, folder_of(name, data, *choices), sets)


def _items(name: str, folder: Path, sets: int | None, **kinds: type) -> Iterator[tuple[Path, int, dict]]:
    """The items of a folder's files, with file and line. Raises ValueError where not all sets are there."""
    files = sorted(folder.glob("*.jsonl"))
    if not files or len(files) != (sets or len(files)):
        raise UserError(f"{name}: {folder} holds {len(files)} sets, not {sets or 'any'}: fetch the missing ones")
    for file in files:
        number = 0
        for number, item in enumerate(json_lines(file, **kinds), 1):
            yield file, number, item
        if number == 0:
            raise UserError(f"{name}: {file} holds no items: fetch it again, or leave the task out")


def _ewok(name: str, data: Path) -> Task:
    questions = []
    folder = folder_of(name, data, "ewok_filtered", "ewok_fast", "ewok")
    for _, _, item in _items(name, folder, 11, Context1=str, Target1=str, Target2=str, Domain=str):
        answers = tuple(f"{item['Context1']} {item[target]}" for target in ("Target1", "Target2"))
        questions.append(Question(item["Domain"], answers))
    return Task(name, questions, _accuracies)


def _entity_tracking(name: str, data: Path) -> Task:
    questions = []
    folder = folder_of(name, data, "entity_tracking", "entity_tracking_fast")
    sets = 3 if folder.name == "entity_tracking" else None  # of a milestone's share
    for file, number, item in _items(name, folder, sets, input_prefix=str, options=list, numops=int):
        if len(item["options"]) < 2 or not all(isinstance(option, str) and option for option in item["options"]):
            raise UserError(f"{file}:{number}: expected at least two texts in options")
        answers = tuple(item["input_prefix"] + option for option in item["options"])
        questions.append(Question(f"{file.stem}_{item['numops']}_ops", answers))
    return Task(name, questions, _accuracies)


def _wug(name: str, data: Path) -> Task:
    questions, ratios = [], []
    folder = folder_of(name, data, "wug_adj_nominalization")
    for file, number, item in _items(name, folder, 1, sentences=str, ratio=Real):
        answers = tuple(item["sentences"].split("\t"))
        if len(answers) != 2 or not all(answers) or not 0 <= item["ratio"] <= 1:
            raise UserError(f"{file}:{number}: expected two sentences with a tab between, a ratio of 0 to 1")
        questions.append(Question(name, answers))
        ratios.append(item["ratio"])

    def judge(
        _: Sequence[Question], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
    ) -> list[SetScore]:
        return [results.correlation("correlation with people", [a - b for a, b in scores], ratios, lengths)]

    return Task(name, questions, judge)


def _reading(name: str, data: Path) -> Task:
    """Two sets: eye tracking, the mean over four measures, and self-paced reading, there with the word before as well.

    The predictors and measures are those of BabyLM 2025. There, a word of several tokens is glued to its context before
    the second is predicted; here context and word are cut into tokens once, the same for words of one token.
    """
    file = folder_of(name, data, "reading") / "reading_data.csv"
    if not file.is_file():
        raise UserError(f"{name}: no {file}: fetch it, or leave the task out")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    texts, numbers = ("item", "word", "prev_item", "prev_word"), (*CONTROLS, "prev_length", *EYE_TRACKING, SELF_PACED)
    if not rows:
        raise UserError(f"{name}: {file} holds no words: fetch it again, or leave the task out")
    for number, row in enumerate(rows, 2):
        for key in (*texts, *numbers):
            if row.get(key) is None or (key in numbers and not _is_number(row[key] or "0")):
                kind = "a text" if key in texts else "a number"
                raise UserError(f"{file}:{number}: {key}={row.get(key)!r}: expected {kind}")
    columns = {key: np.array([float(row[key] or "nan") for row in rows]) for key in numbers}
    # A sentence that begins with "None" has an empty context in the published file: a word that was read as a gap.
    questions = [Question(name, (row["word"],), row["item"] or "None") for row in rows]
    questions += [Question(name, (row["prev_word"],), row["prev_item"]) for row in rows if row["prev_word"]]
    later = np.array([bool(row["prev_word"]) for row in rows])

    def judge(
        _: Sequence[Question], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
    ) -> list[SetScore]:
        surprisal, before = -np.array(scores)[:, 0], np.full(len(rows), math.nan)
        word, before[later] = surprisal[: len(rows)], surprisal[len(rows) :]
        basic = np.column_stack([columns[key] for key in CONTROLS])
        eyes = [results.explained(key, columns[key], basic, word) for key in EYE_TRACKING]
        mean = replace(
            eyes[0],
            name="eye tracking",
            score=float(np.mean([e.score for e in eyes])),
            strict=float(np.mean([e.score for e in eyes])),
            error=float(np.mean([e.error for e in eyes])),  # of measures on the same words: no smaller than each
        )
        spillover = np.column_stack([basic, columns["prev_length"], before])
        return [mean, results.explained("self-paced reading", columns[SELF_PACED], spillover, word)]

    return Task(name, questions, judge)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
