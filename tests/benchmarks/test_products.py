"""The products of a step, counted in the step itself."""

from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks import throughput
from benchmarks.cases import Case
from benchmarks.gate import Gate, Over
from benchmarks.products import step_products

CPU = torch.device("cpu")


class Counted(Gate):
    """Lets one step pass, and counts what its products cost."""

    def __init__(self) -> None:
        super().__init__(Pipe()[0])
        in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1]}
        self.counter = FlopCounterMode(display=False, custom_mapping=in_place)  # of its own it knows `addmm` alone

    def between(self, steps: Iterator[Any]) -> Iterator[Any]:
        with self.counter:
            yield next(steps)
        raise Over


def flops(case: Case) -> int:
    """Of the products as they are listed."""
    train = case.config.train
    sizes = (train.batch, train.length, CPU)
    listed = [product for shape in case.student_shapes for product in step_products(shape, *sizes)]
    for shape in throughput.teacher_shapes(case):
        listed += step_products(shape, *sizes, backward=False)
    return sum(2 * out.numel() * left.shape[-1] for left, _, out in listed)


@pytest.mark.parametrize("variant", ["ours", "products"])
def test_products_are_those_of_the_step(variant: str, make_case: Callable[..., Case], answers: object):
    case, gate = make_case("distil", 3, 2), Counted()
    with kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), pytest.raises(Over):
        throughput.VARIANTS[variant].run(case, gate)
    assert flops(case) == gate.counter.get_total_flops()
