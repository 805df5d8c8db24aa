"""Minimal pairs: the engine's scoring beside lm-eval's, and beside its own matrix products.

    python benchmarks/scoring.py --data evaluation_data/blimp_filtered --tokenizer runs/mutual/students/deep \
        --lm-eval lm-eval-environment/bin/python --share 10 --rounds 3 --csv scoring.csv

    ours              `ZeroShot.answers`, the texts' tokens at hand
    ours, from text   the same, with tokenizing
    lm-eval, batch n  `HFLM.loglikelihood` on the same sentences and weights (benchmarks/peers/lm_eval_pairs.py), from
                      text, as it always does; its reading of data, its metrics and its start are not counted
    products          the matrix products of `ours` alone, at their own shapes and in the same batches

A student of about 10M parameters with random weights: the time does not depend on them. `--share n` takes every n-th
set, whole. Each variant runs once a round, in turn (benchmarks.timing), lm-eval in a process of its own that waits
meanwhile.

N tokens, U hidden states, D hidden, V vocabulary.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from engine.data import tokenizer as tokenization
from engine.evaluation.scoring import MAX_LOGITS, collate, model_log_probabilities, plan
from engine.evaluation.tasks import minimal_pairs
from engine.evaluation.zero_shot import ZeroShot
from engine.models.huggingface import export_model
from engine.models.llama import Llama, LlamaShape, initialise
from engine.system.distributed import Runtime, keep_freed_memory
from engine.system.provenance import device_name, git_commit

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SHAPE = LlamaShape(layers=7, hidden=256, heads=8, kv_heads=8, ffn=768, vocab_size=16000, max_length=256, tied=True)
PEER = Path(__file__).parent / "peers" / "lm_eval_pairs.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder or file of minimal pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json")
    parser.add_argument("--lm-eval", type=Path, help="an interpreter that has lm-eval; without it, ours and products")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--share", type=int, default=1, help="every n-th set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    tokenizer = tokenization.load(arguments.tokenizer)
    model = Llama(replace(SHAPE, vocab_size=tokenizer.vocab_size)).eval()
    initialise(model, 0)
    task = minimal_pairs("pairs", arguments.data)
    sets = sorted({question.subset for question in task.questions})[:: arguments.share]
    task.questions[:] = [question for question in task.questions if question.subset in sets]

    def prepare() -> ZeroShot:
        return ZeroShot([task], tokenizer, ALONE, max_length=SHAPE.max_length, share=True)

    def score(zero_shot: ZeroShot) -> None:
        with torch.inference_mode():
            zero_shot.answers(model_log_probabilities([model]))

    prepared = prepare()
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: score(prepared),
        "ours, from text": lambda: score(prepare()),
        "products": products(model, prepared),
    }
    with tempfile.TemporaryDirectory() as folder:
        peer: subprocess.Popen[str] | None = None
        if arguments.lm_eval is not None:
            export_model(Path(folder) / "student", model.shape, dict(model.named_parameters()), tokenizer)
            texts = Path(folder) / "texts.txt"
            texts.write_text("\0".join(a for q in task.questions for a in q.answers), encoding="utf-8")
            command = [arguments.lm_eval, PEER, Path(folder) / "student", texts, arguments.threads]
            peer = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for size in arguments.batch_sizes:
                ways[f"lm-eval, batch {size}"] = lambda size=size, peer=peer: ask(peer, size)
        variants = {name: timing.Variant(lambda way: way(), lambda _, way=way: way) for name, way in ways.items()}
        try:
            found = timing.compare(variants, "ours", timing.clock_of(ALONE.device), rounds=arguments.rounds)
        finally:
            if peer is not None:
                peer.kill()
                peer.wait()
    report(found, list(ways), len(task.questions), arguments.csv)


def ask(peer: "subprocess.Popen[str]", batch_size: int) -> None:
    """Have the peer score everything once; it answers when it has."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    print(batch_size, file=peer.stdin, flush=True)
    answer = peer.stdout.readline()
    if answer.strip() != "done":
        raise RuntimeError(f"{PEER} ended without an answer: run it by itself to see why")


def products(model: Llama, zero_shot: ZeroShot) -> Callable[[], None]:
    """Every matrix product that scoring makes with a weight, and those inside attention."""
    shape, trees = model.shape, zero_shot.trees
    weights = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    inputs = {width: torch.randn(2**14, width) for width in {w.shape[1] for w in weights}}
    rounds = []
    for indices in plan(trees, 1, padding=True):
        batch = collate([trees[i] for i in indices], ALONE.device)
        rounds.append((*batch.tokens_BL.shape, len(batch.rows_U)))

    @torch.inference_mode()
    def run() -> None:
        chunk = MAX_LOGITS // shape.vocab_size
        for sequences, length, rows in rounds:
            for weight in weights:
                torch.mm(inputs[weight.shape[1]][: sequences * length], weight.T)
            q = torch.randn(1, 1, length, shape.head_width).expand(sequences, shape.heads, -1, -1).flatten(0, 1)
            for _ in range(shape.layers):
                torch.bmm(torch.bmm(q, q.transpose(1, 2)), q)
            for start in range(0, rows, chunk):
                torch.mm(inputs[shape.hidden][start : min(start + chunk, rows)], model.head.T)

    return run


def report(found: timing.Comparison, names: list[str], pairs: int, path: Path | None) -> None:
    print(f"{pairs:,} pairs, {device_name(ALONE.device)}, commit {git_commit()}; {found.verdict()}")
    rows: list[dict[str, Any]] = []
    for name in names:
        seconds, ratio = found.time(name), found.ratio(name, "ours")
        rows.append(
            {"variant": name, "seconds": seconds.median, "of ours": ratio.median, "20%": ratio.low, "80%": ratio.high}
        )
        print(
            f"{name:20}  {seconds.median:8.2f} s  {pairs / seconds.median:8,.0f} pairs/s  "
            f"{ratio.median:6.2f} × ours ({ratio.low:.2f} to {ratio.high:.2f})"
        )
    if path is not None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
