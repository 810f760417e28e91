"""The rule itself can fail, and the driver looks at everything it says it does."""

import pytest
import torch

from tests import numerics
from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op, lay_out
from tests.op_contract import assert_repeatable, assert_same_bits, saved_bytes


@pytest.fixture(autouse=True)
def findings_of_real_ops_alone(monkeypatch):
    monkeypatch.setattr(numerics, "worst", {})


def _exact(n: int = 4096) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_once_passes_and_three_ulps_fail(dtype):
    exact = _exact()
    rounded = exact.to(dtype)
    assert_no_worse_than_torch(rounded, rounded, exact, what="rounding.out")
    worse = rounded.clone()
    peak = exact.abs().argmax()
    worse[peak] += 3 * torch.finfo(dtype).eps * exact[peak].abs()
    with pytest.raises(AssertionError, match=rf"max error .* at \[{peak}\]"):
        assert_no_worse_than_torch(worse, rounded, exact, what="rounding.out")


def test_noise_within_the_largest_error_fails_by_rms():
    exact = _exact()
    rounded = exact.to(torch.bfloat16)
    noise = 0.008 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_no_worse_than_torch((exact + noise).to(torch.bfloat16), rounded, exact, what="noise.out")


def test_a_bias_smaller_than_any_rounding_error_fails_by_mean():
    exact = _exact(2**16)
    rounded = exact.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="mean error"):
        assert_no_worse_than_torch((exact + 2e-4).to(torch.bfloat16), rounded, exact, what="bias.out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_nan_and_infinity_only_where_exact_has_them(value):
    exact = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 1e6], dtype=torch.float64)
    rounded = exact.half()
    assert rounded[-1].isinf()
    assert_no_worse_than_torch(rounded, rounded, exact, what="special.out")
    for i in range(len(exact)):
        wrong = rounded.clone()
        wrong[i] = value
        if not torch.equal(wrong.nan_to_num(-7), rounded.nan_to_num(-7)):
            with pytest.raises(AssertionError, match=rf"\[{i}\]"):
                assert_no_worse_than_torch(wrong, rounded, exact, what="special.out")


def test_an_overflowing_reference_excuses_nothing():
    exact = torch.tensor([1.0, 3.0], dtype=torch.float64)
    reference = torch.tensor([1.0, float("inf")], dtype=torch.float16)
    assert_no_worse_than_torch(exact.half(), reference, exact, what="overflow.out")
    with pytest.raises(AssertionError, match=r"largest at \[1\]: 4, exact 3"):
        assert_no_worse_than_torch(torch.tensor([1.0, 4.0]).half(), reference, exact, what="overflow.out")


@pytest.mark.parametrize("layout", DOUT_LAYOUTS)
def test_layouts_differ_in_strides_alone(layout):
    values = torch.randn(3, 5, 4)
    laid = lay_out(values, layout)
    assert laid.shape == values.shape
    if layout.startswith("expanded"):
        assert 0 in laid.stride()
    else:
        assert torch.equal(laid, values)
        assert laid.is_contiguous() == (layout in ("contiguous", "offset"))
        assert (laid.data_ptr() % 16 != 0) == (layout == "offset")


class _Product(torch.autograd.Function):
    """x * weight; `flaw` spoils one thing the driver must see."""

    @staticmethod
    def forward(ctx, x, weight, flaw):
        ctx.save_for_backward(x, weight)
        ctx.flaw = flaw
        if flaw == "input":
            x.data[0, 0] = 7
        return x * weight * (1.01 if flaw == "out" else 1)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        if ctx.flaw == "strides":
            dout = dout.as_strided(dout.shape, torch.empty(dout.shape).stride())
        dx = dout * weight * (1.01 if ctx.flaw == "dx" else 1)
        return dx, (dout * x).sum(0) * (1.01 if ctx.flaw == "dweight" else 1), None


@pytest.mark.parametrize("flaw", ["none", "out", "dx", "dweight", "strides", "input"])
def test_driver_sees_outputs_every_gradient_strides_and_inputs(flaw):
    def product(x, weight):
        return _Product.apply(x, weight, flaw)

    inputs = {"x": torch.randn(6, 5), "weight": torch.randn(5)}

    def check():
        check_op(product, lambda x, weight: x * weight, inputs, layouts=DOUT_LAYOUTS, name="product")

    if flaw == "none":
        check()
    else:
        expected = {"strides": r"product\.d\w+ \(dout transposed\)", "input": "product"}.get(flaw, rf"product\.{flaw} ")
        with pytest.raises(AssertionError, match=expected):
            check()


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(8, 4, requires_grad=True)
    assert saved_bytes(lambda: x.exp() + x.exp()) == 2 * 128
    assert saved_bytes(lambda: (x * x)[:, :2] * x[0, 0]) == 128 + 128
    assert saved_bytes(lambda: x.sin().cos(), besides=[x]) == 128


def test_bit_comparison_tells_zeros_and_runs_apart():
    assert_same_bits([torch.tensor([float("nan")])], [torch.tensor([float("nan")])], what="nan")
    with pytest.raises(AssertionError, match="1 bytes"):
        assert_same_bits([torch.tensor([0.0])], [torch.tensor([-0.0])], what="zero")
    counter = iter(range(3))
    with pytest.raises(AssertionError, match="a second run"):
        assert_repeatable(lambda: [torch.tensor([next(counter)])])
