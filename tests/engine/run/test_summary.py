from engine.reporting.records import Summary
from engine.run.summary import final_table


def test_final_table_keeps_paths_whole():
    folder = "/data/" + "deep/" * 60 + "students/"
    summary: Summary = {
        "run": "mutual",
        "finished": "2026-01-02T03:04:05+00:00",
        "git_commit": None,
        "steps": 8,
        "tokens": 4096,
        "seconds": 60.0,
        "world_size": 1,
        "zero_stage": 1,
        "device": "cpu",
        "data": {
            "name": "grammar",
            "train_tokens": 10_000,
            "train_words": 8_000,
            "tokens_per_word": 1.25,
            "entropy_per_word": 2.5,
        },
        "students": [
            {
                "name": name,
                "parameters": 58_340_000,
                "validation_loss": 2.5,
                "validation_loss_per_word": 3.125,
                "pairs_accuracy": pairs,
                "pairs_by_phenomenon": {},
                "tokens_per_second": 12_345.6,
                "folder": folder + name,
                "best_step": 8,
                "samples": [],
            }
            for name, pairs in (("small", None), ("large", 0.875))
        ],
        "report": "/data/report.html",
    }
    lines = final_table(summary).splitlines()
    assert lines[2].split() == ["small", "58.34M", "2.5000", "3.1250", "-", "12,346"]
    assert lines[3].split() == ["large", "58.34M", "2.5000", "3.1250", "87.5%", "12,346"]
    assert lines[4].split() == ["best", "possible", "2.0000", "2.5000"]
    assert [line.split()[1] for line in lines[-3:]] == [folder + "small", folder + "large", "/data/report.html"]
