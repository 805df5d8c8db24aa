"""Our loss against the papers', written in plain torch as their code has it.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config.settings import Config, ObjectiveConfig, StudentConfig, TeacherConfig
from engine.data.batches import IGNORED, Batch
from engine.models.base import LanguageModel
from engine.models.families import new_model, shape_of
from engine.students.coefficients import LossWeighting
from engine.teachers.teachers import Teacher, Teachers, teacher_shares, teacher_streams
from kernels import Projected, linear_ensemble_kl

B, L, V = 3, 12, 61
ALPHA, TEMPERATURE = 0.5, 2.0
TOKENS = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(5))
STUDENT = StudentConfig("s", 2, 24, 2, 40, tied=False)
TEACHERS = [
    StudentConfig("gpt2", 2, 32, 4, 64, family="gpt2", max_length=L),
    StudentConfig("llama", 1, 48, 4, 56, kv_heads=2, tied=False),
]


def random_model(config: StudentConfig, seed: int) -> LanguageModel:
    model, generator = new_model(shape_of(config, V)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def papers_loss(student_BLV: Tensor, teachers_BLV: list[Tensor], labels_BL: Tensor, reduction: str) -> Tensor:
    """Returns the loss as `DistillationTrainer.compute_loss` of Timiryasov & Tastet's script has it.

    Its reduction is "sequence"; "token" differs in the divergence alone.
    """
    shifted = student_BLV[:, :-1].reshape(-1, V)
    student_loss = F.cross_entropy(shifted, labels_BL[:, 1:].reshape(-1))
    averaged = torch.stack(teachers_BLV).mean(0)
    log_q = F.log_softmax(student_BLV / TEMPERATURE, dim=-1)
    p = F.softmax(averaged / TEMPERATURE, dim=-1)
    if reduction == "sequence":
        kl = F.kl_div(log_q, p, reduction="batchmean")
    else:  # per token, where there is a label
        kl = F.kl_div(log_q[:, :-1].reshape(-1, V), p[:, :-1].reshape(-1, V), reduction="batchmean")
    return ALPHA * student_loss + (1 - ALPHA) * TEMPERATURE**2 * kl


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_loss_and_gradients_equal_the_papers(count: int, reduction: str) -> None:
    student, teachers = (
        random_model(STUDENT, 0),
        [random_model(config, seed) for seed, config in enumerate(TEACHERS[:count], 1)],
    )
    objective = ObjectiveConfig(
        ce_weight=ALPHA,
        teacher_weight=1 - ALPHA,
        temperature=TEMPERATURE,
        reduction=reduction,  # pyright: ignore[reportArgumentType]
        kl_everywhere=reduction == "sequence",
    )
    config = Config((STUDENT,), tuple(TeacherConfig(t.name) for t in TEACHERS[:count]), objective=objective)
    targets_BL = torch.cat([TOKENS[:, 1:], torch.full((B, 1), IGNORED)], dim=1)
    everywhere = torch.ones(B * L, dtype=torch.bool) if objective.kl_everywhere else None
    batch = Batch(TOKENS, targets_BL.flatten(), kl_mask_N=everywhere)
    streams = Teachers(*teacher_streams(config), [Teacher(t) for t in teachers], teacher_shares(config))
    coefficients = LossWeighting(objective, 1, torch.device("cpu"), streams.weights, L - 1).coefficients()
    hidden_ND = student(TOKENS)
    result = linear_ensemble_kl(
        [Projected(hidden_ND, student.head)],
        streams(batch),
        batch.targets_N,
        ce_weight=coefficients.ce_weight,
        kl_weight=coefficients.kl_weight,
        normalizer=B * (L - 1),
        temperature=coefficients.temperature,
        divergence=coefficients.divergence,
        kl_mask=batch.kl_mask_N,
        ignore_index=IGNORED,
    )
    result.losses[0].backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    student.zero_grad()
    with torch.no_grad():
        taught = [(t(TOKENS) @ t.head.T).view(B, L, V) for t in teachers]
    expected = papers_loss((student(TOKENS) @ student.head.T).view(B, L, V), taught, TOKENS, reduction)
    expected.backward()
    assert result.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_one_concatenated_head_is_the_weighted_mean_of_raw_logits() -> None:
    teachers = [random_model(config, seed) for seed, config in enumerate(TEACHERS)]
    config = Config((STUDENT,), (TeacherConfig("a/x"), TeacherConfig("b/y", weight=3.0)))
    frozen = [Teacher(model) for model in teachers]
    streams = Teachers(*teacher_streams(config), frozen, teacher_shares(config))
    ((hidden_ND, weight_VD, _),) = streams(Batch(TOKENS, TOKENS.flatten()))
    with torch.no_grad():
        first, second = (t(TOKENS) @ t.head.T for t in teachers)
    torch.testing.assert_close(hidden_ND @ weight_VD.T, 0.25 * first + 0.75 * second, rtol=1e-5, atol=1e-4)
