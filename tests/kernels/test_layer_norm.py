"""LayerNorm. Incidents by number: research on what went wrong in other people's kernels, one test each."""

import importlib
from dataclasses import replace

import pytest
import torch
from xiangxin_kernels import layer_norm, layer_norm_ref

from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op
from tests.op_contract import (
    assert_compiles_without_clones,
    assert_program_order_free,
    assert_repeatable,
    assert_same_bits,
    saved_bytes,
)

kernel_file = importlib.import_module("xiangxin_kernels.layer_norm")

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Eight programs in the backward, so that at a few dozen rows each has several and the last rounds are ragged."""
    choose = kernel_file.choose_layer_norm
    monkeypatch.setattr(kernel_file, "choose_layer_norm", lambda *a: replace(choose(*a), bwd_programs=8))


def _inputs(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5, std: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * std + mean
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}


def _run(x, weight, bias, dout=None):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = layer_norm(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dout is None else dout)]


# Rows: one, fewer and more than programs, no multiple of them. Columns: a head's, a ragged 100, Phi's, one, three.
@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C"), [(1, 80), (37, 100), (3, 2560)])
def test_output_and_gradients(N, C, dtype):
    check_op(layer_norm, layer_norm_ref, _inputs(N, C, dtype=dtype))


@interpreter
@pytest.mark.parametrize(("N", "C"), [(37, 1), (37, 3), (113, 80)])
def test_output_and_gradients_at_odd_sizes(N, C):
    check_op(layer_norm, layer_norm_ref, _inputs(N, C, dtype=torch.bfloat16))


@interpreter
@pytest.mark.parametrize("shape", [(0, 80), (2, 0, 80)])
def test_empty_batch(shape):
    y, dx, dweight, dbias = _run(**_inputs(*shape))
    assert y.shape == dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()


@interpreter
def test_incident_8_rows_are_summed_in_fp32():
    """Liger 950: in bf16 256 + 1 is 256. Here a program meets 256 first and then ones."""
    inputs = _inputs(17, 3, dtype=torch.bfloat16)
    dout = torch.ones(17, 3, dtype=torch.bfloat16)
    dout[0] = 256
    *_, dbias = _run(**inputs, dout=dout)
    assert dbias.tolist() == [272, 272, 272]


@interpreter
@pytest.mark.slow
def test_incident_8_four_thousand_rows():
    check_op(layer_norm, layer_norm_ref, _inputs(4096, 100, dtype=torch.bfloat16))


@interpreter
@pytest.mark.parametrize("C", [3, 80, 100])
def test_incident_9_padded_lanes_stay_out_of_the_variance(C):
    """triton 9838: lanes past the last column, at distance mean from the mean, count for nothing."""
    check_op(layer_norm, layer_norm_ref, _inputs(5, C, mean=100.0), wrt=["x"])


@interpreter
@pytest.mark.parametrize("C", [80, 2560])
def test_incident_10_no_cancellation_far_from_zero(C):
    check_op(layer_norm, layer_norm_ref, _inputs(9, C, mean=1e4, std=1e-3), name="layer_norm far from zero")


@interpreter
@pytest.mark.parametrize("value", [0.0, 1e4 / 3, -65504.0])
def test_incident_10_constant_rows_give_the_bias(value):
    inputs = _inputs(3, 100)
    inputs["x"] = torch.full_like(inputs["x"], value)
    y, mean, _ = kernel_file.layer_norm_forward(*inputs.values(), 1e-5)
    torch.testing.assert_close(y, inputs["bias"].expand(3, 100), rtol=0, atol=1e-6)
    assert_same_bits([mean], [inputs["x"][:, 0]], what="mean of a constant row")
    check_op(layer_norm, layer_norm_ref, inputs, name="layer_norm constant rows")


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incident_13_any_strides_of_dout(dtype):
    check_op(layer_norm, layer_norm_ref, _inputs(2, 3, 80, dtype=dtype), layouts=DOUT_LAYOUTS)


@interpreter
def test_any_strides_of_the_inputs():
    """Rows of a wider buffer are read in place; a strided last axis and a strided weight are copied."""
    inputs = _inputs(2, 3, 80)
    expected = _run(**inputs)
    wide = torch.cat([inputs["x"], inputs["x"]], dim=-1)[..., 80:]
    strided = torch.stack([inputs["x"], inputs["x"]], dim=-1)[..., 1]
    weight = torch.stack([inputs["weight"], inputs["bias"]], dim=-1)[:, 0]
    for x in (wide, strided, inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same_bits(_run(x, weight, inputs["bias"]), expected, what=f"strides {x.stride()}")


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_gradient_is_added_in_fp32(dtype):
    inputs = _inputs(11, 100, dtype=dtype)
    dout, dresidual = torch.randn(2, 11, 100).to(dtype)

    def dx_in(dtype):
        x, weight, bias = (t.to(dtype) for t in inputs.values())
        x.requires_grad_()
        (dx,) = torch.autograd.grad(layer_norm_ref(x, weight, bias), x, dout.to(dtype))
        return dx + dresidual.to(dtype)

    _, mean, rstd = kernel_file.layer_norm_forward(*inputs.values(), 1e-5)
    dx, _, _ = kernel_file.layer_norm_backward(dout, inputs["x"], inputs["weight"], mean, rstd, dresidual)
    assert_no_worse_than_torch(dx, dx_in(dtype), dx_in(torch.float64), what="layer_norm.dx + dresidual")


@interpreter
def test_a_row_depends_on_itself_alone():
    inputs = _inputs(5, 80)
    y, dx, _, _ = _run(**inputs)
    alone, dx_alone, _, _ = _run(inputs["x"][3:4], inputs["weight"], inputs["bias"])
    assert_same_bits([y[3:4], dx[3:4]], [alone, dx_alone], what="a row alone")
    inputs["x"][1, 7] = float("nan")
    spoilt, dx_spoilt, _, _ = _run(**inputs)
    others = [0, 2, 3, 4]
    assert spoilt[1].isnan().all()
    assert_same_bits([spoilt[others], dx_spoilt[others]], [y[others], dx[others]], what="beside a NaN")


@interpreter
def test_rows_beyond_two_to_the_31_elements(tmp_path):
    """The stride fits 32 bits, its product with the row does not. A sparse file stands in for the memory."""
    stride, C = 2**30 + 2**20, 80
    size = 2 * stride + C
    backing = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.bfloat16)
    inputs = _inputs(3, C, dtype=torch.bfloat16)
    far = backing.as_strided((3, C), (stride, 1))
    far.copy_(inputs["x"])
    expected = _run(**inputs)
    assert_same_bits(_run(far, inputs["weight"], inputs["bias"]), expected, what="far rows read")

    x, weight, bias = inputs.values()
    _, mean, rstd = kernel_file.layer_norm_forward(x, weight, bias, 1e-5)
    kernel_file._layer_norm_fwd(x, weight, bias, far, mean, rstd, 1e-5)
    assert_same_bits([far], expected[:1], what="far rows written")
    dout, partial = torch.ones_like(x), torch.empty(2, 3, C)
    kernel_file._layer_norm_bwd(dout, x, weight, mean, rstd, None, far, partial)
    assert_same_bits([far], expected[1:2], what="far gradient rows written")


@interpreter
def test_same_bits_every_time_in_any_program_order():
    inputs = _inputs(37, 100, dtype=torch.bfloat16)
    dout = torch.randn(37, 100).bfloat16()
    assert_repeatable(lambda: _run(**inputs, dout=dout))
    assert_program_order_free(lambda: _run(**inputs, dout=dout))


@interpreter
def test_saves_its_input_and_two_statistics_a_row():
    inputs = {name: x.requires_grad_() for name, x in _inputs(37, 100, dtype=torch.bfloat16).items()}
    saved = saved_bytes(lambda: layer_norm(**inputs), besides=[inputs["weight"]])
    assert saved == 37 * (100 * 2 + 2 * 4)


@interpreter
def test_op_contract():
    x, weight, bias = _inputs(5, 80, dtype=torch.bfloat16).values()
    wide = torch.cat([x, x], dim=-1)[:, 80:]
    mean, rstd = torch.zeros(5), torch.ones(5)
    for rows in (x, wide):
        arguments = (rows, weight, bias, torch.empty_like(x), mean.clone(), rstd.clone(), 1e-5)
        torch.library.opcheck(kernel_file._layer_norm_fwd, arguments)
        for dresidual in (None, x.clone()):
            arguments = (x.clone(), rows, weight, mean, rstd, dresidual, torch.empty_like(x), torch.empty(2, 4, 80))
            torch.library.opcheck(kernel_file._layer_norm_bwd, arguments)


@interpreter
def test_compiles_whole_and_without_copies():
    x, weight, bias = (t.requires_grad_() for t in _inputs(2, 3, 80).values())
    assert_compiles_without_clones(lambda x, w, b: layer_norm(x, w, b) * 2 + x, x, weight, bias)


@interpreter
def test_second_derivatives_are_refused():
    x, weight, bias = (t.requires_grad_() for t in _inputs(2, 8).values())
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@interpreter
def test_mixed_dtypes_are_refused():
    x, weight, bias = _inputs(2, 8).values()
    with pytest.raises(ValueError, match=r"layer_norm: expected weight in torch\.bfloat16 like x"):
        layer_norm(x.bfloat16(), weight, bias)
    with pytest.raises(ValueError, match="expected x in float32, float16 or bfloat16"):
        layer_norm(x.double(), weight, bias)


def test_cpu_path_is_the_specification_in_every_dtype():
    for dtype in (*DTYPES, torch.float64):
        inputs = _inputs(5, 100, dtype=dtype)
        assert_same_bits([layer_norm(**inputs)], [layer_norm_ref(**inputs)], what=str(dtype))


@pytest.mark.parametrize(("name", "size"), [("weight", 7), ("bias", 9)])
def test_wrong_shapes_are_named(name, size):
    inputs = _inputs(2, 8)
    inputs[name] = torch.ones(size)
    with pytest.raises(ValueError, match=rf"layer_norm: expected {name} \[8\], got \[{size}\]"):
        layer_norm(**inputs)
