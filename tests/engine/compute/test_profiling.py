import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from engine.compute.profiling import top_operations
from engine.config.loading import build
from engine.config.settings import Config
from engine.system.errors import UserError
from engine.train import train


def config(folder: Path, *overrides: str) -> Config:
    settings = {
        "students": [{"name": "one", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 32}],
        "run": {"name": "traced", "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400}},
        "optimizer": {"warmup": 1},
        "train": {"steps": 4, "batch": 2, "length": 32},
        "evaluation": {"every": 100, "tokens": 100, "samples": 0, "pairs": "none"},
    }
    return build(Config, settings, overrides)


def test_chosen_steps_are_traced_and_learn_the_same(tmp_path: Path) -> None:
    train(config(tmp_path, "run.profile=[2,3]"))
    folder = tmp_path / "runs" / "traced" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-0.txt"]
    trace = json.loads(gzip.decompress((folder / "rank-0.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert not {"step 1", "step 4"} & names
    assert "# of Calls" in (folder / "rank-0.txt").read_text()

    train(config(tmp_path, "run.name=plain"))
    losses = [
        [json.loads(line).get("students") for line in (tmp_path / "runs" / name / "metrics.jsonl").open()]
        for name in ("traced", "plain")
    ]
    assert [step["one"]["loss"] for step in losses[0][1:5]] == [step["one"]["loss"] for step in losses[1][1:5]]


DISK = """
import sys
from pathlib import Path
import pytest
from engine.system.distributed import exit_process, init_distributed
from engine.system.errors import UserError
from engine.data.batches import Step
from engine.compute.profiling import profiled
runtime, folder = init_distributed(), Path(sys.argv[1]) / "profile"
if runtime.rank == 1:
    folder.mkdir(parents=True)
    (folder / "rank-1.txt").symlink_to("/dev/full")
with pytest.raises(UserError, match="^rank 1: .*No space left on device"):
    list(profiled((Step(n, 0, 1, 1, 0, []) for n in (1, 2, 3)), (2, 2), folder, runtime))
exit_process()
"""


def test_a_trace_that_cannot_be_written_is_told_by_rank_0_too(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    script = tmp_path / "disk.py"
    script.write_text(DISK)
    spawn_ranks(script, 2, tmp_path)


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    for overrides, message in (
        (("run.profile=[3,9]",), r"run.profile=\[3, 9\]: expected the first and the last step to trace, of 4"),
        (("run.profile=[3,2]",), r"run.profile=\[3, 2\]"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(tmp_path, *overrides))
    assert not (tmp_path / "runs").exists()


def test_top_operations_know_calls_and_flops() -> None:
    left, right = torch.ones(8, 16), torch.ones(16, 4)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as finished:
        _ = left @ right
        (left @ right).bfloat16().sum()
    table = top_operations(finished).splitlines()
    columns = next(line for line in table if "# of Calls" in line).split("  ")
    assert {"Self CPU", "# of Calls", "Total KFLOPs"} <= {column.strip() for column in columns}
    rows = {line.split()[0]: line.split()[1:] for line in table if line.strip()}
    assert rows["aten::mm"][-2:] == ["2", "2.048"], "calls, and 2 · 2·8·16·4 FLOPs in thousands"
    assert rows["aten::sum"][-2:] == ["1", "--"]


def test_where_a_gpu_has_worked_its_time_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as finished:
        _ = torch.ones(300, 300) @ torch.ones(300, 300)
        torch.ones(2).neg()
    averages = finished.key_averages()
    for event in averages:  # as torch leaves them where a GPU was traced, on which aten::neg is a kernel
        event.use_device = "cuda"
        if event.key == "aten::neg":
            event.device_type, event.self_device_time_total = DeviceType.CUDA, 7.0
    monkeypatch.setattr(finished, "key_averages", lambda: averages)
    by_device, by_cpu = top_operations(finished).split("\n\n")[:2]
    first_rows = [next(line for line in table.splitlines() if "aten::" in line) for table in (by_device, by_cpu)]
    assert "aten::neg" in first_rows[0]
    assert "aten::neg" not in first_rows[1]
