"""What a run does beside training: milestones by words, and evaluation while it trains."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data import tokenizer as tokenization
from engine.data.batches import TokenFile
from engine.data.grammar.generator import minimal_pairs
from engine.run import run as run_module
from engine.run.checkpoint import at_step, read_state
from engine.students import outer_loop
from engine.students.hypergradient import Hypergradient
from engine.system.errors import UserError
from engine.train import train
from tests.tiny_run import tiny


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_milestones_are_exported_when_their_words_have_been_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "MILESTONES", [100 * 10**6, 200 * 10**6, 10**9])
    million = 10**6  # a word of the text counts as so many
    monkeypatch.setattr(
        run_module.TrainingData,
        "_words",
        lambda self, start: (
            million * self.word_starts.count(self.file.tokens[start : start + self.file.token_count(start) + 1])
        ),
    )
    train(
        tiny(tmp_path, "evaluation.every=100", "checkpoint.milestones=true", "checkpoint.every=1", "checkpoint.keep=6")
    )
    steps, events = records(tmp_path, "step"), records(tmp_path, "event")
    reached = [next(s["step"] for s in steps if s["words"] >= n) for n in (100 * million, 200 * million)]
    assert [event["step"] for event in events] == reached
    first = steps[reached[0] - 1]
    assert events[0]["text"] == (
        f"chck_100M: every student exported after {first['words']:,} words, {first['tokens']:,} tokens"
    )
    run = tmp_path / "runs" / "tiny"
    for event in events:  # a run that goes on from a milestone's checkpoint keeps its record
        position = read_state(at_step(run / "checkpoints", event["step"])).metrics_position
        assert json.loads((run / "metrics.jsonl").read_bytes()[:position].splitlines()[-1]) == event
    milestones = run / "milestones"
    assert sorted(path.relative_to(milestones).as_posix() for path in milestones.glob("*/*")) == [
        "one/chck_100M",
        "one/chck_200M",
        "two/chck_100M",
        "two/chck_200M",
    ]
    for name in ("chck_100M", "chck_200M"):
        AutoTokenizer.from_pretrained(milestones / "one" / name)
        AutoModelForCausalLM.from_pretrained(milestones / "one" / name)
    early, late = (load_file(milestones / "one" / name / "model.safetensors") for name in ("chck_100M", "chck_200M"))
    assert not torch.equal(early["model.norm.weight"], late["model.norm.weight"])

    train(tiny(tmp_path, "run.name=rare", "checkpoint.milestones=true", "run.log_every=100", "evaluation.every=6"))
    lines = (tmp_path / "runs" / "rare" / "metrics.jsonl").read_text().splitlines()
    logged = {record["step"] for record in map(json.loads, lines) if record["kind"] == "step"}
    assert logged == {*reached, 2, 4, 6}, "before a milestone the clock and the meter are read"

    prepared = next((tmp_path / "prepared").iterdir())
    file = TokenFile(prepared / "train.bin", "<u2", 32)
    tokenizer = tokenization.load(prepared / "tokenizer")
    assert file.chunks > 24, "one epoch at most, so that no token is read twice"
    assert steps[-1]["words"] <= million * len(tokenizer.decode(np.asarray(file.tokens).tolist()).split())


def test_a_hypergradient_that_is_not_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.tensor([math.nan, 0.0], dtype=torch.float64)
    none = torch.zeros(2, dtype=torch.float64)
    found = Hypergradient(2.0, broken, none, none)
    monkeypatch.setattr(outer_loop, "hypergradient", lambda *_, **__: found)
    train(tiny(tmp_path, "evaluation.every=100", "objective.weighted=true", "outer.every=3", "outer.sequences=2"))
    assert [event["step"] for event in records(tmp_path, "event")] == [3, 6]
    assert "stay as they are" in records(tmp_path, "event")[0]["text"]
    assert [record["omega"] for record in records(tmp_path, "outer")] == [{"one": 0.5, "two": 0.5}] * 2


def test_students_and_ensemble_are_evaluated_every_so_many_words(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "supplement_filtered"
    folder.mkdir(parents=True)
    for number in range(5):
        lines = [{"sentence_good": p.good, "sentence_bad": p.bad} for p in minimal_pairs(number, 1)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = ("evaluation.tasks=[blimp_supplement]", f"evaluation.data={tmp_path / 'data'}")
    train(tiny(tmp_path, "evaluation.every=100", "evaluation.every_words=130", *chosen))
    words = [0, *(step["words"] for step in records(tmp_path, "step"))]
    expected = [step for step in range(1, 7) if words[step - 1] // 130 < words[step] // 130 or step == 6]
    found = records(tmp_path, "evaluation")
    assert [record["step"] for record in found] == expected
    assert 1 < len(found) < 6
    for record in found:
        for one in (*record["students"].values(), record["ensemble"]):
            assert one["scores"].keys() == {"blimp_supplement"}
            assert 0 <= one["scores"]["blimp_supplement"] <= 1
            assert 0 <= one["pairs_accuracy"] <= 1
        losses = [one["validation_loss"] for one in record["students"].values()]
        assert record["ensemble"]["validation_loss"] < max(losses), "no worse than the worse of two"
    with pytest.raises(UserError, match=r"evaluation\.tasks needs evaluation\.data"):
        train(tiny(tmp_path, "evaluation.every=100", "run.name=other", chosen[0]))
