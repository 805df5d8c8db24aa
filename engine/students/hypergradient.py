"""The hypergradient of weighted mutual learning: how the ensemble's held-out loss changes with the students' weights ω.

The inner step moves θ_k by −γ_k·∂loss_k/∂θ_k, and loss_k is affine in ω (engine.students.coefficients): ω_i multiplies
what student i pays for its own cross-entropy and what the others pay for diverging from it. Let L2(ω, θ(ω)) be the
held-out cross-entropy of the ensemble Σ_i ω_i z_i of logits z_i. Then, differentiated through one inner step of plain
SGD (Iyer 2024, after Zhang et al. 2022, Theorem 1),

    g_i = ∂L2/∂ω_i − Σ_k γ_k ⟨v_k, ∂La_ik/∂θ_k⟩        v_k = ∂L2/∂θ_k, after the step

where La_ik is what ω_i multiplies in student k's loss: its own cross-entropy for k = i, KL(p_i ‖ p_k) with p_i constant
for k ≠ i. Each inner product is the derivative of La_ik in the direction γ_k·v_k. So one Jacobian-vector product per
student gives the tangents of its hidden states and head; those of its logits follow chunk by chunk as ḣWᵀ + hẆᵀ; and
the logits and tangents of S students hold all S² derivatives: S backward and S forward-mode passes in all.

B sequences, L positions, N tokens (n of a chunk), D hidden, V vocabulary, S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from engine.data.batches import IGNORED, Batch, Step
from engine.models.base import Shape
from engine.models.dropout import dropout_seeds
from engine.models.families import new_model
from engine.students.coefficients import LossCoefficients, LossWeighting
from engine.students.zero import torch_linear
from kernels import Projected, linear_ensemble_kl

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}  # for the logits, tangents and probabilities of one chunk

Parameters = dict[str, Tensor]  # one student's, by name


@dataclass(frozen=True)
class Hypergradient:
    """g = direct + own + peers, each [S], float64 on the CPU."""

    loss: float  # L2, nats per token
    direct: Tensor  # ∂L2/∂ω_i
    own: Tensor  # through student i's own cross-entropy
    peers: Tensor  # through what student i teaches the others

    @property
    def total(self) -> Tensor:
        return self.direct + self.own + self.peers

    def terms(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("direct", "own", "peers")}

    def shares(self) -> dict[str, float]:
        """Returns each term's share in what moves ω, by Euclidean norms. A constant added to all of g moves nothing."""
        centred = {name: torch.tensor(term) - sum(term) / len(term) for name, term in self.terms().items()}
        norms = {name: term.norm().item() for name, term in centred.items()}
        return {name: norm / (sum(norms.values()) or 1.0) for name, norm in norms.items()}


class FunctionalStudent(nn.Module):
    """A student's forward pass as a function of its parameters. It holds no tensors of its own."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.dropout = seed, shape.dropout
        with torch.device("meta"):
            self.model = new_model(shape)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (hidden [N, D], head [V, D]), and where the head has a bias also that, [V]."""
        seeds_B = None
        if batch.samples_B is not None and self.dropout > 0:
            seeds_B = dropout_seeds(self.seed, batch.samples_B)
        stream = self.model.project(self.model(batch.tokens_BL, batch.rows_N, seeds_B))
        return tuple(tensor for tensor in stream if tensor is not None)

    def forward_with(self, parameters: Parameters, batch: Batch) -> tuple[Tensor, ...]:
        """Returns what `forward` does, with these parameters."""
        named = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(self, named, (batch,))

    def tangent(
        self, parameters: Parameters, direction: Parameters, batch: Batch
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns what `forward_with` does and its derivative in `direction`: fused kernels have no forward mode."""
        with kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), torch_linear():
            output, tangent = jvp(lambda point: self.forward_with(point, batch), (parameters,), (direction,))[:2]
            return output, tangent


def hypergradient(
    students: Sequence[FunctionalStudent],
    before: Sequence[Parameters],
    after: Sequence[Parameters],
    step_sizes: Sequence[float],
    train: Step,
    held_out: Step,
    omega_S: Tensor,
    weighting: LossWeighting,
    *,
    terms: str = "all",
) -> Hypergradient:
    """Returns g of this module's docstring, the same on every rank; a collective call where there are several.

    Args:
        before, after: every student's parameters before and after the step on `train`; any one floating-point dtype.
        step_sizes: γ_k, what the step multiplied student k's gradient by.
        train, held_out: this rank's share of both.
        weighting: the inner loss, as a function of ω.
        terms: "all", or "direct" for ∂L2/∂ω alone.
    """
    assert all(batch.kl_mask_N is None for batch in train.micro_batches), "every row needs a target"
    S = len(students)
    loss, direct_S, gradients = _held_out_gradient(students, after, omega_S, held_out, with_students=terms == "all")
    inner_SS = torch.zeros(S, S, dtype=torch.float64, device=omega_S.device)
    if terms == "all":
        # g needs the product of the ranks' mean gradients, not the mean of their products: so v is summed first.
        directions = []
        for gradient, step_size in zip(gradients, step_sizes, strict=True):
            _sum_over_ranks(list(gradient.values()))
            directions.append({name: value * step_size for name, value in gradient.items()})
        inner_SS -= _inner_derivatives(students, before, directions, train, weighting)
    sums = torch.cat([loss[None], direct_S, inner_SS.flatten()]).double()
    _sum_over_ranks([sums])
    loss, direct_S, inner_SS = sums.cpu().split([1, S, S**2])
    inner_SS = inner_SS.view(S, S)
    own_S = inner_SS.diagonal()
    return Hypergradient(loss.item(), direct_S, own_S, inner_SS.sum(1) - own_S)


def _held_out_gradient(
    students: Sequence[FunctionalStudent],
    parameters: Sequence[Parameters],
    omega: Tensor,
    step: Step,
    *,
    with_students: bool,
) -> tuple[Tensor, Tensor, list[Parameters]]:
    """Returns this rank's part of L2, of ∂L2/∂ω [S] and, `with_students`, of every v_k."""
    leaves = [{n: p.detach().requires_grad_(with_students) for n, p in named.items()} for named in parameters]
    dtype = next(iter(leaves[0].values())).dtype
    omega_S = omega.detach().to(dtype).requires_grad_()
    inputs = [omega_S, *(p for named in leaves if with_students for p in named.values())]
    loss, gradients = torch.zeros((), dtype=torch.float64, device=omega.device), [torch.zeros_like(x) for x in inputs]
    for batch in step.micro_batches:
        outputs = [student.eval().forward_with(named, batch) for student, named in zip(students, leaves, strict=True)]
        batch_loss = _ensemble_loss(outputs, omega_S, batch.targets_N, step.valid_tokens)
        loss += batch_loss.detach()
        batch_gradients = torch.autograd.grad(batch_loss, inputs, materialize_grads=True)
        for total, gradient in zip(gradients, batch_gradients, strict=True):
            total += gradient
    remaining = iter(gradients[1:])
    return loss, gradients[0], [{n: next(remaining) for n in named} for named in leaves] if with_students else []


def _ensemble_loss(
    outputs: Sequence[tuple[Tensor, ...]], omega_S: Tensor, targets_N: Tensor, normalizer: int
) -> Tensor:
    """Returns the cross-entropy of Σ_i ω_i z_i, which is one linear head on the concatenated hidden states."""
    hidden_ND = torch.cat([hidden for hidden, *_ in outputs], -1)
    weight_VD = torch.cat([w * weight for w, (_, weight, *_) in zip(omega_S, outputs, strict=True)], -1)
    biases = [w * bias for w, (_, _, *rest) in zip(omega_S, outputs, strict=True) for bias in rest]
    mixed = Projected(hidden_ND, weight_VD, torch.stack(biases).sum(0) if biases else None)
    one = omega_S.new_ones(1)
    result = linear_ensemble_kl(
        [mixed], [], targets_N, ce_weight=one, kl_weight=None, normalizer=normalizer, ignore_index=IGNORED
    )
    return result.losses[0]


def _inner_derivatives(
    students: Sequence[FunctionalStudent],
    parameters: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    weighting: LossWeighting,
) -> Tensor:
    """Returns this rank's part of ⟨direction_k, ∂La_ik/∂θ_k⟩, [S, S]: one Jacobian-vector product per student."""
    S = len(students)
    # Each student coefficient is c·ω_i for one i, so its value at ω = 1 is its derivative.
    coefficients = weighting.coefficients(torch.ones(S, device=weighting.device))
    ce_S = torch.zeros(S, dtype=torch.float64, device=weighting.device)
    kl_SS = ce_S.new_zeros(S, S)
    for batch in step.micro_batches:
        triples = zip(students, parameters, directions, strict=True)
        streams = [student.train().tangent(named, direction, batch) for student, named, direction in triples]
        bytes_per_row = 5 * sum(len(weight) * weight.element_size() for (_, weight, *_), _ in streams)
        valid_N = (batch.targets_N != IGNORED).nonzero().squeeze(1)
        for rows in valid_N.split(max(1, CHUNK_BYTES[valid_N.device.type] // bytes_per_row)):
            logits, logits_dot = [], []
            for (hidden, weight, *bias), (hidden_dot, weight_dot, *bias_dot) in streams:
                logits.append(F.linear(hidden[rows], weight, *bias))
                logits_dot.append(F.linear(hidden_dot[rows], weight, *bias_dot) + F.linear(hidden[rows], weight_dot))
            targets_n = batch.targets_N[rows]
            ce, kl = _loss_derivatives(torch.stack(logits), torch.stack(logits_dot), targets_n, coefficients)
            ce_S += ce
            kl_SS += kl
    inner_SS = (coefficients.ce_weight.double() * ce_S).diag()
    if coefficients.kl_weight is not None:
        # At [k, j] stands what ω_j multiplies in student k's divergence from student j.
        kl_weight_SS = coefficients.kl_weight[:, :S].double()
        inner_SS += coefficients.temperature**2 * (kl_weight_SS * kl_SS).T
    return inner_SS / step.valid_tokens


def _loss_derivatives(
    z_SnV: Tensor, dot_SnV: Tensor, targets_n: Tensor, coefficients: LossCoefficients
) -> tuple[Tensor, Tensor]:
    """Returns the derivatives of Σ_n CE_k [S] and Σ_n KL_kj [S, S] as student k's logits alone move along their
    tangents."""
    p_SnV = torch.softmax(z_SnV, -1)
    mean_Sn = torch.linalg.vecdot(p_SnV, dot_SnV)
    at_target_Sn = dot_SnV.gather(2, targets_n.expand(len(z_SnV), -1)[..., None]).squeeze(2)
    ce_S = (mean_Sn - at_target_Sn).sum(1, dtype=torch.float64)
    temperature, divergence = coefficients.temperature, coefficients.divergence
    if divergence != "forward":

        def kl_SSn(*z: Tensor) -> Tensor:
            return kernels.ensemble_kl(z, None, students=len(z), temperature=temperature, divergence=divergence).kl

        with kernels.backend("reference"):
            return ce_S, jvp(kl_SSn, tuple(z_SnV), tuple(dot_SnV))[1].sum(-1, dtype=torch.float64)
    # ∂KL(p_j ‖ p_k)/∂z_k = (p_k − p_j) / T. The mean of all p is taken off both, so that what they share does not drown
    # their difference.
    if temperature != 1:
        p_SnV = torch.softmax(z_SnV / temperature, -1)
    products_nSS = torch.einsum("knv,jnv->nkj", dot_SnV, p_SnV - p_SnV.mean(0))
    products_SS = products_nSS.sum(0, dtype=torch.float64)
    return ce_S, (products_SS.diagonal()[:, None] - products_SS) / temperature


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their sums over all ranks, in one collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
