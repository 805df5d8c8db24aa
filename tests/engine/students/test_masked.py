"""Runs of students that predict masked tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.loading import build
from engine.config.settings import Config, FinetuneConfig, ScoreConfig
from engine.data.grammar.generator import minimal_pairs
from engine.evaluation.score_model import score_model
from engine.run import checkpoint
from engine.run.run import Run
from engine.system.errors import UserError
from engine.train import train

TINY = {"family": "roberta", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 64, "learning_rate": 1e-2}


def settings(folder: Path, name: str, *overrides: str) -> Config:
    config = {
        "students": [
            {"name": "one", **TINY, "dropout": 0.1},
            {"name": "two", **TINY, "hidden": 24, "seed": 1},
            {"name": "three", **TINY, "layers": 2, "seed": 2},
        ],
        "run": {"name": name, "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400, "mask": True}},
        "objective": {"ce_weight": 0.5, "peer_weight": 0.5, "weighted": True},
        "outer": {"every": 2, "sequences": 4, "step_size": 10.0},
        "optimizer": {"warmup": 1},
        "train": {"steps": 8, "batch": 4, "micro_batch": 2, "length": 32},
        "evaluation": {"every": 4, "tokens": 200, "pairs": "none"},
        "checkpoint": {"every": 2},
    }
    return build(Config, config, overrides)


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the records without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for record in (line, *line["students"].values()) if isinstance(line.get("students"), dict) else (line,):
            for key in ("time", "seconds", "tokens_per_second", "model_flops_per_second", "mfu", "hfu"):
                record.pop(key, None)
    return lines


def final(folder: Path, name: str) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(folder / "runs" / name / "checkpoints")
    assert last is not None
    return {f"{s}/{k}": v for s in ("one", "two", "three") for k, v in checkpoint.read_student(last, s).items()}


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.run.folder) / config.run.name).exists(), "before anything is written"
    return str(caught.value)


def test_weighted_mutual_learning_learns_and_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(tmp_path, "whole"))
    record = Run.after_step

    def die(self: Run, step: Any, *rest: Any) -> None:
        if step.number == 6:
            raise KeyboardInterrupt
        record(self, step, *rest)

    monkeypatch.setattr(Run, "after_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "broken"))
    monkeypatch.undo()
    train(settings(tmp_path, "broken"))
    whole, broken = final(tmp_path, "whole"), final(tmp_path, "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    lines = records(tmp_path, "whole")
    assert lines == records(tmp_path, "broken")

    steps = [r for r in lines if r["kind"] == "step"]
    assert [s["tokens"] for s in steps] == [4 * 32 * n for n in range(1, 9)], "of the text, not of the masks"
    assert steps[0]["students"]["one"]["ce"] == pytest.approx(math.log(400), abs=0.2), "a mean over masks"
    evaluations = [r for r in lines if r["kind"] == "evaluation"]
    assert evaluations[1]["ensemble"]["validation_loss"] < evaluations[0]["ensemble"]["validation_loss"]
    updates = [r for r in lines if r["kind"] == "outer"]
    assert len(updates) == 4
    assert all(0 < w < 1 and w != 1 / 3 for w in updates[-1]["omega"].values())
    assert set(updates[0]["shares"]) == {"direct", "own", "peers"}
    assert min(updates[0]["shares"].values()) > 0


def test_ranks_stages_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    overrides = ("train.steps=3", "outer={}", "students.0.dropout=0")
    train(settings(tmp_path, "plain", *overrides))
    train(settings(tmp_path, "sharded", *overrides, "train.zero_stage=3", "train.micro_batch=1"))
    plain, sharded = final(tmp_path, "plain"), final(tmp_path, "sharded")
    for key, value in plain.items():
        if "/weight/" in key and not key.endswith("key.bias"):  # whose gradient is rounding
            assert (sharded[key] - value).norm() <= 1e-5 * value.norm() + 1e-7, key


def test_a_micro_batch_without_a_mask_counts_for_nothing(tmp_path: Path) -> None:
    overrides = ("train.steps=3", "outer={}", "train.length=4")
    train(settings(tmp_path, "empty", *overrides, "train.micro_batch=1"))
    train(settings(tmp_path, "together", *overrides, "train.micro_batch=4"))
    ce = [
        [s["students"]["two"]["ce"] for s in records(tmp_path, n) if s["kind"] == "step"] for n in ("empty", "together")
    ]
    assert ce[0] == pytest.approx(ce[1], rel=1e-4)


def test_a_run_is_scored_by_pseudo_log_likelihood_and_teaches_its_own_kind(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"sentence_good": p.good, "sentence_bad": p.bad, "phenomenon": "all"} for p in minimal_pairs(5, 1)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(settings(tmp_path, "taught", "train.steps=2", f"evaluation.pairs={pairs}", "outer={}"))
    evaluation = next(r for r in records(tmp_path, "taught") if r["kind"] == "evaluation")
    assert 0 < evaluation["ensemble"]["pairs_accuracy"] < 1
    teacher = tmp_path / "runs" / "taught" / "students" / "two"
    plain = ("objective={ce_weight: 0.5, teacher_weight: 0.5, peer_weight: 0}", "outer={}", "train.steps=2")
    train(settings(tmp_path, "pupil", f"teachers=[{{path: {teacher}}}, {{path: {teacher}}}]", *plain))
    assert records(tmp_path, "pupil")[-1]["kind"] == "evaluation"
    causal = "students=[{name: a, layers: 1, hidden: 16, heads: 2, ffn: 32}]"
    message = refusal(settings(tmp_path, "other", f"teachers=[{{path: {teacher}}}]", causal, *plain))
    assert "two predicts masked tokens, and the students the next token" in message
    glue = tmp_path / "data" / "glue_filtered"
    glue.mkdir(parents=True)
    for part in ("train", "valid"):
        lines = [
            json.dumps({"premise": p.good, "hypothesis": p.bad, "label": i % 2})
            for i, p in enumerate(list(minimal_pairs(5, 1))[:4])
        ]
        (glue / f"mnli.{part}.jsonl").write_text("\n".join(lines) + "\n")
    score_config = ScoreConfig(
        model=str(teacher),
        data=str(tmp_path / "data"),
        tasks=("mnli",),
        folder=str(tmp_path / "scores"),
        finetune=FinetuneConfig(epochs=1),
    )
    [[score]] = score_model(score_config).values()
    assert (score.task, score.sets[0].items) == ("mnli", 4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("students.1.family=gpt2", "students.two.family=gpt2 predicts the next token"),
        ("data.tokenizer.mask=false", "data.tokenizer.mask=true"),
        ("objective.reduction=sequence", "predict only what is masked"),
        ("students.0.tied=false", "students.one: tied=false"),
        ("students.0.kv_heads=1", "students.one: kv_heads=1"),
    ],
)
def test_settings_that_do_not_go_with_masks(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refusal(settings(tmp_path, "refused", override))
    assert not (tmp_path / "prepared").exists()
