import pytest

import kernels
from kernels import native


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """The backend in force during the test: every one that runs on a CPU."""
    if request.param == "native" and (problem := native.problem()):
        pytest.skip(problem)
    with kernels.backend(request.param):
        yield request.param
