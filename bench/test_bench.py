"""Every op that a CPU runs, forward and with its backward, beside the plain torch it is specified by: `pytest bench/`.

Shapes are the demo model's, so that all of it takes seconds: what it tells is whether a change made an op's CPU path
slower, by pytest-benchmark's --benchmark-save and --benchmark-compare. `python -m bench OP` measures at Phi's shapes.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from xiangxin_fast.config import PhiConfig

from .case import Case, Run, Shape, make_inputs, of_inputs
from .cases import CASES
from .peers import reference
from .runner import OURS, check

CPU = torch.device("cpu")
SHAPE = Shape(PhiConfig.from_preset("demo"), 1, 64)
PROVIDERS = {OURS: lambda case: of_inputs(case.ours), "torch": lambda case: reference}
ON_A_CPU = [case for case in CASES.values() if case.composite]
TIMED = [pytest.param(case, mode, id=f"{case.op}-{mode}") for case in ON_A_CPU for mode in case.modes if mode != "bwd"]


def _step(run: Run, mode: str) -> Callable[[], object]:
    if mode == "fwd":
        return run.forward
    dout: Tensor = torch.ones_like(run.forward())
    return lambda: torch.autograd.grad(run.forward(), run.leaves, dout)


@pytest.mark.parametrize("case", ON_A_CPU, ids=lambda case: case.op)
def test_an_op_that_is_timed_is_right(case: Case):
    assert check(case, SHAPE, CPU, torch.float32, lambda record: None)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "mode"), TIMED)
@pytest.mark.benchmark(max_time=0.1, min_rounds=3)
def test_op(benchmark: BenchmarkFixture, case: Case, mode: str, provider: str):
    benchmark.group = f"{case.op} {mode}"
    run = PROVIDERS[provider](case)(case, make_inputs(case, SHAPE, CPU, torch.float32), SHAPE)
    benchmark(_step(run, mode))
