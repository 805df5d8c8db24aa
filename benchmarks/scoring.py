"""Minimal pairs: the engine's scoring against lm-eval's, and against the matrix products that it makes.

    python benchmarks/scoring.py --data evaluation_data/blimp_filtered --tokenizer runs/mutual/students/deep \
        --lm-eval lm-eval-environment/bin/python --share 10 --rounds 3 --csv scoring.csv

    ours              `ZeroShot.answers`, with the texts' tokens at hand
    ours, from text   the same with tokenizing
    lm-eval, batch n  `HFLM.loglikelihood` on the same sentences and weights (benchmarks/peers/lm_eval_pairs.py), from
                      text, as it always does; its reading of data, its metrics and its start are not counted
    products          only the matrix products of `ours`, with their own shapes and in the same batches

The student has about 10M parameters and random weights, because the time does not depend on them. `--share n` takes
every n-th set, whole. Each variant runs once a round, in turn (benchmarks.timing); lm-eval has a process of its own,
which waits meanwhile.

B trees, L tokens, U hidden states, D hidden, V vocabulary.
"""

import argparse
import csv
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import timing
from engine.data import tokenizer as tokenization
from engine.evaluation.log_probabilities import MAX_LOGITS, collate, model_log_probabilities, plan_batches
from engine.evaluation.tasks import minimal_pairs
from engine.evaluation.zero_shot import ZeroShot
from engine.models.base import initial_weights
from engine.models.huggingface import export_model
from engine.models.llama import Llama, LlamaShape
from engine.system.distributed import Runtime, keep_freed_memory
from engine.system.errors import report_errors
from engine.system.formatting import align_columns
from engine.system.provenance import device_name, git_commit

RUNTIME = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SHAPE = LlamaShape(layers=7, hidden=256, heads=8, kv_heads=8, ffn=768, vocab_size=16000, max_length=256)
PEER = Path(__file__).parent / "peers" / "lm_eval_pairs.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or file of minimal pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--lm-eval", type=Path, help="Python interpreter that has lm-eval; without it, no peer is timed"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64, 256], help="of lm-eval")
    parser.add_argument("--share", type=int, default=1, help="take every n-th set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    tokenizer = tokenization.load(arguments.tokenizer)
    model = Llama(replace(SHAPE, vocab_size=tokenizer.vocab_size)).eval()
    initial_weights(model, SHAPE.layers, seed=0)
    task = minimal_pairs("pairs", arguments.data)
    sets = sorted({question.subset for question in task.questions})[:: arguments.share]
    task.questions[:] = [question for question in task.questions if question.subset in sets]

    def prepare() -> ZeroShot:
        return ZeroShot([task], tokenizer, RUNTIME, max_length=SHAPE.max_length, share=True)

    def score(zero_shot: ZeroShot) -> None:
        with torch.inference_mode():
            zero_shot.answers(model_log_probabilities([model]))

    prepared = prepare()
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: score(prepared),
        "ours, from text": lambda: score(prepare()),
        "products": products(model, prepared),
    }
    with tempfile.TemporaryDirectory() as folder:
        peer: subprocess.Popen[str] | None = None
        if arguments.lm_eval is not None:
            student, texts = Path(folder) / "student", Path(folder) / "texts.txt"
            export_model(student, model.shape, dict(model.named_parameters()), tokenizer)
            texts.write_text("\0".join(a for q in task.questions for a in q.answers), encoding="utf-8")
            command = [arguments.lm_eval, PEER, student, texts, arguments.threads]
            peer = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for size in arguments.batch_sizes:
                functions[f"lm-eval, batch {size}"] = lambda size=size, peer=peer: score_by_peer(peer, size)
        variants = {name: timing.Variant(lambda run: run(), lambda _, run=run: run) for name, run in functions.items()}
        try:
            comparison = timing.compare(variants, "ours", timing.clock_of(RUNTIME.device), rounds=arguments.rounds)
        finally:
            if peer is not None:
                peer.kill()
                peer.wait()
    report(comparison, list(functions), len(task.questions), arguments.csv)


def score_by_peer(peer: "subprocess.Popen[str]", batch_size: int) -> None:
    """Has the peer score all texts once, and waits for it."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    print(batch_size, file=peer.stdin, flush=True)
    answer = peer.stdout.readline()
    if answer.strip() != "done":
        raise RuntimeError(f"{PEER} ended without an answer: run it by itself to see why")


def products(model: Llama, zero_shot: ZeroShot) -> Callable[[], None]:
    """Returns a function that makes every matrix product of scoring: those with a weight and those in attention."""
    shape, trees = model.shape, zero_shot.trees
    weights = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    inputs = {width: torch.randn(2**14, width) for width in {w.shape[1] for w in weights}}
    sizes = []  # B, L and U of every batch
    for indices in plan_batches(trees, 1, padding=True):
        batch = collate([trees[i] for i in indices], RUNTIME.device)
        sizes.append((*batch.tokens_BL.shape, len(batch.rows_U)))

    @torch.inference_mode()
    def run() -> None:
        chunk = MAX_LOGITS // shape.vocab_size
        for sequences, length, rows in sizes:
            for weight in weights:
                torch.mm(inputs[weight.shape[1]][: sequences * length], weight.T)
            q = torch.randn(1, 1, length, shape.head_width).expand(sequences, shape.heads, -1, -1).flatten(0, 1)
            for _ in range(shape.layers):
                torch.bmm(torch.bmm(q, q.transpose(1, 2)), q)
            for start in range(0, rows, chunk):
                torch.mm(inputs[shape.hidden][start : min(start + chunk, rows)], model.head.T)

    return run


def report(comparison: timing.Comparison, names: list[str], pairs: int, path: Path | None) -> None:
    """Prints the times and writes them to a CSV file, where one is wanted."""
    print(f"{pairs:,} pairs, {device_name(RUNTIME.device)}, commit {git_commit()}; {comparison.verdict()}")
    lines: list[tuple[str, ...]] = [("", "seconds", "pairs/s", "× ours", "20%", "80%")]
    rows: list[dict[str, object]] = []
    for name in names:
        seconds, ratio = comparison.time(name).median, comparison.ratio(name, "ours")
        rows.append({"variant": name, "seconds": seconds, "of ours": ratio.median, "20%": ratio.low, "80%": ratio.high})
        ratios = (f"{value:.2f}" for value in (ratio.median, ratio.low, ratio.high))
        lines.append((name, f"{seconds:.2f}", f"{pairs / seconds:,.0f}", *ratios))
    print("\n".join(align_columns(lines)))
    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    with report_errors():
        main()
