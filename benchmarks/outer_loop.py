"""What an update of the outer loop costs, in training steps: the whole hypergradient, and its direct term alone.

    python benchmarks/outer_loop.py [--students 2 4 8] [--rounds 5] [--threads 2] [--csv FILE]

A training step here is the S forward passes, the joint loss, the S backward passes and AdamW, without DeepSpeed. An
update reads as many held-out tokens as a step reads training tokens. With terms `all` it takes one gradient and a
Jacobian-vector product per student; with `direct`, ∂L2/∂ω alone.

S students.
"""

import argparse
import csv
from pathlib import Path

import torch

from benchmarks import timing
from engine.config.settings import ObjectiveConfig
from engine.data.batches import Batch, Step
from engine.models.base import initial_weights
from engine.models.llama import Llama, LlamaShape
from engine.students.coefficients import LossWeighting
from engine.students.hypergradient import FunctionalStudent, hypergradient
from engine.system.distributed import keep_freed_memory
from engine.system.provenance import device_name, git_commit
from kernels import Projected, linear_ensemble_kl

SHAPE = LlamaShape(layers=4, hidden=128, heads=4, kv_heads=4, ffn=384, vocab_size=4096, max_length=128)
SEQUENCES = 8
TERMS = ("all", "direct")
EVERY = (5, 20)  # steps between updates
COLUMNS = ("students", "terms", "steps", "low", "high", *(f"share_every_{m}" for m in EVERY), "void")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = [row for students in arguments.students for row in measure(students, arguments.rounds)]
    print("| S | terms | an update, in steps (20%, 80%) | share of the time, M = 5 | M = 20 |")
    print("|---|---|---|---|---|")
    for students, terms, steps, low, high, *shares, _ in rows:
        print(f"| {students} | {terms} | {steps:.2f} ({low:.2f}, {high:.2f}) | {shares[0]:.0%} | {shares[1]:.0%} |")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# {device_name(CPU)}, {git_commit()}\n")
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def measure(students: int, rounds: int) -> list[tuple]:
    """Returns a row of COLUMNS for each choice of terms."""
    models = [Llama(SHAPE) for _ in range(students)]
    for seed, model in enumerate(models):
        initial_weights(model, SHAPE.layers, seed)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for model in models]
    generator = torch.Generator().manual_seed(0)
    train, held_out = random_step(generator), random_step(generator)
    omega_S = torch.full((students,), 1 / students, dtype=torch.float64)
    weighting = LossWeighting(ObjectiveConfig(ce_weight=0.5, peer_weight=0.5, weighted=True), students, CPU)

    def step(_: None) -> None:
        coefficients = weighting.coefficients(omega_S)
        for batch in train.micro_batches:
            result = linear_ensemble_kl(
                [Projected(model(batch.tokens_BL), model.head) for model in models],
                [],
                batch.targets_N,
                ce_weight=coefficients.ce_weight,
                kl_weight=coefficients.kl_weight,
                normalizer=train.valid_tokens,
            )
            for loss in result.losses:
                loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    functional = [FunctionalStudent(SHAPE) for _ in models]

    def update(terms: str) -> timing.Variant:
        parameters = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
        step_sizes = [1e-3] * students

        def run(_: None) -> None:
            hypergradient(
                functional, parameters, parameters, step_sizes, train, held_out, omega_S, weighting, terms=terms
            )

        return timing.Variant(run, lambda number: None)

    variants = {"step": timing.Variant(step, lambda number: None), **{terms: update(terms) for terms in TERMS}}
    compared = timing.compare(variants, "step", timing.clock_of(CPU), rounds=rounds)
    print(f"S = {students}: a step takes {compared.time('step').median:.3f} s; {compared.verdict()}", flush=True)
    rows = []
    for terms in TERMS:
        ratio = compared.ratio(terms, "step")
        shares = [ratio.median / (ratio.median + every) for every in EVERY]
        rows.append((students, terms, ratio.median, ratio.low, ratio.high, *shares, compared.void))
    return rows


def random_step(generator: torch.Generator) -> Step:
    tokens_BL = torch.randint(SHAPE.vocab_size, (SEQUENCES, SHAPE.max_length + 1), generator=generator)
    batch = Batch(tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].flatten())
    count = batch.targets_N.numel()
    return Step(1, 0.0, count, count, 0, [batch])


if __name__ == "__main__":
    main()
