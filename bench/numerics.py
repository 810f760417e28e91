"""The numerics rule: how far from the truth a result may lie.

With `exact` the fp64 result and `reference` what plain torch gives on the same inputs in the dtype under test, a result
passes when its error (result - exact) satisfies

    max  |error|   <=  2 max |reference's error|   + 1 ulp at max |exact|
    rms(error)     <=  2 rms(reference's error)    + 1/4 ulp at rms(exact)
    |mean(error)|  <=  2 |mean(reference's error)| + 4 rms / sqrt(n)          rms that of the larger error

The last floor is four standard errors of a mean of n independent errors: what unbiased rounding leaves, and a bias
exceeds. Tolerances are so measured on plain torch, never guessed. Where fp64, rounded to the dtype, is infinite or NaN,
the result must be so too, and nowhere else. Source of the factor 2: the tests of flash-attention (Dao et al.).
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
    def criterion(self) -> str:
        """The criterion nearest to its limit: "max", "RMS" or "mean"."""
        ratios = {"max": self.max_ratio, "RMS": self.rms_ratio, "mean": self.mean_ratio}
        return max(ratios, key=ratios.__getitem__)

    @property
    def ratio(self) -> float:
        return max(self.max_ratio, self.rms_ratio, self.mean_ratio)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Distance between neighbouring numbers of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    return math.ldexp(info.eps, math.frexp(max(magnitude, info.smallest_normal))[1] - 1)


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _index(flat: Tensor, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(flat, shape)]


def compare(actual: Tensor, reference: Tensor, exact: Tensor) -> Comparison:
    """Judges `actual` by the module's rule; `reference` has its shape and dtype, `exact` its shape in fp64.

    Raises ValueError when shapes or dtypes differ.
    """
    if not actual.shape == reference.shape == exact.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (actual, reference, exact))
        raise ValueError(f"compare: expected actual, reference and exact of one shape, got {shapes}")
    if actual.dtype != reference.dtype or exact.dtype != torch.float64:
        dtypes = f"{actual.dtype}, {reference.dtype} and {exact.dtype}"
        raise ValueError(f"compare: expected actual and reference of one dtype and exact in float64, got {dtypes}")
    actual, reference, exact = actual.detach(), reference.detach(), exact.detach()

    rounded = exact.to(actual.dtype)
    finite = rounded.isfinite()
    wrong = ~torch.where(finite, actual.isfinite(), actual.isclose(rounded, rtol=0, atol=0, equal_nan=True))
    if wrong.any():
        at = wrong.flatten().nonzero()[0, 0]
        values = f"{actual.flatten()[at].item()}, exact {exact.flatten()[at].item()}"
        worst = f"{int(wrong.sum())} elements wrongly finite or not, the first at {_index(at, wrong.shape)}: {values}"
        return Comparison(math.inf, math.inf, math.inf, worst)
    if not finite.any():
        return Comparison(0.0, 0.0, 0.0, "nothing finite to compare")

    truth = exact[finite]
    error = actual[finite].double() - truth
    # A reference that overflows where the exact result does not is no excuse for ours to be wrong there.
    plain = (reference.double() - exact)[finite & reference.isfinite()]
    plain = plain if plain.numel() else truth.new_zeros(1)
    scatter = max(_rms(error), _rms(plain)) / math.sqrt(error.numel())
    at = finite.flatten().nonzero()[error.abs().argmax(), 0]
    values = [t.flatten()[at].item() for t in (actual, exact, reference)]

    def ratio(measured: float, allowed: float) -> float:
        return measured / allowed if measured else 0.0

    return Comparison(
        max_ratio=ratio(_largest(error), 2 * _largest(plain) + ulp(actual.dtype, _largest(truth))),
        rms_ratio=ratio(_rms(error), 2 * _rms(plain) + 0.25 * ulp(actual.dtype, _rms(truth))),
        mean_ratio=ratio(abs(float(error.mean())), 2 * abs(float(plain.mean())) + 4 * scatter),
        worst="at {}: {:.6g}, exact {:.6g}, plain torch {:.6g}".format(_index(at, finite.shape), *values),
    )
