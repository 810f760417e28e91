"""GELU-MLP: output and five gradients by every way of its products."""

import pytest
import torch
from xiangxin_kernels import gelu_mlp, gelu_mlp_ref

from tests.conftest import INTERPRET
from tests.kernels.block_inputs import use_way, with_other_strides
from tests.numerics import DOUT_LAYOUTS, check_op
from tests.op_contract import assert_compiles_without_clones, assert_program_order_free, assert_repeatable, saved_bytes

pytestmark = [pytest.mark.interpreter] if INTERPRET else []

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mlp_inputs(*rows: int, C: int = 24, F: int = 101, dtype: torch.dtype = torch.float32, size: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(C + F)
    shapes = {"x": (*rows, C), "w1": (F, C), "b1": (F,), "w2": (C, F), "b2": (C,)}
    scales = {"x": size, "w1": C**-0.5, "w2": F**-0.5, "b1": 0.1, "b2": 0.1}
    return {k: (scales[k] * torch.randn(shape, generator=generator)).to(dtype) for k, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["cublas", "pointers", "descriptors"])
def test_output_and_gradients(way, dtype, monkeypatch):
    if not INTERPRET and way != "cublas":
        pytest.skip("the ways differ in Triton alone")
    use_way(monkeypatch, way)
    check_op(gelu_mlp, gelu_mlp_ref, mlp_inputs(37, F=104 if way == "descriptors" else 101, dtype=dtype))


@pytest.mark.parametrize("rows", [(1,), (2, 113)])
def test_odd_sizes_and_any_strides_of_dout(rows):
    check_op(gelu_mlp, gelu_mlp_ref, mlp_inputs(*rows, C=33, F=65), layouts=DOUT_LAYOUTS)


@pytest.mark.parametrize("way", ["cublas", "pointers", "descriptors"])
def test_weights_of_any_strides(way, monkeypatch):
    """Conv1D of GPT-2 holds its weights as [in, out]."""
    if not INTERPRET and way != "cublas":
        pytest.skip("the ways differ in Triton alone")
    use_way(monkeypatch, way)
    check_op(gelu_mlp, gelu_mlp_ref, {k: with_other_strides(x) for k, x in mlp_inputs(19, F=40).items()})


def test_autocast_casts_fp32_parameters():
    inputs = {name: x.requires_grad_() for name, x in mlp_inputs(19).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gelu_mlp(**inputs)
    cast = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs.items()}
    expected = gelu_mlp(**cast)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, list(inputs.values()), y.detach())
    for g, exact in zip(found, torch.autograd.grad(expected, list(cast.values()), y.detach()), strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, exact.float())


def test_pre_activations_far_from_zero():
    """gelu' is 0 or 1 out there; a naive x (1 - tanh^2) u' is infinity times zero."""
    check_op(gelu_mlp, gelu_mlp_ref, mlp_inputs(19, C=8, F=64, dtype=torch.bfloat16, size=100.0))


def test_empty_batch():
    inputs = {name: x.requires_grad_() for name, x in mlp_inputs(0).items()}
    y = gelu_mlp(**inputs)
    assert y.shape == (0, 24)
    assert not any(g.any() for g in torch.autograd.grad(y, list(inputs.values()), torch.zeros_like(y)))


def test_two_runs_and_programs_in_reverse_give_the_same_bits():
    inputs = {name: x.requires_grad_() for name, x in mlp_inputs(70, dtype=torch.bfloat16).items()}

    def run():
        y = gelu_mlp(**inputs)
        return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), y.detach())]

    assert_repeatable(run)
    if INTERPRET:
        assert_program_order_free(run)


@pytest.mark.skipif(not INTERPRET, reason="what the Triton path alone promises")
def test_only_the_pre_activation_is_kept():
    inputs = {name: x.requires_grad_() for name, x in mlp_inputs(32, dtype=torch.bfloat16).items()}
    assert saved_bytes(lambda: gelu_mlp(**inputs), besides=inputs.values()) == 32 * 101 * 2


def test_compiles_without_graph_breaks_or_clones():
    assert_compiles_without_clones(gelu_mlp, *(x.requires_grad_() for x in mlp_inputs(9).values()))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"gelu_mlp: expected w2 \[24, 101\], got \[101, 24\]"):
        gelu_mlp(**{**mlp_inputs(3), "w2": torch.zeros(101, 24)})
    with pytest.raises(ValueError, match=r"gelu_mlp: expected b1 \[101\], got \[7\]"):
        gelu_mlp(**{**mlp_inputs(3), "b1": torch.zeros(7)})
