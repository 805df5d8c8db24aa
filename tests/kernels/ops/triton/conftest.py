"""These tests run Triton kernels on a GPU, or in the interpreter, which a process must choose before it starts."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
runnable = importlib.util.find_spec("triton") is not None and (interpreted or torch.cuda.is_available())
collect_ignore_glob = [] if runnable else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _fast_interpreter() -> Iterator[None]:
    if not interpreted:
        yield
        return
    from benchmarks.traffic import prepared_once

    with prepared_once():
        yield
