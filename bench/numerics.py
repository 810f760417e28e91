"""The numerics rule: how far from the truth a result may lie.

With `exact` the fp64 result and `reference` what plain torch gives on the same inputs in the dtype under test, a result
passes when its error (result - exact) satisfies

    max  |error|   <=  2 max |reference's error|   + 1 ulp at max |exact|
    rms(error)     <=  2 rms(reference's error)    + 1/4 ulp at rms(exact)
    |mean(error)|  <=  2 |mean(reference's error)| + 4 rms(error) / sqrt(n)

The last floor is four standard errors of a mean of n independent errors: what unbiased rounding leaves, and a bias
exceeds. Tolerances are so measured on plain torch, never guessed. Source of the factor 2: the tests of flash-attention
(Dao et al.), which judge their kernels against PyTorch's own error.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Each ratio is an error over what the rule allows it; the result passes when none is above 1."""

    max_ratio: float
    rms_ratio: float
    mean_ratio: float
    worst: str  # where the largest error lies, and the values there

    @property
    def ratio(self) -> float:
        return max(self.max_ratio, self.rms_ratio, self.mean_ratio)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(magnitude, info.smallest_normal))[1] - 1
    return math.ldexp(info.eps, exponent)


def compare(actual: Tensor, reference: Tensor, exact: Tensor) -> Comparison:
    """Judges `actual` by the module's rule; `reference` has its shape and dtype, `exact` its shape in fp64.

    Where `exact` is not finite, `actual` must hold the very same value; elsewhere a NaN or infinity fails. Raises
    ValueError when shapes or dtypes differ.
    """
    if not actual.shape == reference.shape == exact.shape:
        shapes = [list(t.shape) for t in (actual, reference, exact)]
        raise ValueError(
            f"compare: expected equal shapes, got actual {shapes[0]}, reference {shapes[1]}, exact {shapes[2]}"
        )
    if actual.dtype != reference.dtype or exact.dtype != torch.float64:
        raise ValueError(
            f"compare: expected actual and reference of one dtype and exact in float64, "
            f"got {actual.dtype}, {reference.dtype}, {exact.dtype}"
        )
    if not actual.numel():
        return Comparison(0.0, 0.0, 0.0, "empty")
    actual, reference, exact = (t.detach().flatten() for t in (actual, reference, exact))
    finite = exact.isfinite()
    wrong = torch.where(finite, ~actual.isfinite(), ~actual.double().isclose(exact, rtol=0, atol=0, equal_nan=True))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        worst = f"{int(wrong.sum())} of {wrong.numel()} wrong about being finite, the first at flat index {i}: "
        return Comparison(math.inf, math.inf, math.inf, worst + f"{actual[i].item()}, exact {exact[i].item()}")
    zero = exact.new_zeros(())
    truth = torch.where(finite, exact, zero)
    error = torch.where(finite, actual.double() - truth, zero)
    plain = torch.where(finite, reference.double() - truth, zero)

    n = error.numel()
    rms, plain_rms, truth_rms = (float(t.norm()) / math.sqrt(n) for t in (error, plain, truth))
    i = int(error.abs().argmax())
    largest = float(error[i].abs())
    worst = f"flat index {i} of {n}: {actual[i].item():.6g}, exact {truth[i].item():.6g}, reference {reference[i].item():.6g}"

    def ratio(found: float, allowed: float) -> float:
        return 0.0 if found == 0 else math.inf if allowed == 0 else found / allowed

    return Comparison(
        max_ratio=ratio(largest, 2 * float(plain.abs().max()) + ulp(float(truth.abs().max()), actual.dtype)),
        rms_ratio=ratio(rms, 2 * plain_rms + 0.25 * ulp(truth_rms, actual.dtype)),
        mean_ratio=ratio(abs(float(error.mean())), 2 * abs(float(plain.mean())) + 4 * rms / math.sqrt(n)),
        worst=worst,
    )
