import pytest

import kernels
from kernels import native


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Runs the test under every backend that runs on a CPU."""
    if request.param == "native" and (problem := native.problem()):
        pytest.skip(problem)
    with kernels.backend(request.param):
        yield request.param
