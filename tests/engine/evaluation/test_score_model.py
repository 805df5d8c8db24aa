import csv
import json
from pathlib import Path
from xml.etree import ElementTree

from engine.evaluation.metrics import TaskScore, accuracy
from engine.evaluation.score_model import score_table, write_scores


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    set_score = accuracy("a & b", [[0.0, -1.0], [-1.0, 0.0]], [[1, 2], [2, 1]], "group")
    task = TaskScore("task", (set_score,))
    write_scores(tmp_path / "scores", "model <x>", [task], {"commit": "abc"})
    content = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert (content["model"], content["commit"]) == ("model <x>", "abc")
    assert content["tasks"][0]["mean"]["score"] == content["tasks"][0]["phenomena"][0]["score"] == 0.5
    with (tmp_path / "scores" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["name"], row["score"]) for row in rows] == [
        ("task", "a & b", "0.5"),
        ("task", "mean", "0.5"),
    ]
    assert ElementTree.parse(tmp_path / "scores" / "scores.svg").getroot().tag.endswith("svg")
    assert "50.00" in score_table({"model": [task]}, sets=True)
