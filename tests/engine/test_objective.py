import pytest
import torch

from engine.config import ObjectiveConfig
from engine.objective import coefficients

CPU = torch.device("cpu")


@pytest.mark.parametrize("students", [2, 3, 8])
def test_peers_share_their_weight_equally(students: int) -> None:
    found = coefficients(ObjectiveConfig(ce=0.5, peers=1.5, temperature=2.0, divergence="jsd"), students, CPU)
    assert (found.temperature, found.divergence) == (2.0, "jsd")
    assert found.ce_weight.dtype == torch.float32
    assert found.ce_weight.tolist() == [0.5] * students
    weight_SR = found.kl_weight
    assert weight_SR is not None
    assert weight_SR.dtype == torch.float32
    assert weight_SR.shape == (students, students)
    assert weight_SR.diagonal().tolist() == [0.0] * students
    assert weight_SR.sum(dim=1).tolist() == pytest.approx([1.5] * students)
    assert len(weight_SR[~torch.eye(students, dtype=torch.bool)].unique()) == 1


def test_no_divergence_is_asked_for_where_nobody_learns_from_another() -> None:
    assert coefficients(ObjectiveConfig(), 1, CPU).kl_weight is None
    assert coefficients(ObjectiveConfig(peers=0.0), 3, CPU).kl_weight is None
    assert coefficients(ObjectiveConfig(), 1, CPU).ce_weight.tolist() == [1.0]
