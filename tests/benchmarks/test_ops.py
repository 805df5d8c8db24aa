"""The cases of the microbenchmarks, tiny: every peer computes what the definitions do, and what does not is refused."""

import csv
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Generator, Tensor

import kernels
from benchmarks import ops
from benchmarks.ops import Case, Way

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _backend_restored() -> Iterator[None]:
    with kernels.backend():
        yield


def tiny(dtype: torch.dtype) -> list[Case]:
    return [
        ops.ensemble_kl(CPU, dtype, 5, 40, 3, 3),
        ops.ensemble_kl(CPU, dtype, 5, 40, 1, 3),
        ops.linear_ensemble_kl(CPU, dtype, 6, 40, 8, 2, 3),
        ops.rms_norm(CPU, dtype, 6, 16),
        ops.rms_norm_residual(CPU, dtype, 6, 16),
        ops.rotary(CPU, dtype, 2, 3, 2, 8),
        ops.swiglu(CPU, dtype, 6, 16),
        ops.attention(CPU, dtype, 2, 3, 4, 2, 8),
    ]


def prepared(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    inputs = case.inputs(Generator().manual_seed(0))
    return inputs, [torch.ones_like(x) if x.ndim == 0 else torch.randn_like(x) for x in case.eager(*inputs)]


def reference_ways(case: Case) -> dict[str, Way]:
    named_ways = {"reference": Way(case.ours, backend="reference"), "eager": Way(case.eager)} | case.peers
    if case.single_pass is not None:
        named_ways["single pass"] = Way(single_pass=case.single_pass, backend="reference", overwrites=True)
    return named_ways


@pytest.mark.parametrize("dtype", ops.DTYPES.values(), ids=ops.DTYPES)
@pytest.mark.parametrize("number", range(len(tiny(torch.float32))))
def test_all_ways_agree(number: int, dtype: torch.dtype):
    case = tiny(dtype)[number]
    assert ops.refusals(case, reference_ways(case), *prepared(case)) == {}


def test_what_computes_something_else_is_refused():
    case = ops.ensemble_kl(CPU, torch.float32, 5, 40, 3, 3)

    def attached(*tensors: Tensor) -> list[Tensor]:
        """The same losses, but a loss's gradient reaches peers."""
        *logits, targets = tensors
        logs = [z.log_softmax(-1) for z in logits]
        return [
            torch.nn.functional.nll_loss(logs[i], targets)
            + sum((logs[j].exp() * (logs[j] - logs[i])).sum(-1).mean() / 2 for j in range(3) if j != i)
            for i in range(3)
        ]

    def fails(*tensors: Tensor) -> list[Tensor]:
        raise RuntimeError("no such\ninstruction")

    def in_eager_and_wrong(*tensors: Tensor) -> list[Tensor]:
        return [loss + 0.01 for loss in case.eager(*tensors)]

    named_ways = {
        "attached": Way(attached),
        "fails": Way(fails),
        "wrong": Way(in_eager_and_wrong),
        "right": Way(case.eager),
    }
    refused = ops.refusals(case, named_ways, *prepared(case))
    assert refused.keys() == {"attached", "fails", "wrong"}
    assert "differs from float64 by" in refused["attached"]
    assert refused["fails"] == "RuntimeError: no such instruction"


def test_a_way_that_overwrites_gets_copies():
    case = ops.swiglu(CPU, torch.float32, 6, 16)
    inputs, cotangents = prepared(case)
    before = [x.detach().clone() for x in inputs]

    def spoil(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        result = gate * up
        with torch.no_grad():
            gate.zero_()
        return (result,)

    made = ops.variant(Way(spoil, overwrites=True), "forward", [inputs], [cotangents])
    made.run(made.prepare(0))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_bytes_are_those_of_the_tensors():
    """What a case must move, from its inputs and results; it differs where the docstring says so."""
    for case in tiny(torch.float32):
        inputs, cotangents = prepared(case)
        outputs, gradients = ops.evaluate(Way(case.eager), inputs, cotangents)
        large = [x for x in inputs if x.ndim > 1 or case.op == "linear_ensemble_kl"]
        forward, grown = (sum(x.nbytes for x in t if x.ndim > 1) for t in (outputs, gradients))
        given = sum(x.nbytes for x in large if x.is_floating_point())
        if case.op in ("ensemble_kl", "linear_ensemble_kl"):
            assert case.phases["both"] == given + grown
        elif case.op == "rotary":
            q, k = inputs[:2]
            assert case.phases["forward"] == case.phases["backward"] == q.nbytes + k.nbytes + forward
        elif case.op in ("swiglu", "attention"):
            assert case.phases["forward"] == given + forward
            again = forward if case.op == "attention" else 0  # its backward reads the output, beside its gradient
            assert case.phases["backward"] == given + forward + again + grown
        else:
            assert case.phases["forward"] == given + forward


def test_memory_beyond_results():
    def run(state: Tensor) -> Tensor:
        scratch = torch.ones(24 * 2**20)  # 96 MiB
        return state + scratch.sum()

    beyond = ops.beyond_results(run, torch.ones(8 * 2**20), CPU) / 2**20
    assert beyond == pytest.approx(96, abs=8), "neither the state nor the result, 32 MiB each"


def test_budgets_set_the_chunk(monkeypatch: pytest.MonkeyPatch):
    case = ops.linear_ensemble_kl(CPU, torch.float32, 6, 40, 8, 2, 3)
    ways = ops.budgets(case, CPU)
    assert [name.split(" ", 1)[1] for name in ways] == [f"{size} MiB" for size in (16, 32, 64, 128, 256)]
    way = Way(case.ours, backend="reference", chunk_bytes=2**24)
    chunk_bytes = importlib.import_module("kernels.ops.linear_ensemble_kl.reference").CHUNK_BYTES
    monkeypatch.setitem(chunk_bytes, "cpu", chunk_bytes["cpu"])
    ops.choose(way, CPU)
    assert chunk_bytes["cpu"] == 2**24
    module = importlib.import_module("kernels.ops.linear_ensemble_kl.triton")
    monkeypatch.setattr(module, "CHUNK_BYTES", module.CHUNK_BYTES)
    ops.choose(Way(case.ours, backend="triton", chunk_bytes=2**25), CPU)
    assert module.CHUNK_BYTES == 2**25


def test_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "cases", lambda device, dtype: iter(tiny(dtype)))
    path = tmp_path / "ops.csv"
    command = ["swiglu", "--variants", "reference", "eager", "--rounds", "2", "--csv", str(path)]
    assert ops.main(command) == 0
    rows = list(csv.DictReader(path.open()))
    assert [(r["phase"], r["variant"]) for r in rows] == [
        (phase, variant) for phase in ("forward", "backward", "both") for variant in ("reference", "eager", "copy")
    ]
    assert all(float(r["milliseconds_low"]) <= float(r["milliseconds"]) <= float(r["milliseconds_high"]) for r in rows)
    assert "× copy" in capsys.readouterr().out
    assert ops.main(["no such op"]) == 2
    assert "none of" in capsys.readouterr().err
