"""Whether counts are those of a distribution."""

import math

from torch import Tensor


def assert_distributed(counts: Tensor, expected: Tensor) -> None:
    """Pearson's chi-square of counts against expected counts, bins of expected 0 apart, which must be empty.

    A right sampler fails at p = 1e-6: Wilson and Hilferty's normal approximation at 4.75 standard deviations. Seeds are
    fixed, so one that passes goes on passing.
    """
    counts, expected = counts.double().flatten(), expected.double().flatten()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    degrees = int(possible.sum()) - 1
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    limit = degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} of {degrees} degrees, at most {limit:.1f} expected"
