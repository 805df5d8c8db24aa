"""The outer loop of weighted mutual learning: students' weights ω that make their ensemble better on held-out text.

The inner step moves θ_k by −γ_k·∂loss_k/∂θ_k, and loss_k is affine in ω (engine.objective), so for L2(ω, θ(ω)), the
held-out cross-entropy of the ensemble, one inner step of plain SGD back (Iyer 2024, after Zhang et al. 2022, Theorem 1)

    g_i = ∂L2/∂ω_i − Σ_k γ_k ⟨v_k, ∂La_ik/∂θ_k⟩        v_k = ∂L2/∂θ_k, after the step

where La_ik is what ω_i multiplies in student k's loss: its own cross-entropy for k = i, KL(p_i ‖ p_k) with p_i constant
for k ≠ i. Each inner product is the derivative of La_ik in the direction γ_k·v_k. So one Jacobian-vector product per
student gives the tangents of its hidden states and head, those of its logits follow chunk by chunk as ḣWᵀ + hẆᵀ, and
the logits and tangents of S students hold all S² derivatives: S backward and S forward-mode passes in all.

B sequences, L positions, N tokens (n of a chunk), D hidden, V vocabulary, S students.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kernels
from engine.cohort import Cohort, Student
from engine.config import OuterConfig
from engine.data import IGNORED, Batch, Step, TrainingData
from engine.flops import Text
from engine.models.dropout import draws
from engine.objective import Coefficients
from engine.runtime import Runtime
from kernels import Projected, linear_ensemble_kl

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}  # for the logits, tangents and probabilities of one chunk

Parameters = dict[str, Tensor]  # one student's, by name
Weigh = Callable[[Tensor], Coefficients]  # from ω [S] float64 to the loss's coefficients, affinely


@dataclass(frozen=True)
class Hypergradient:
    """g = direct + own + peers, each [S], float64 on the CPU; and L2 in nats per token."""

    loss: float
    direct: Tensor  # ∂L2/∂ω_i
    own: Tensor  # through student i's own cross-entropy
    peers: Tensor  # through what student i teaches the others

    @property
    def total(self) -> Tensor:
        return self.direct + self.own + self.peers

    def terms(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("direct", "own", "peers")}

    def shares(self) -> dict[str, float]:
        """Each term's part in what moves ω, in Euclidean norms; a constant added to all of g moves nothing."""
        centred = {name: torch.tensor(term) - sum(term) / len(term) for name, term in self.terms().items()}
        norms = {name: term.norm().item() for name, term in centred.items()}
        return {name: norm / (sum(norms.values()) or 1.0) for name, norm in norms.items()}


class Stream(nn.Module):
    """A student's forward pass as a function of its parameters: tensors of its own it has none, not even memory."""

    def __init__(self, make: Callable[[], nn.Module], seed: int = 0) -> None:
        """`seed`: of the student, from which its dropout draws."""
        super().__init__()
        self.seed = seed
        with torch.device("meta"):
            self.model = make()

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """(hidden [N, D], head [V, D]), and where the head has one its bias [V]."""
        model: Any = self.model
        inputs = [batch.tokens_BL, batch.rows_N]
        if batch.samples_B is not None and getattr(model.shape, "dropout", 0) > 0:
            inputs.append(draws(self.seed, batch.samples_B))
        projected = (model(*inputs), model.head, getattr(model, "head_bias", None))
        return tuple(x for x in projected if x is not None)

    def at(self, parameters: Parameters, batch: Batch) -> tuple[Tensor, ...]:
        named = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(self, named, (batch,))

    def tangent(
        self, point: Parameters, direction: Parameters, batch: Batch
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What `at` gives, and its derivative in `direction`. The fused kernels have no forward mode."""
        with kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), _torchs_linear():
            output, tangent = jvp(lambda parameters: self.at(parameters, batch), (point,), (direction,))[:2]
            return output, tangent


@contextmanager
def _torchs_linear() -> Iterator[None]:
    """Once an engine is under ZeRO 3, DeepSpeed has its own in place, for the whole process; it has no forward mode."""
    linear, F.linear = F.linear, torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.linear = linear


def hypergradient(
    streams: Sequence[Stream],
    before: Sequence[Parameters],
    after: Sequence[Parameters],
    scales: Sequence[float | Parameters],
    train: Step,
    held_out: Step,
    omega: Tensor,
    weigh: Weigh,
    *,
    ensemble: str = "logits",
    terms: str = "both",
    method: str = "forward",
) -> Hypergradient:
    """g of this module's docstring, the same on every rank; a collective call where there are several.

    Args:
        before, after: every student's parameters before and after the step on `train`; any one floating-point dtype.
        scales: γ_k, or per parameter γ_k times what preconditions its gradient (tensors of its shape).
        train, held_out: this rank's share of both.
        omega: [S].
        weigh: the coefficients of the inner loss; its affine dependence on ω is read off at 0 and the unit vectors.

    Raises:
        ValueError: a teacher's weight that depends on ω.
    """
    assert all(batch.kl_mask_N is None for batch in train.micro_batches), "rows whose divergences alone count"
    students, device = len(streams), omega.device
    loss, direct_S, gradients = _held_out_gradient(streams, after, omega, held_out, ensemble, terms == "both")
    inner_SS = torch.zeros(students, students, dtype=torch.float64, device=device)
    if terms == "both":
        # The product of the ranks' mean gradients, not the mean of their products: v first, whole, on every rank.
        directions = []
        for gradient, scale in zip(gradients, scales, strict=True):
            _sum_over_ranks(list(gradient.values()))
            directions.append(
                {n: g * (scale[n] if isinstance(scale, dict) else scale) for n, g in gradient.items()},
            )
        slopes = Slopes(weigh, students, device)
        inner_SS -= _METHODS[method](streams, before, directions, train, slopes)
    found = torch.cat([loss[None], direct_S, inner_SS.flatten()]).double()
    _sum_over_ranks([found])
    loss, direct_S, inner_SS = found.cpu().split([1, students, students**2])
    inner_SS = inner_SS.view(students, students)
    own_S = inner_SS.diagonal()
    return Hypergradient(loss.item(), direct_S, own_S, inner_SS.sum(1) - own_S)


class Slopes:
    """How the inner loss depends on ω: da_k/dω_i as ce[i, k], dw_kj/dω_i as kl[i, k, j], teachers' columns dropped."""

    def __init__(self, weigh: Weigh, students: int, device: torch.device) -> None:
        at = torch.zeros(students + 1, students, dtype=torch.float64, device=device)
        at[1:].fill_diagonal_(1)
        found = [weigh(omega_S) for omega_S in at]
        self.temperature, self.divergence = found[0].temperature, found[0].divergence
        self.ce = torch.stack([one.ce_weight - found[0].ce_weight for one in found[1:]])
        self.kl = self.ce.new_zeros(students, students, students)
        weights = [one.kl_weight for one in found]
        some = next((weight for weight in weights if weight is not None), None)
        if some is not None:
            kl = torch.stack([torch.zeros_like(some) if weight is None else weight for weight in weights])
            kl = kl[1:] - kl[0]
            if kl[:, :, students:].any():
                raise ValueError("the weight of a teacher depends on ω: the outer loop weighs students alone; fix it")
            self.kl = kl[:, :, :students].contiguous()

    def combine(self, ce_S: Tensor, kl_SS: Tensor) -> Tensor:
        """[S, S]: of derivatives of CE_k and KL_kj in student k's direction, those of La_ik."""
        peers_SS = torch.einsum("ikj,kj->ik", self.kl.double(), kl_SS)
        return self.ce.double() * ce_S + self.temperature**2 * peers_SS


def _held_out_gradient(
    streams: Sequence[Stream],
    points: Sequence[Parameters],
    omega: Tensor,
    step: Step,
    ensemble: str,
    wanted: bool,
) -> tuple[Tensor, Tensor, list[Parameters]]:
    """This rank's part of L2, ∂L2/∂ω [S] and, if wanted, every v_k."""
    leaves = [{n: p.detach().requires_grad_(wanted) for n, p in point.items()} for point in points]
    dtype = next(iter(leaves[0].values())).dtype
    omega_S = omega.detach().to(dtype).requires_grad_()
    inputs = [omega_S, *(p for own in leaves if wanted for p in own.values())]
    loss, gradients = torch.zeros((), dtype=torch.float64, device=omega.device), [torch.zeros_like(x) for x in inputs]
    ensemble_loss = _mixture_of_logits if ensemble == "logits" else _mixture_of_probabilities
    for stream in streams:
        stream.eval()
    for batch in step.micro_batches:
        outputs = [stream.at(own, batch) for stream, own in zip(streams, leaves, strict=True)]
        batch_loss = ensemble_loss(outputs, omega_S, batch.targets_N, step.valid_tokens)
        loss += batch_loss.detach()
        for total, gradient in zip(gradients, torch.autograd.grad(batch_loss, inputs, materialize_grads=True)):  # noqa: B905
            total += gradient
    rest = iter(gradients[1:])
    return loss, gradients[0], [{n: next(rest) for n in own} for own in leaves] if wanted else []


def _mixture_of_logits(
    outputs: Sequence[tuple[Tensor, ...]], omega_S: Tensor, targets_N: Tensor, normalizer: int
) -> Tensor:
    """CE of Σ_i ω_i z_i: one linear head on the concatenated hidden states."""
    hidden_ND = torch.cat([hidden for hidden, *_ in outputs], -1)
    weight_VD = torch.cat([w * weight for w, (_, weight, *_) in zip(omega_S, outputs, strict=True)], -1)
    biases = [w * bias for w, (_, _, *rest) in zip(omega_S, outputs, strict=True) for bias in rest]
    mixed = Projected(hidden_ND, weight_VD, torch.stack(biases).sum(0) if biases else None)
    one = omega_S.new_ones(1).detach()
    result = linear_ensemble_kl(
        [mixed], [], targets_N, ce_weight=one, kl_weight=None, normalizer=normalizer, ignore_index=IGNORED
    )
    return result.losses[0]


def _mixture_of_probabilities(
    outputs: Sequence[tuple[Tensor, ...]], omega_S: Tensor, targets_N: Tensor, normalizer: int
) -> Tensor:
    """−log Σ_i ω_i p_i(target), logits recomputed chunk by chunk in the backward pass."""
    total = omega_S.new_zeros(())
    for rows in _chunks(outputs, targets_N):
        log_prob_Sn = [
            -checkpoint(_target_losses, hidden[rows], *head, targets=targets_N[rows], use_reentrant=False)
            for hidden, *head in outputs
        ]
        total = total - torch.logsumexp(omega_S.log()[:, None] + torch.stack(log_prob_Sn), 0).sum()
    return total / normalizer


def _target_losses(hidden_nD: Tensor, *head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_nD, *head), targets, reduction="none")


def _chunks(outputs: Sequence[tuple[Tensor, ...]], targets_N: Tensor) -> Iterator[Tensor]:
    """Indices of the rows that count, so many at once as CHUNK_BYTES has room for."""
    per_row = 5 * sum(len(weight) * weight.element_size() for _, weight, *_ in outputs)
    valid_N = (targets_N != IGNORED).nonzero().squeeze(1)
    if len(valid_N):
        yield from valid_N.split(max(1, CHUNK_BYTES[targets_N.device.type] // per_row))


def _by_forward_mode(
    streams: Sequence[Stream],
    points: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    slopes: Slopes,
) -> Tensor:
    """⟨direction_k, ∂La_ik/∂θ_k⟩ as [S, S], this rank's part: a Jacobian-vector product per student."""
    ce_S = torch.zeros(len(streams), dtype=torch.float64, device=slopes.ce.device)
    kl_SS = ce_S.new_zeros(len(streams), len(streams))
    for batch in step.micro_batches:
        outputs, tangents = [], []
        for stream, point, direction in zip(streams, points, directions, strict=True):
            output, tangent = stream.train().tangent(point, direction, batch)
            outputs.append(output)
            tangents.append(tangent)
        for rows in _chunks(outputs, batch.targets_N):
            logits, logits_dot = [], []
            for (hidden, weight, *bias), (hidden_dot, weight_dot, *bias_dot) in zip(outputs, tangents, strict=True):
                logits.append(F.linear(hidden[rows], weight, *bias))
                logits_dot.append(F.linear(hidden_dot[rows], weight, *bias_dot) + F.linear(hidden[rows], weight_dot))
            ce, kl = _directional(torch.stack(logits), torch.stack(logits_dot), batch.targets_N[rows], slopes)
            ce_S += ce
            kl_SS += kl
    return slopes.combine(ce_S, kl_SS) / step.valid_tokens


def _directional(z_SnV: Tensor, dot_SnV: Tensor, targets_n: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """Derivatives of Σ_n CE_k [S] and Σ_n KL_kj [S, S] as student k's logits move along their tangents, alone."""
    p_SnV = torch.softmax(z_SnV, -1)
    mean_Sn = torch.linalg.vecdot(p_SnV, dot_SnV)
    at_target_Sn = dot_SnV.gather(2, targets_n.expand(len(z_SnV), -1)[..., None]).squeeze(2)
    ce_S = (mean_Sn - at_target_Sn).sum(1, dtype=torch.float64)
    if slopes.divergence != "forward":
        options: Any = dict(students=len(z_SnV), temperature=slopes.temperature, divergence=slopes.divergence)
        with kernels.backend("reference"):
            kl_SSn = jvp(lambda *z: kernels.ensemble_kl(z, None, **options).kl, tuple(z_SnV), tuple(dot_SnV))[1]
        return ce_S, kl_SSn.sum(-1, dtype=torch.float64)
    # ∂KL(p_j ‖ p_k)/∂z_k = (p_k − p_j) / T. Both less the mean of all, lest what they share drown their difference.
    if slopes.temperature != 1:
        p_SnV = torch.softmax(z_SnV / slopes.temperature, -1)
    products_nSS = torch.einsum("knv,jnv->nkj", dot_SnV, p_SnV - p_SnV.mean(0))
    products_SS = products_nSS.sum(0, dtype=torch.float64)
    return ce_S, (products_SS.diagonal()[:, None] - products_SS) / slopes.temperature


def _by_backward_mode(
    streams: Sequence[Stream],
    points: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    slopes: Slopes,
) -> Tensor:
    """As `_by_forward_mode`, from the S gradients of every student: the obvious way, kept to compare with."""
    students = range(len(streams))
    inner_SS = torch.zeros(len(streams), len(streams), dtype=torch.float64, device=slopes.ce.device)
    leaves = [{n: p.detach().requires_grad_() for n, p in point.items()} for point in points]
    for batch in step.micro_batches:
        projected = [Projected(*stream.train().at(own, batch)) for stream, own in zip(streams, leaves, strict=True)]
        for i in students:
            losses = linear_ensemble_kl(
                projected,
                [],
                batch.targets_N,
                ce_weight=slopes.ce[i],
                kl_weight=slopes.kl[i],
                normalizer=step.valid_tokens,
                temperature=slopes.temperature,
                divergence=slopes.divergence,
                ignore_index=IGNORED,
            ).losses
            for k in students:
                inputs = list(leaves[k].values())
                gradients = torch.autograd.grad(
                    losses[k], inputs, retain_graph=i != students[-1], materialize_grads=True
                )
                inner_SS[i, k] += _dot(gradients, list(directions[k].values()))
    return inner_SS


@torch.no_grad()
def _by_central_differences(
    streams: Sequence[Stream],
    points: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    slopes: Slopes,
) -> Tensor:
    """As `_by_forward_mode`, from losses alone: for kernels or models that have no forward mode."""
    students = range(len(streams))
    ce_S = torch.zeros(len(streams), dtype=torch.float64, device=slopes.ce.device)
    kl_SS = ce_S.new_zeros(len(streams), len(streams))
    one = slopes.ce.new_ones(1, len(streams))
    for stream in streams:
        stream.train()
    for batch in step.micro_batches:
        base = [Projected(*stream.at(point, batch)) for stream, point in zip(streams, points, strict=True)]
        for k in students:
            peers = [j for j in students if j != k]
            reach = _dot(list(directions[k].values()), list(directions[k].values())).sqrt()
            if reach == 0:
                continue
            length = _dot(list(points[k].values()), list(points[k].values())).sqrt()
            epsilon = (0.2 * torch.finfo(base[k].hidden.dtype).eps ** (1 / 3) * length / reach).item()
            for sign in (1, -1):
                moved = {n: p + sign * epsilon * directions[k][n] for n, p in points[k].items()}
                result = linear_ensemble_kl(
                    [Projected(*streams[k].at(moved, batch))],
                    [base[j] for j in peers],
                    batch.targets_N,
                    ce_weight=one[0, :1],
                    kl_weight=one,
                    normalizer=1,
                    temperature=slopes.temperature,
                    divergence=slopes.divergence,
                    ignore_index=IGNORED,
                )
                assert result.kl is not None
                ce_S[k] += sign / (2 * epsilon) * result.ce.sum(dtype=torch.float64)
                kl_SS[k, peers] += sign / (2 * epsilon) * result.kl[0, 1:].sum(-1, dtype=torch.float64)
    return slopes.combine(ce_S, kl_SS) / step.valid_tokens


_METHODS = {"forward": _by_forward_mode, "backward": _by_backward_mode, "central": _by_central_differences}


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vecdot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]).sum(
        dtype=torch.float64
    )


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """In place, in one collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def mirror_descent(omega: Sequence[float], gradient: Sequence[float], step_size: float, floor: float) -> list[float]:
    """ω_i ← ω_i·e^{−η·g_i} / Σ_j ω_j·e^{−η·g_j} in log space; no weight below floor / (1 + S·floor)."""
    gradient_S = torch.tensor(gradient, dtype=torch.float64)
    log_S = torch.tensor(omega, dtype=torch.float64).log() - step_size * (gradient_S - gradient_S.min())
    moved_S = log_S.softmax(0).clamp(min=floor)
    return (moved_S / moved_S.sum()).tolist()


@dataclass(frozen=True)
class Update:
    """One update of ω, for the record."""

    omega: list[float]  # after it
    loss: float  # L2, nats per token, before it
    gradient: dict[str, list[float]]  # its terms direct, own and peers, to be added up
    shares: dict[str, float]  # theirs in what moved ω
    step_size: float
    seconds: float
    text: Text  # the held-out text that it read


@dataclass(frozen=True)
class OuterState:
    """What a checkpoint keeps; floats survive JSON bit for bit. The rest follows from the step's number."""

    omega: tuple[float, ...]
    updates: int = 0


def check(config: OuterConfig, students: int) -> None:
    """Raises ValueError for settings that do not fit so many students."""
    if config.initial is not None and len(config.initial) != students:
        raise ValueError(f"outer.initial has {len(config.initial)} weights for {students} students: give one to each")
    if not 0 < config.floor * students < 1:
        raise ValueError(f"outer.floor={config.floor}: expected between 0 and 1/{students}, the equal weight")
    if config.every is not None and students == 1:
        raise ValueError("outer.every: there is one student and nothing to weigh; drop it, or add a student")
    idle, why = (), ""
    if config.every is None:
        idle, why = [f.name for f in fields(config) if f.name not in ("initial", "every")], "without outer.every"
    elif config.terms == "first":
        idle, why = ("inner", "precondition", "method"), "with outer.terms=first"
    for name in idle:
        if getattr(config, name) != getattr(OuterConfig(), name):
            raise ValueError(f"outer.{name}={getattr(config, name)} has no effect {why}: drop it")


class OuterLoop:
    """ω over a run: `before_step` and `after_step` around every optimizer step."""

    def __init__(
        self, config: OuterConfig, students: int, steps: int, weigh: Weigh, runtime: Runtime, state: OuterState | None
    ) -> None:
        """Of `steps` steps in all; goes on from `state`, a checkpoint's. Raises ValueError for what does not fit."""
        check(config, students)
        initial = config.initial or (1.0,) * students
        self.state = state or OuterState(tuple(w / sum(initial) for w in initial))
        self.last: Update | None = None  # what the last step brought, if it was this loop's turn
        self._config, self._steps, self._weigh, self._runtime = config, steps, weigh, runtime
        self._streams: list[Stream] = []
        self._before: list[Parameters] | None = None

    @property
    def weights(self) -> Tensor:
        """ω [S], float64, on the device."""
        return torch.tensor(self.state.omega, dtype=torch.float64, device=self._runtime.device)

    def due(self, step: int) -> bool:
        return self._config.every is not None and step % self._config.every == 0

    def step_size(self, step: int) -> float:
        first, last = self._config.step_size, self._config.last_step_size
        return last + (first - last) * (1 + math.cos(math.pi * step / self._steps)) / 2

    def before_step(self, step: Step, cohort: Cohort) -> None:
        """On its turn: keep the parameters that the step will change."""
        self._before = None
        if self.due(step.number) and self._config.terms == "both" and self._config.inner == "exact":
            self._before = [{n: p.clone() for n, p in parameters_of(student).items()} for student in cohort]

    def after_step(self, step: Step, cohort: Cohort, held_out: TrainingData | None, *, skipped: bool = False) -> bool:
        """Whether `weights` have moved, as they do on its turn, unless the step was skipped. A collective call.

        `held_out` is the held-out split, read as training data is: the u-th update takes its u-th step. None: ω stays.
        """
        self.last, before, self._before = None, self._before, None
        if not self.due(step.number) or skipped:
            return False
        assert held_out is not None, "an update reads held-out text"
        begin = time.perf_counter()
        if not self._streams:
            made: list[tuple[Any, Student]] = [(type(student.model), student) for student in cohort]
            self._streams = [Stream(lambda c=c, s=s: c(s.shape), s.config.seed) for c, s in made]
        after = [parameters_of(student) for student in cohort]
        (held_out_step,) = held_out.steps(self.state.updates + 1, self.state.updates + 1)
        found = hypergradient(
            self._streams,
            before or after,
            after,
            [inner_step_scale(student, precondition=self._config.precondition == "adamw") for student in cohort],
            step,
            held_out_step,
            self.weights,
            self._weigh,
            ensemble=self._config.ensemble,
            terms=self._config.terms,
            method=self._config.method,
        )
        omega, gradient, step_size = list(self.state.omega), found.total.tolist(), self.step_size(step.number)
        if all(map(math.isfinite, gradient)):
            omega = mirror_descent(omega, gradient, step_size, self._config.floor)
        self.state = OuterState(tuple(omega), self.state.updates + 1)
        seconds, text = time.perf_counter() - begin, Text.of(held_out_step, self._runtime.world)
        self.last = Update(omega, found.loss, found.terms(), found.shares(), step_size, seconds, text)
        return True


def parameters_of(student: Student) -> Parameters:
    """The whole fp32 parameters on every rank, not to be written to; a collective call where ZeRO shards them."""
    parameters = {}
    for name, parameter in student.model.named_parameters():
        whole = student.zero_stage < 3 and parameter.dtype == torch.float32
        value = parameter.detach() if whole else safe_get_full_fp32_param(parameter)
        assert value is not None, f"DeepSpeed has no fp32 weight for {name}"
        parameters[name] = value
    return parameters


def inner_step_scale(student: Student, *, precondition: bool) -> float | Parameters:
    """What the last step multiplied the gradient by: the learning rate, less where clipping acted; with
    `precondition` also AdamW's (1−β₁) / (1−β₁ᵗ) / (√v̂ + ε), its second moment v̂ held constant."""
    (group, *_), divisor = student.optimizer.param_groups, student.divisor.item()
    rate = group["lr"] / divisor
    if not precondition:
        return rate
    updates = next(iter(student.optimizer.state.values()))["step"].item()
    first, second = (1 - beta**updates for beta in group["betas"])
    scales = {}
    for name, parameter in student.model.named_parameters():
        if student.zero_stage == 0:
            square = student.optimizer.state[parameter]["exp_avg_sq"]
        else:
            square = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
        assert square is not None, f"DeepSpeed has no second moment for {name}"
        scales[name] = rate * (1 - group["betas"][0]) / first / ((square / second).sqrt() + group["eps"])
    return scales
