"""Tests what only the native backend promises: its error, its threads, its repeatability."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import dispatch, native
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.native import loss_and_grad_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def native_backend(request):
    if problem := native.problem():
        pytest.skip(problem)
    with kernels.backend("native"):
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def outcome(op: Any, inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Returns the op's results and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    gradients = torch.autograd.grad(results, leaves, [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)])
    return [r.detach() for r in results] + list(gradients)


def assert_close_as(naive: Tensor, actual: Tensor, want: Tensor, floor: float) -> None:
    """Asserts that the error is at most three times the naive one's (which may be NaN in fp16), or a rounding of the
    largest term. `floor` is the size of the terms where they cancel or add up."""
    allowed = 3 * (naive - want).abs().nan_to_num(nan=torch.inf).max()
    assert (actual - want).abs().max() <= allowed + torch.finfo(actual.dtype).eps * max(floor, want.abs().max().item())


def assert_error_at_most_three_times_torchs(op: Any, inputs: list[Tensor], cotangents: list[Tensor], dtype) -> None:
    """The exact values are float64 on the same stored values. Plain torch computes in the storage dtype."""
    stored = [x.to(dtype) for x in inputs]
    given = [c.to(dtype) for c in cotangents]
    ours = outcome(op, stored, given)
    with kernels.backend("reference"):
        exact = outcome(op, [x.double() for x in stored], [c.double() for c in given])
        plain = outcome(op, stored, given)
    for actual, naive, want in zip(ours, plain, exact, strict=True):
        assert actual.dtype == naive.dtype
        assert_close_as(naive, actual, want, floor=4 * max(c.abs().max().item() for c in given))


@pytest.mark.parametrize("width", [1, 7, 64, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, width, threads):
    x, residual, weight = draw(130, width), draw(130, width, seed=1), draw(width, seed=2)

    def alone(x, weight):
        return kernels.rms_norm(x, weight, 1e-6)

    def added(x, weight, residual):
        return kernels.rms_norm(x, weight, 1e-6, residual)

    cotangents = [draw(130, width, seed=3), draw(130, width, seed=4)]
    assert_error_at_most_three_times_torchs(alone, [x, weight], cotangents[:1], dtype)
    assert_error_at_most_three_times_torchs(added, [x, weight, residual], cotangents, dtype)


def test_rms_norm_of_two_dtypes_and_of_unused_results():
    """Weights are fp32 and activations bf16, as in mixed precision. Nothing uses the sum, as after the last block."""
    x, residual, weight = draw(5, 12).bfloat16(), draw(5, 12, seed=1).bfloat16(), draw(12, seed=2).float()
    outcomes = []
    for name in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
        with kernels.backend(name):
            normed, total = kernels.rms_norm(leaves[0], leaves[1], 1e-6, leaves[2])
        assert normed.dtype == torch.float32
        outcomes += [
            torch.autograd.grad(result.sum(), leaves, retain_graph=True, allow_unused=True)
            for result in (normed, total)
        ]
    for actual, want in zip(outcomes[0] + outcomes[1], outcomes[2] + outcomes[3], strict=True):
        assert (actual is None) == (want is None)
        if actual is not None and want is not None:
            torch.testing.assert_close(actual, want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 6), (3, 3, 32), (8, 1, 66)])
def test_rotary(dtype, heads, kv_heads, width, threads):
    q, k = draw(2, 9, heads, width), draw(2, 9, kv_heads, width, seed=1)
    angle = draw(9, width // 2, seed=2)
    cos, sin = angle.cos().float(), angle.sin().float()

    def op(q, k):
        return kernels.rotary(q, k, cos, sin)

    assert_error_at_most_three_times_torchs(op, [q, k], [draw(*q.shape, seed=3), draw(*k.shape, seed=4)], dtype)


def test_rotary_of_views():
    """Queries and keys are transposed slices of one projection, and gradients are as attention returns them."""
    both = draw(2, 7, 5, 8).float()
    q, k = both.transpose(1, 2)[..., :4].contiguous()[:, :, :4], both.transpose(1, 2)[:, :, :2, ::2]
    cos, sin = draw(5, 2).float(), draw(5, 2, seed=1).float()
    cotangents = [torch.ones(1).expand(q.shape), draw(2, 2, 5, 4).float().transpose(1, 2)]
    ours = outcome(lambda q, k: kernels.rotary(q, k, cos, sin), [q, k], cotangents)
    with kernels.backend("reference"):
        want = outcome(lambda q, k: kernels.rotary(q, k, cos, sin), [q, k], cotangents)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width"),
    [(1, 1, 1, 1), (33, 4, 2, 6), (64, 3, 3, 32), (130, 8, 2, 40), (70, 2, 1, 66)],
)
def test_attention(length, heads, kv_heads, width, causal, dtype, threads):
    q, k, v, out = (draw(2, length, h, width, seed=seed) for seed, h in enumerate((heads, kv_heads, kv_heads, heads)))

    def op(q, k, v):
        return kernels.attention(q, k, v, causal=causal)

    assert_error_at_most_three_times_torchs(op, [q, k, v], [out], dtype)


def test_attention_of_views_and_of_scores_far_apart():
    """Heads are slices of one projection, and one score exceeds all others by more than 88."""
    heads = draw(2, 3, 9, 24, scale=60.0).transpose(1, 2)

    def op(heads):
        return kernels.attention(*heads.split(8, dim=-1))

    assert_error_at_most_three_times_torchs(op, [heads], [torch.ones(1).expand(2, 9, 3, 8)], torch.float32)


@pytest.mark.parametrize("place", range(3))
def test_attention_keeps_what_is_not_a_number(place):
    inputs = [draw(1, 5, 1, 4).float() for _ in range(3)]
    inputs[place][0, 2] = math.nan
    out = kernels.attention(*inputs)
    assert out[0, 2].isnan().all()
    assert place == 2 or out[0, :2].isfinite().all()  # A weight of 0 times NaN is NaN.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_swiglu(dtype, scale, threads):
    gate, up = draw(33, 77, scale=scale), draw(33, 77, seed=1)
    assert_error_at_most_three_times_torchs(kernels.swiglu, [gate, up], [draw(33, 77, seed=2)], dtype)


def test_swiglu_keeps_what_is_not_a_number():
    gate = torch.tensor([float("nan"), 200.0, -200.0, float("inf")])
    y = kernels.swiglu(gate, torch.ones(4))
    assert y[0].isnan()
    assert y[1:].tolist() == pytest.approx([200.0, 0.0, float("inf")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 1023, 1025])
def test_ensemble_kl(dtype, temperature, divergence, vocabulary, threads):
    logits = [draw(9, vocabulary, seed=r, scale=3.0) for r in range(3)]
    targets = torch.arange(9) % vocabulary
    targets[4] = -100

    def op(first, second):
        teacher = logits[2].to(first.dtype)
        return kernels.ensemble_kl(
            [first, second, teacher], targets, students=2, temperature=temperature, divergence=divergence
        )

    cotangents = [draw(2, 9, seed=5), draw(2, 3, 9, seed=6)]
    stored = [x.to(dtype) for x in logits[:2]]
    ours = outcome(op, stored, cotangents)
    with kernels.backend("reference"):
        exact = outcome(op, [x.double() for x in stored], cotangents)
    logits[2] = logits[2].to(dtype).double()
    plain = outcome(_eager(logits[2], targets, temperature, divergence, dtype), stored, cotangents)
    for actual, naive, want in zip(ours, plain, exact, strict=True):
        assert_close_as(naive, actual, want, floor=5.0)


def _eager(teacher: Tensor, targets: Tensor, temperature: float, divergence: str, dtype: torch.dtype) -> Any:
    """Returns the same losses as users write them, in the storage dtype."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    def op(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        streams = [first, second, teacher.to(dtype)]
        ce = torch.stack(
            [torch.nn.functional.cross_entropy(x, targets, reduction="none", ignore_index=-100) for x in streams[:2]]
        )
        rows = []
        for i in range(2):
            for j in range(3):
                learner = (streams[i] / temperature).log_softmax(-1)
                peer = (streams[j].detach() / temperature).log_softmax(-1)
                mean = ((learner.exp() + peer.exp()) / 2).log()
                loss = {
                    "forward": lambda learner=learner, peer=peer: kl(peer, learner),
                    "reverse": lambda learner=learner, peer=peer: kl(learner, peer),
                    "jsd": lambda learner=learner, peer=peer, mean=mean: (kl(peer, mean) + kl(learner, mean)) / 2,
                }[divergence]()
                rows.append(loss * (targets != -100) * (i != j))
        return ce, torch.stack(rows).view(2, 3, -1)

    return op


def test_streams_of_different_dtypes_and_strides():
    wide = torch.full((6, 2 * 40), float("nan"))
    wide[:, ::2] = draw(6, 40).float()
    streams = [
        wide[:, ::2],
        draw(40, 6, seed=1).bfloat16().T,
        draw(6, 40, seed=2).half(),
        draw(1, 40).float().expand(6, 40),
    ]
    targets = torch.arange(6)

    def op(*streams):
        return kernels.ensemble_kl(streams, targets, students=3)

    cotangents = [torch.ones(1).expand(3, 6), draw(4, 3, 6, seed=3).transpose(0, 1)]
    leaves = [x.detach().requires_grad_() for x in streams[:3]]
    ours = op(*leaves, streams[3])
    gradients = torch.autograd.grad(list(ours), leaves, cotangents)
    with kernels.backend("reference"):
        exact = [x.detach().double().requires_grad_() for x in streams[:3]]
        want = op(*exact, streams[3].double())
        exact_gradients = torch.autograd.grad(list(want), exact, [c.double() for c in cotangents])
    torch.testing.assert_close([x.double() for x in ours], list(want), rtol=1e-5, atol=1e-6)
    for actual, expected, leaf in zip(gradients, exact_gradients, leaves, strict=True):
        assert actual.dtype == leaf.dtype
        torch.testing.assert_close(actual.double(), expected, rtol=2 * torch.finfo(actual.dtype).eps, atol=1e-6)


def everything() -> list[Tensor]:
    """Returns results and gradients of every op, from the same inputs each time."""
    rows, weight = [draw(300, 70, seed=k).float() for k in range(4)], draw(70).float()
    results = outcome(lambda x, r: kernels.rms_norm(x, weight, 1e-6, r), rows[:2], rows[2:])
    q, k, cos, sin = (draw(*shape).float() for shape in ((4, 64, 6, 16), (4, 64, 2, 16), (64, 8), (64, 8)))
    results += outcome(lambda q, k: kernels.rotary(q, k, cos, sin), [q, k], [q, k])
    results += outcome(kernels.attention, [q, k, k], [q])
    results += outcome(kernels.swiglu, rows[:2], rows[2:3])
    targets, all_rows, ones = torch.arange(40), torch.ones(40, dtype=torch.bool), torch.ones(3)
    for divergence in DIVERGENCES:
        logits = [draw(40, 3000, seed=r).float() for r in range(3)]
        spec = LossSpec(targets, ones, torch.ones(3, 3), all_rows, all_rows, 1.0, divergence)
        ce, kl = loss_and_grad_(logits, logits, spec)
        assert kl is not None
        results += [ce, kl, *logits]
    return results


def test_bitwise_the_same_again_and_with_any_number_of_threads(threads):
    first = everything()
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    torch.set_num_threads(3 - threads)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "attention", "swiglu", "ensemble_kl"])
def test_a_second_derivative_is_refused(op):
    x = torch.ones(2, 3, 2, 4, requires_grad=True)
    table = torch.ones(3, 2)
    loss = {
        "rms_norm": lambda: kernels.rms_norm(x, torch.ones(4)),
        "rotary": lambda: kernels.rotary(x, x, table, table)[0],
        "attention": lambda: kernels.attention(x, x, x),
        "swiglu": lambda: kernels.swiglu(x, x),
        "ensemble_kl": lambda: kernels.ensemble_kl([x.view(12, 4)], torch.zeros(12, dtype=torch.int64), students=1).ce,
    }[op]()
    with pytest.raises(RuntimeError, match=rf"native {op} is differentiable once: .*reference"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)


def test_loops_run_in_parallel_on_torchs_own_pool():
    """A loop compiled without OpenMP runs serially and silently. A second runtime's threads fight the first's."""
    script = """
import os, torch, kernels
kernels.backend("native")
torch.set_num_threads(2)
x = torch.randn(64, 20000)
for _ in range(200):
    kernels.ensemble_kl([x, x], torch.zeros(64, dtype=torch.int64), students=1)
stats = [open(f"/proc/self/task/{task}/stat").read() for task in os.listdir("/proc/self/task")]
busy = [stat for stat in stats if int(stat.rsplit(")", 1)[1].split()[11]) > 0]  # It spent time in user mode.
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "/lib" in line}
print(len(busy), sum("omp" in library.rsplit("/", 1)[-1] for library in libraries))
"""
    finished = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    threads, runtimes = map(int, finished.stdout.split())
    assert threads >= 2
    assert runtimes == 1


def other_instruction_sets() -> list[str]:
    """Returns the other instruction sets that are built and that this processor has, as torch's setting names them."""
    built = [path.stem.rsplit("-", 1)[-1] for path in native._folder().glob("creche-*.so")]
    here = torch.backends.cpu.get_cpu_capability().lower()
    others = [name for name in built if name not in (here, "avx512")]  # This processor lacks avx512 if it is not here.
    return others or pytest.skip("built for one instruction set")


@pytest.mark.slow
def test_every_instruction_set_is_as_exact():
    """Runs this file again with the libraries for older processors. torch's own attention in bf16 fails under them."""
    for capability in other_instruction_sets():
        chosen = ["-m", "not slow", "-k", "not (attention and dtype1)", "-p", "no:cacheprovider"]
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *chosen, __file__],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, f"{capability}: {finished.stdout[-3000:]}"


@pytest.mark.slow
def test_every_instruction_set_gives_the_same(tmp_path):
    """Compares the libraries for older processors, which torch's own setting selects, with the one for this."""
    torch.save(everything(), tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import kernels, test_native
kernels.backend("native")
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(test_native.everything(), expected, rtol=1e-5, atol=1e-5)
print(torch.backends.cpu.get_cpu_capability())
"""
    for capability in other_instruction_sets():
        finished = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.split()[-1].lower() == capability


def test_a_library_that_is_missing_is_said_once(monkeypatch, tmp_path, caplog):
    for cached in (native.problem, dispatch._check_name, dispatch._is_available, dispatch._warn_without_native):
        cached.cache_clear()
    monkeypatch.setenv(native.ENVIRONMENT, str(tmp_path))
    try:
        with caplog.at_level(logging.WARNING), kernels.backend("auto"):
            kernels.swiglu(torch.ones(2), torch.ones(2))
            kernels.rms_norm(torch.ones(2), torch.ones(2))
        (record,) = caplog.records
        assert "were not built, so the slow reference runs on the CPU: install a C++ compiler" in record.message
        assert "\n" not in record.message
        with pytest.raises(ValueError, match="backend is 'native', which is not available: install a C"):
            kernels.backend("native")
        (tmp_path / "creche-1.0.0-default.so").touch()
        native.problem.cache_clear()
        assert "built for other than torch" in (native.problem() or "")
    finally:
        monkeypatch.undo()
        for cached in (native.problem, dispatch._check_name, dispatch._is_available, dispatch._warn_without_native):
            cached.cache_clear()
