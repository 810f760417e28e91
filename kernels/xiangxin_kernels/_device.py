"""Device helpers that more than one kernel file uses. Elementwise, on fp32."""

import triton
import triton.language as tl

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _gelu_gate(x):
    """s and 1 - s, where s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) and u = sqrt(2 / pi) (x + 0.044715 x^3).

    1 - s comes as e s, not as a difference, which for x > 2 would have no digits left. Bounding the exponent keeps e
    finite: far to the left e s would be infinity times zero.
    """
    z = x * (-2.0 * LOG2E * SQRT_2_OVER_PI) * (1.0 + GELU_CUBIC * x * x)
    e = tl.exp2(tl.minimum(z, 126.0))
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def gelu(x):
    """The tanh approximation of GELU ("gelu_new"), x s. Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2."""
    s, _ = _gelu_gate(x)
    return x * s


@triton.jit
def gelu_and_grad(x):
    """gelu(x) and its derivative s + 2 x s (1 - s) du/dx."""
    s, complement = _gelu_gate(x)
    slope = (2.0 * SQRT_2_OVER_PI) * (1.0 + 3.0 * GELU_CUBIC * x * x)
    return x * s, s + x * slope * s * complement


@triton.jit
def rotate_pairs(x, position, offs_n, cos_ptr, sin_ptr, SIGN: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """x [rows, columns] with its pairs of neighbours rotated by the angles of the rows' `position`, or back (SIGN -1).

    Of every D columns the first R rotate; offs_n are the columns. Neighbours lie in the registers of one thread.
    """
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    even = tl.min(tl.reshape(offs_n, [PAIRS, 2]), 1) % D
    angle = position[:, None] * (R // 2) + (even // 2)[None, :]
    rotary = tl.broadcast_to((even < R)[None, :], [ROWS, PAIRS])
    cos = tl.load(cos_ptr + angle, mask=rotary, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=rotary, other=0.0) * SIGN
    x1, x2 = tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    return tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), [ROWS, 2 * PAIRS])


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of program `pid`, in columns of GROUP_M tiles: programs that run together share operands in L2."""
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    local = pid - group * GROUP_M * tiles_n
    return first_m + local % size_m, local // size_m
