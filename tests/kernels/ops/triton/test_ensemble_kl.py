"""Compares `ensemble_kl` in Triton with the reference in float64. For bf16 see agreement.py."""

import math

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import jit as triton_jit

import kernels
from kernels import launch
from kernels.launch import Launch
from kernels.ops.ensemble_kl import reference, triton, triton_kernel
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from tests.kernels.ops.random_losses import DIVERGENCES, RANDOM_LOSSES
from tests.kernels.ops.triton.agreement import (
    DEVICE,
    assert_agrees,
    expanded,
    honest_memory_and_casts,
    packed,
    rows,
    scattered,
)
from tests.kernels.yardstick import assert_near

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns where NaN and infinity are intended.


def make(streams: int, tokens: int, vocabulary: int, dtype=torch.float32, *, scale=3.0, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(tokens, vocabulary, generator=generator) * scale).to(DEVICE, dtype) for _ in range(streams)]


def make_targets(tokens: int, vocabulary: int) -> Tensor:
    """Makes targets with the first and the last token of the vocabulary, and ignored rows."""
    targets = torch.arange(tokens) * 7 % vocabulary
    targets[-1] = vocabulary - 1
    targets[1:-1:5] = -100
    return targets.to(DEVICE)


def of_students(backend, teachers, targets, *, temperature=1.0, divergence="forward"):
    """Returns `backend.ensemble_kl` as a function of the students. Teachers are float64 if the students are."""

    def run(*students: Tensor) -> tuple[Tensor, Tensor]:
        peers = [t.double() if students[0].dtype == torch.float64 else t for t in teachers]
        ce, kl = backend.ensemble_kl((*students, *peers), targets, len(students), temperature, divergence, -100)
        zeros = sum(0 * x.sum(-1) for x in students)  # Both depend on the students, even where a loss is constant.
        return ce + zeros, kl + zeros

    return run


def check(students: int, streams: list[Tensor], targets: Tensor | None, *views, **options) -> None:
    teachers = streams[students:]
    assert_agrees(
        of_students(triton, [views[0](t) for t in teachers] if views else teachers, targets, **options),
        of_students(reference, teachers, targets, **options),
        streams[:students],
        *views,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("students", "streams"), [(1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (2, 4), (1, 5), (5, 5), (1, 8), (5, 8)]
)
def test_students_and_teachers(students, streams, temperature, divergence):
    if DEVICE == "cpu" and streams > 4 and temperature != 1:
        pytest.skip("slow in the interpreter, and other cases cover it")
    logits = make(streams, rows(3), 600)
    check(students, logits, make_targets(rows(3), 600), temperature=temperature, divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "tokens"), [(7, 7), (1000, 7), (2047, 1), (2048, 1), (2049, 2)])
def test_shapes(vocabulary, tokens, dtype):
    """4 warps keep 2048 fp32 logits, or 4096 of 16 bits, in registers."""
    check(2, make(3, tokens, vocabulary, dtype), make_targets(tokens, vocabulary))


def test_64_tokens():
    check(1, make(2, 64, 7), make_targets(64, 7))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one(divergence):
    """Because p = q = 1, every loss is 0, up to the square of the rounding of log p − log q."""
    logits = [x.requires_grad_() for x in make(3, 2, 1)]
    ce, kl = triton.ensemble_kl(logits, make_targets(2, 1), 2, 1.0, divergence, -100)
    assert not ce.any()
    assert (kl.abs() < 1e-12).all()
    for gradient in torch.autograd.grad(ce.sum() + kl.sum(), logits[:2]):
        assert (gradient.abs() < 1e-6).all()


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
@pytest.mark.parametrize("vocabulary", [511, 512, 513, 1025])
def test_shapes_read_in_blocks_of_512(vocabulary, divergence):
    check(2, make(2, 2, vocabulary), make_targets(2, vocabulary), divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [16000, 32000, 50257])
def test_whole_vocabularies(vocabulary, dtype):
    check(1, make(2, 1, vocabulary, dtype), make_targets(1, vocabulary))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("view", [packed, scattered])
@pytest.mark.parametrize("cotangent", [torch.randn_like, expanded])
def test_strides(view, cotangent, divergence):
    check(2, make(3, rows(4), 90), make_targets(rows(4), 90), view, cotangent, divergence=divergence)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.bfloat16)])
def test_streams_of_different_dtypes_and_strides(dtypes):
    logits = [x.to(dtype) for x, dtype in zip(make(len(dtypes), 3, 600), dtypes, strict=True)]
    targets = make_targets(3, 600)
    views = (packed, scattered, torch.clone)

    def ours(*students):
        return of_students(triton, (), targets)(*(view(x) for view, x in zip(views, students, strict=False)))

    assert_agrees(ours, of_students(reference, (), targets), logits)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_targets(divergence):
    check(1, make(3, 3, 50), None, divergence=divergence)
    alone = make(1, 3, 50)[0].requires_grad_()
    ce, kl = triton.ensemble_kl([alone], None, 1, 1.0, divergence, -100)
    assert not ce.any()
    assert not kl.any()
    assert not torch.autograd.grad(ce.sum() + kl.sum(), alone)[0].any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_only_one_of_the_losses_is_used(temperature):
    logits = [x.requires_grad_() for x in make(2, 3, 50)]
    targets = make_targets(3, 50)
    for part in range(2):
        results = []
        for backend in (triton, reference):
            losses = backend.ensemble_kl(logits, targets, 2, temperature, "forward", -100)
            results.append(torch.autograd.grad(losses[part].sum(), logits))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_point_masses(divergence, dtype):
    """Logits are saturated at ±30. Two streams agree and one does not."""
    logits = [torch.full((4, 600), -30.0, device=DEVICE) for _ in range(3)]
    for r, at in enumerate((5, 5, 599)):
        logits[r][:, at] = 30.0
    targets = torch.tensor([5, 599, 0, -100], device=DEVICE)
    check(3, [x.to(dtype) for x in logits], targets, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_tiny_divergences(temperature, divergence, shift):
    """At KL ≈ 1e-7, Σ p·u − p + q would be wrong by some percent. A shift moves all logits of one stream."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(4, 4000, generator=generator) * 3 * temperature
    nearby = base + torch.randn(4, 4000, generator=generator) * 4.5e-4 * temperature
    streams = [base.to(DEVICE), nearby.to(DEVICE) + shift]
    targets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    exact = reference.ensemble_kl([x.double() for x in streams], targets, 2, temperature, divergence, -100)[1]
    kl = triton.ensemble_kl(streams, targets, 2, temperature, divergence, -100)[1]
    assert 1e-8 < exact[0, 1].max() < 3e-6
    for i, j in ((0, 1), (1, 0)):
        assert (kl[i, j].double() / exact[i, j] - 1).abs().max() < (1e-3 if shift == 0 else 1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_whose_terms_lie_about_the_series_edge(divergence):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(2, 4000, generator=generator)
    streams = [base.to(DEVICE), (base + torch.randn(2, 4000, generator=generator) * 0.2).to(DEVICE)]
    exact = reference.ensemble_kl([x.double() for x in streams], None, 2, 1.0, divergence, -100)[1]
    kl = triton.ensemble_kl(streams, None, 2, 1.0, divergence, -100)[1]
    for i, j in ((0, 1), (1, 0)):
        assert (kl[i, j].double() / exact[i, j] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("case", ["padding", "one stream", "target", "other row", "nan"])
def test_infinities_and_nans_are_the_references(case, temperature, divergence):
    logits = make(3, 5, 40)
    targets = torch.tensor([0, 1, 3, -100, 39], device=DEVICE)
    if case == "padding":
        for x in logits:
            x[:, 5:12] = -math.inf
    elif case == "one stream":
        logits[1][:, 17:30] = -math.inf
    elif case == "target":
        logits[0][2, 3] = -math.inf
    elif case == "other row":
        for x, junk in zip(logits, (math.nan, math.inf, -math.inf), strict=True):
            x[3] = junk
    else:
        logits[0][1, 7] = math.nan
    results = []
    for backend, dtype in ((triton, torch.float32), (reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in logits[:2]]
        losses = backend.ensemble_kl([*leaves, logits[2].to(dtype)], targets, 2, temperature, divergence, -100)
        results.append([*losses, *torch.autograd.grad([x.sum() for x in losses], leaves)])
    for ours, exact in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    for ours, exact in zip(results[0][2:], results[1][2:], strict=True):
        good = exact.isfinite().all(-1)
        torch.testing.assert_close(ours[good].double(), exact[good], rtol=1e-4, atol=1e-5 / temperature)
        assert not ours[~good].isfinite().all(-1).any()
        assert not ours[3].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_without_a_finite_logit_is_nan(divergence):
    logits = make(2, 2, 40)
    logits[1][0] = -math.inf
    ce, kl = triton.ensemble_kl(logits, torch.tensor([1, 2], device=DEVICE), 2, 1.0, divergence, -100)
    assert ce[1, 0].isnan()
    assert kl[0, 1, 0].isnan()
    assert kl[1, 0, 0].isnan()
    assert kl[:, :, 1].isfinite().all()


def sweep(backend, logits, spec: LossSpec, *, wanted, padding=0, into=None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns ce, kl (empty without `kl_weight`) and the wanted gradients by `backend.loss_and_grad`, on copies."""
    vocabulary = logits[0].shape[1]
    if backend is reference:
        copies = [x.clone() for x in logits]
        ce, kl, gradients = reference.loss_and_grad(copies, spec.normalized(1, copies[0].dtype), wanted)
        assert kl is not None
        return ce, kl, [g for g in gradients if g is not None]
    padded = [torch.nn.functional.pad(x, (0, padding), value=math.nan) for x in logits]
    outputs = [
        None if not want else x if into is None else torch.full_like(x, math.nan, dtype=into)
        for x, want in zip(padded, wanted, strict=False)
    ]
    with honest_memory_and_casts():
        ce, kl = triton.loss_and_grad(padded, outputs, spec, vocabulary)
    gradients = [g for g in outputs if g is not None]
    assert not any(g[:, vocabulary:].any() for g in gradients)
    return ce, torch.empty(0) if kl is None else kl, [g[:, :vocabulary] for g in gradients]


@pytest.mark.parametrize("into", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("students", "streams", "temperature"), [(1, 3, 2.0), (2, 2, 1.0), (3, 4, 0.7), (6, 7, 1.0)])
def test_losses_and_gradients_in_one_launch(students, streams, temperature, divergence, into):
    """Gradients replace the students' logits (`into` None) or go elsewhere. Rows are padded with NaN."""
    logits = make(streams, 6, 590)
    targets = torch.tensor([0, 589, 7, 8, -100, -100], device=DEVICE)
    ce_rows, kl_rows = targets != -100, torch.tensor([True, False, True, True, True, False], device=DEVICE)
    for x in logits:
        x[5] = math.nan
    generator = torch.Generator().manual_seed(1)
    ce_weight = torch.rand(students, generator=generator).to(DEVICE)
    kl_weight = torch.rand(students, streams, generator=generator).to(DEVICE)
    kl_weight[0, -1] = 0
    wanted = [i != 1 for i in range(students)]
    spec = LossSpec(targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence)
    clean = [x.nan_to_num() for x in logits]
    exact = sweep(reference, [x.double() for x in clean], spec, wanted=wanted)
    plain = sweep(reference, clean, spec, wanted=wanted)
    ours = sweep(triton, logits, spec, padding=18, into=into, wanted=wanted)
    # The students' gradients are compared together. A peaked row's largest error is the rounding of that row's sums, so
    # one student's is a single draw, in which plain torch may be lucky.
    for actual, theirs, want in zip(
        *((ce, kl, torch.stack(grads)) for ce, kl, grads in (ours, plain, exact)), strict=True
    ):
        assert_near(actual, theirs.to(actual.dtype), want, str(tuple(actual.shape)))
        error, allowed = ((x.double() - want).abs().max().item() for x in (actual, theirs))
        rounding = torch.finfo(actual.dtype).eps * want.abs().max().item()
        assert error <= 3 * allowed + rounding, "more than storing it costs"


def test_without_kl_weights_only_cross_entropy_is_computed():
    """Neither the teacher nor the temperature is read."""
    (student,) = make(1, 3, 70)
    teacher = torch.full_like(student, math.nan)
    targets = torch.tensor([0, 69, -100], device=DEVICE)
    rows = targets != -100
    ones = torch.ones(1, device=DEVICE)
    spec = LossSpec(targets, ones, None, rows, rows, 2.0, "jsd")
    ce, kl, (gradient,) = sweep(triton, [student, teacher], spec, wanted=[True])
    assert not kl.numel()
    want = student.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(want, targets, reduction="none")
    torch.testing.assert_close(ce[0].double(), exact.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact.sum(), want)[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_launch_gives_the_same(divergence, dtype, monkeypatch):
    """Rows stay on chip or are read again, in parts or in sweeps, as `launch` may choose for other shapes or GPUs."""
    V = 700
    logits = make(3, 1, V, dtype)
    rows, weights = torch.ones(1, dtype=torch.bool, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    targets = torch.tensor([V - 1], device=DEVICE)
    spec = LossSpec(targets, weights[:, 0], weights, rows, rows, 1.0, divergence)
    vector = 16 // dtype.itemsize
    tile = 32 * vector
    exact = sweep(reference, [x.double() for x in logits], spec, wanted=[True, True])
    for chosen in (
        Launch(tile * 4, 4),
        Launch(tile * 1, 1, parts=2),
        Launch(tile * 2, 2, parts=vector // 2, sweeps=4),
        Launch(-(-V // (tile * 2)) * tile * 2, 2),
        Launch(-(-V // tile) * tile, 1, parts=vector, sweeps=2),
    ):
        monkeypatch.setattr(launch, "ensemble_kl", lambda *_, chosen=chosen, **__: chosen)
        ce, kl, gradients = sweep(triton, logits, spec, into=torch.float32, wanted=[True, True])
        torch.testing.assert_close(ce.double(), exact[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(kl.double(), exact[1], rtol=2e-6, atol=1e-7)
        for actual, want in zip(gradients, exact[2], strict=True):
            assert (actual.double() - want).abs().max() <= 2e-6 * want.abs().max()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(**RANDOM_LOSSES, tokens=st.integers(1, 4))
def test_properties(seed, students, teachers, tokens, vocabulary, scale, temperature, divergence):
    streams = students + teachers
    logits = make(streams, tokens, vocabulary, scale=scale, seed=seed)
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    weights = torch.ones(students, device=DEVICE), torch.ones(students, streams, device=DEVICE)

    def run(logits, targets=targets):
        rows = torch.ones_like(targets, dtype=torch.bool)
        spec = LossSpec(targets, *weights, rows, rows, temperature, divergence)
        return sweep(triton, logits, spec, wanted=[True] * students)

    tiny = 30 * torch.finfo(torch.float32).eps * max(scale, 1.0) / temperature
    close = {"rtol": 1e3 * tiny, "atol": 1e2 * tiny}
    ce, kl, gradients = run(logits)
    again = run(logits)
    assert torch.equal(ce, again[0])
    assert torch.equal(kl, again[1])
    assert all(torch.equal(a, b) for a, b in zip(gradients, again[2], strict=True))

    assert (kl >= -tiny * kl.max()).all()
    for gradient in gradients:
        torch.testing.assert_close(gradient.sum(-1), torch.zeros_like(ce[0]), **close)
    if streams == 1:
        torch.testing.assert_close(ce[0], torch.nn.functional.cross_entropy(logits[0], targets, reduction="none"))
        assert not kl.any()

    shifted = run([x + 3 * (i + 1) for i, x in enumerate(logits)])
    torch.testing.assert_close(shifted[1], kl, rtol=5e3 * tiny, atol=5e2 * tiny)

    assert run([logits[0]] * streams)[1].abs().max() <= tiny**2

    order = [*reversed(range(students)), *reversed(range(students, streams))]
    permuted = run([logits[i] for i in order])
    torch.testing.assert_close(permuted[0], ce[order[:students]], **close)
    torch.testing.assert_close(permuted[1], kl[order[:students]][:, order], **close)

    cut = tokens // 2
    halves = [run([x[part] for x in logits], targets[part]) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat([half[1] for half in halves], -1), kl)
    for i in range(students):
        assert torch.equal(torch.cat([half[2][i] for half in halves]), gradients[i])


@triton_jit
def _offsets_kernel(base, row_stride, column_stride, out):
    row, column = tl.program_id(0) + 3, tl.arange(0, 2)
    strides = (1, 1, row_stride, column_stride)
    far = triton_kernel._address(base, row, column, strides, 1, False).to(tl.int64) - base.to(tl.int64)
    near = triton_kernel._address(base, row, column, strides, 1, True).to(tl.int64) - base.to(tl.int64)
    tl.store(out + column, far)
    tl.store(out + 2 + column, near)


def test_64_bit_offsets():
    out = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    _offsets_kernel[(1,)](out, 2**30, 2**31 + 1, out)
    rows, column = 3 * 2**30 * 8, (2**31 + 1) * 8
    assert out.tolist() == [[rows, rows + column], [rows, rows + 8]]


def test_no_tokens():
    logits = [torch.zeros(0, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    ce, kl = triton.ensemble_kl(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), 1, 1.0, "forward", -100)
    assert (ce.shape, kl.shape) == ((1, 0), (1, 2, 0))
    assert torch.autograd.grad(ce.sum() + kl.sum(), logits[0])[0].shape == (0, 5)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"stream 1 is torch.float64: .* choose kernels.backend\('reference'\)"):
        triton.ensemble_kl(
            [torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE, dtype=torch.float64)],
            None,
            1,
            1.0,
            "forward",
            -100,
        )


def test_a_second_derivative_is_refused():
    logits = [x.requires_grad_() for x in make(2, 3, 8)]
    ce, kl = triton.ensemble_kl(logits, make_targets(3, 8), 2, 1.0, "forward", -100)
    (first,) = torch.autograd.grad(ce.sum() + (kl * kl).sum(), logits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), logits[0])


def test_torch_compile_traces_it():
    logits = [x.requires_grad_() for x in make(3, 3, 24)]
    targets = make_targets(3, 24)

    def loss(*logits):
        ce, kl = triton.ensemble_kl(logits, targets, 2, 2.0, "jsd", -100)
        return ce.sum() + kl.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*logits), logits[:2]), torch.autograd.grad(loss(*logits), logits[:2]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_auto_takes_it_for_cuda_tensors_with_no_gpu():
    with FakeTensorMode(), kernels.backend("auto"):
        logits = [torch.empty(4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        losses = kernels.ensemble_kl(logits, torch.empty(4, device="cuda", dtype=torch.int64), students=2)
    assert (losses.ce.shape, losses.kl.shape, losses.kl.dtype) == ((2, 4), (2, 3, 4), torch.float32)
