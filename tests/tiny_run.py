"""The settings of a run that takes a second: two students of one block, six steps of generated text."""

from pathlib import Path

from engine.config.loading import build
from engine.config.settings import Config

SHAPE = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 64}


def tiny(folder: Path, *overrides: str) -> Config:
    """Returns the settings of a run called `tiny` in `folder`/runs."""
    settings = {
        "students": [{"name": "one", **SHAPE}, {"name": "two", **SHAPE, "hidden": 24, "seed": 1}],
        "run": {"name": "tiny", "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400}},
        "optimizer": {"warmup": 1},
        "train": {"steps": 6, "batch": 4, "length": 32},
        "evaluation": {"every": 3, "tokens": 100, "samples": 1, "sample_tokens": 4},
        "checkpoint": {"every": 2, "keep": 3},
    }
    return build(Config, settings, overrides)
