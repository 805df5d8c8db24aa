"""The controls that a search's students are compared with."""

from dataclasses import replace

import pytest

from benchmarks.studies.search import SPACE, random_cohort
from engine.search.students import Candidate, Space


@pytest.mark.parametrize("like", [(Candidate(2, 64, 4), Candidate(3, 32, 4)), (Candidate(2, 32, 4),) * 3])
def test_a_random_control_has_the_size_of_what_it_is_compared_with(like: tuple[Candidate, ...]) -> None:
    space = Space(
        replace(SPACE, hidden=(32, 48, 64, 80, 96), layers=(1, 2, 3, 4, 5, 6, 7), heads=(4, 3), vocabulary=500)
    )
    controls = [random_cohort(space, like, seed=seed) for seed in (1, 2)]
    size = sum(map(space.size, like))
    for control in controls:
        assert len(control) == len(like)
        assert sum(map(space.size, control)) == pytest.approx(size, rel=0.05)
    assert controls[0] != controls[1]
