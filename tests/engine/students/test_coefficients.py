import pytest
import torch

from engine.config.settings import ObjectiveConfig
from engine.students.coefficients import LossCoefficients, LossWeighting

CPU = torch.device("cpu")


def coefficients(
    objective: ObjectiveConfig,
    students: int,
    *,
    omega_S: torch.Tensor | None = None,
    teachers: tuple[float, ...] = (),
    targets_per_sequence: int = 1,
) -> LossCoefficients:
    return LossWeighting(objective, students, CPU, teachers, targets_per_sequence).coefficients(omega_S)


@pytest.mark.parametrize("students", [2, 3, 8])
def test_peers_share_their_weight_equally(students: int) -> None:
    weights = coefficients(ObjectiveConfig(ce_weight=0.5, peer_weight=1.5, temperature=2.0, divergence="jsd"), students)
    assert (weights.temperature, weights.divergence) == (2.0, "jsd")
    assert weights.ce_weight.dtype == torch.float32
    assert weights.ce_weight.tolist() == [0.5] * students
    weight_SR = weights.kl_weight
    assert weight_SR is not None
    assert weight_SR.dtype == torch.float32
    assert weight_SR.shape == (students, students)
    assert weight_SR.diagonal().tolist() == [0.0] * students
    assert weight_SR.sum(dim=1).tolist() == pytest.approx([1.5] * students)
    assert len(weight_SR[~torch.eye(students, dtype=torch.bool)].unique()) == 1


def test_no_divergence_is_asked_for_where_nobody_learns_from_another() -> None:
    assert coefficients(ObjectiveConfig(), 1).kl_weight is None
    assert coefficients(ObjectiveConfig(peer_weight=0.0), 3).kl_weight is None
    assert coefficients(ObjectiveConfig(), 1).ce_weight.tolist() == [1.0]


def test_baby_llama_and_peers_and_teachers_at_once() -> None:
    alone = coefficients(ObjectiveConfig(ce_weight=0.5, teacher_weight=0.5), 1, teachers=(1.0,))
    assert alone.ce_weight.tolist() == [0.5]
    assert alone.kl_weight is not None
    assert alone.kl_weight.tolist() == [[0.0, 0.5]]
    settings = ObjectiveConfig(ce_weight=0.25, peer_weight=0.25, teacher_weight=0.5, reduction="sequence")
    together = coefficients(settings, 3, teachers=(0.25, 0.75), targets_per_sequence=128)
    assert together.kl_weight is not None
    expected = torch.full((3, 3), 0.125).fill_diagonal_(0)
    assert torch.equal(together.kl_weight, 128 * torch.cat([expected, torch.tensor([[0.125, 0.375]]).expand(3, -1)], 1))
    assert coefficients(ObjectiveConfig(peer_weight=0), 2, teachers=(1.0,)).kl_weight is not None


def test_weighted_mutual_learning_weighs_losses_by_the_students_and_divergences_by_the_peers():
    settings = ObjectiveConfig(ce_weight=0.4, peer_weight=0.6, weighted=True)
    weights = coefficients(settings, 3, omega_S=torch.tensor([0.5, 0.3, 0.2]))
    assert weights.kl_weight is not None
    torch.testing.assert_close(weights.ce_weight, torch.tensor([0.6, 0.36, 0.24]))
    torch.testing.assert_close(weights.kl_weight, torch.tensor([[0, 0.54, 0.36], [0.9, 0, 0.36], [0.9, 0.54, 0]]))
    beside = coefficients(settings, 3, omega_S=torch.ones(3) / 3, teachers=(1.0,)).kl_weight
    assert beside is not None
    assert beside[:, 3].tolist() == [1.0] * 3, "a teacher's weight is its own"
    torch.testing.assert_close(beside[0, :3], torch.tensor([0, 0.6, 0.6]))
