import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.evaluation.tasks import CONTROLS, EYE_TRACKING, SELF_PACED, minimal_pairs, read_tasks
from engine.system.errors import UserError


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def pair(good: str = "g", bad: str = "b", **more: str) -> dict[str, str]:
    return {"sentence_good": good, "sentence_bad": bad, **more}


def test_pairs_of_a_file_or_all_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", pair("g1", "b1"), pair("g2", "b2", phenomenon="own", UID="x"))
    write(tmp_path / "a.jsonl", pair("g3\u2028rest", "b3", UID="uid", linguistics_term="s-selection"))
    (tmp_path / "c.txt").write_text("not read")
    in_b = [("b", ("g1", "b1"), None), ("own", ("g2", "b2"), None)]
    from_file = minimal_pairs("p", tmp_path / "b.jsonl").questions
    assert [(q.subset, q.answers, q.phenomenon) for q in from_file] == in_b
    in_folder = [(q.subset, q.answers, q.phenomenon) for q in minimal_pairs("p", tmp_path).questions]
    assert in_folder == [("uid", ("g3\u2028rest", "b3"), "argument_structure"), *in_b]


@pytest.mark.parametrize(
    "second",
    [
        '{"sentence_good": "g"}',
        "{",
        "",
        "3",
        '["sentence_good"]',
        pair(bad=""),
        {"sentence_good": 1, "sentence_bad": "b"},
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, second: Any) -> None:
    file = write(tmp_path / "p.jsonl", pair(), second, pair())
    with pytest.raises(UserError, match=r"p\.jsonl:2: expected sentence_good \(str\) and sentence_bad"):
        minimal_pairs("p", file)


def test_no_pairs_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for path in (tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"):
        with pytest.raises(UserError, match=path.name):
            minimal_pairs("p", path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: expected a file or folder of \*\.jsonl"):
        minimal_pairs("p", tmp_path / "folder")


def test_a_missing_set_and_a_missing_task_are_refused(tmp_path: Path) -> None:
    for number in range(66):
        write(tmp_path / "blimp_filtered" / f"{number}.jsonl", pair())
    with pytest.raises(UserError, match="blimp_filtered holds 66 sets, expected 67"):
        read_tasks(["blimp"], tmp_path)
    write(tmp_path / "blimp_filtered" / "66.jsonl", pair())
    assert len(read_tasks(["blimp"], tmp_path)[0].questions) == 67
    with pytest.raises(UserError, match="ewok: no ewok_filtered or ewok_fast or ewok in"):
        read_tasks(["ewok"], tmp_path)
    with pytest.raises(UserError, match="'blimps' is not known: expected some of blimp, "):
        read_tasks(["blimps"], tmp_path)


def test_ewok_and_entity_tracking(tmp_path: Path) -> None:
    texts = {"Context1": "It rains.", "Context2": "It is dry.", "Target1": "Wet.", "Target2": "Dusty."}
    for number in range(11):
        write(tmp_path / "ewok_filtered" / f"{number}.jsonl", {"Domain": "weather", **texts})
    item = {"numops": 2, "input_prefix": "Box 0 contains ", "options": ["a.", "b.", "c."]}
    for name in ("ambiref", "move_contents", "regular"):
        file = write(tmp_path / "entity_tracking" / f"{name}.jsonl", item)
    ewok, boxes = read_tasks(["ewok", "entity_tracking"], tmp_path)
    assert ewok.questions[0].answers == ("It rains. Wet.", "It rains. Dusty.")
    assert ewok.questions[0].subset == "weather"
    assert boxes.questions[0].answers == ("Box 0 contains a.", "Box 0 contains b.", "Box 0 contains c.")
    assert [question.subset for question in boxes.questions] == [
        f"{n}_2_ops" for n in ("ambiref", "move_contents", "regular")
    ]
    write(file, item, item | {"options": ["a."]})
    with pytest.raises(UserError, match=r"regular\.jsonl:2: expected at least two texts"):
        read_tasks(["entity_tracking"], tmp_path)
    file.write_text("")
    with pytest.raises(UserError, match=r"regular\.jsonl holds no items"):
        read_tasks(["entity_tracking"], tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="holds 2 sets, expected 3: fetch the missing ones"):
        read_tasks(["entity_tracking"], tmp_path)
    (tmp_path / "ewok_filtered" / "7.jsonl").unlink()
    with pytest.raises(UserError, match="holds 10 sets, expected 11"):
        read_tasks(["ewok"], tmp_path)


def test_wug_is_judged_by_the_ranks_of_what_people_chose(tmp_path: Path) -> None:
    name = "wug_adj_nominalization"
    ratios = [0.1, 0.4, 0.4, 0.9]
    items = [{"sentences": f"{i}ity\t{i}ness", "ratio": ratio} for i, ratio in enumerate(ratios)]
    file = write(tmp_path / name / "wug.jsonl", *items)
    [task] = read_tasks([name], tmp_path)
    scores = [[-5.0, -1.0], [-3.0, -2.0], [-3.0, -3.0], [-1.0, -7.0]]
    [one] = task.metric(task.questions, scores, [[2, 2]] * 4)
    assert one.score == pytest.approx(4.5 / math.sqrt(5 * 4.5)), "Spearman's, the two 0.4 sharing rank 2.5"
    write(file, *items, {"sentences": "no tab", "ratio": 0.5})
    with pytest.raises(UserError, match=r"wug\.jsonl:5: expected two sentences"):
        read_tasks([name], tmp_path)


def reading_rows(words: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows = []
    for i in range(words):
        texts = {"item": f"context {i}", "word": f"word{i}", "prev_item": f"context{i}", "prev_word": f"{i}"}
        numbers = {key: random.normal() for key in (*CONTROLS, "prev_length", *EYE_TRACKING, SELF_PACED)}
        rows.append(texts | numbers)
    rows[3] |= {"item": "", "prev_item": "", "prev_word": "", "prev_length": -1}
    rows[5]["Subtlex_log10"] = ""
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def test_reading_is_the_variance_that_surprisal_adds(tmp_path: Path) -> None:
    rows = reading_rows(60)
    surprisal = np.random.default_rng(1).normal(size=60)
    for i, row in enumerate(rows):  # one measure is surprisal itself but for a linear function of a control
        row["RTgopast"] = 3 * surprisal[i] + 2 * row["length"]
    write_csv(tmp_path / "reading" / "reading_data.csv", rows)
    [task] = read_tasks(["reading"], tmp_path)
    assert len(task.questions) == 60 + 59, "every word, and every word before it"
    assert task.questions[3].context == "None", "an empty context is a word that was read as a gap"
    scores = [[-s] for s in (*surprisal, *np.random.default_rng(2).normal(size=59))]
    eyes, paced = task.metric(task.questions, scores, [])
    assert (eyes.items, paced.items) == (59, 58), "rows with a gap are left out"
    assert 0.25 < eyes.score < 0.40, "one of four is explained wholly, the others by chance alone"
    assert paced.score < 0.2

    rows[7]["length"] = "long"
    write_csv(tmp_path / "reading" / "reading_data.csv", rows)
    with pytest.raises(UserError, match=r"reading_data\.csv:9: length='long': expected a number"):
        read_tasks(["reading"], tmp_path)


def test_the_published_data_is_read_whole(evaluation_data: Path) -> None:
    names = ("blimp", "blimp_supplement", "entity_tracking", "wug_adj_nominalization", "reading", "blimp_fast")
    tasks = read_tasks(names, evaluation_data)
    assert [len(task.questions) for task in tasks] == [59_875, 5_218, 9_483, 200, 1_726 + 1_521, 13_400]
    assert len({q.phenomenon for q in tasks[0].questions}) == 12
    assert len({q.subset for q in tasks[2].questions}) == 18
