"""The interpreter's bf16: ours is right, and Triton's own is still wrong (else _interpret.py can go)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.op_contract import assert_program_order_free, assert_same_bits

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def patched():
    """The canary imports this file without it."""
    import xiangxin_kernels  # noqa: F401


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    out = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision="ieee")
    tl.store(out_ptr + offs, out)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _where_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.where(offs < 5, tl.load(x_ptr + offs, mask=offs < 3, other=-2.0), 1.5))


@triton.jit
def _add_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), x + x)


@triton.jit
def _less_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) < tl.load(y_ptr + offs))


@triton.jit
def _negate_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), -tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def _program_order_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_dot_takes_bf16_operands():
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_nearest_even(of, to):
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32).view(torch.float32)
    ties = (torch.arange(1, 512, dtype=torch.int32) * 2**15 + 0x3F800000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.39e38, 65504.0, 65520.0, 1e-40])
    x = torch.cat([bits, torch.randn(3575), ties, special, torch.zeros(1)]).to(of)
    out = torch.empty(x.numel(), dtype=to)
    _cast_kernel[(1,)](x, out, x.numel())
    assert_same_bits([out.nan_to_num(0.25)], [x.to(to).nan_to_num(0.25)], what=f"{of} to {to}")


def test_select_and_masked_loads_keep_bf16():
    x, out = torch.randn(8).bfloat16(), torch.empty(8, dtype=torch.bfloat16)
    _where_kernel[(1,)](x, out, 8)
    assert out.tolist() == [*x[:3].tolist(), -2.0, -2.0, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("kernel", [_add_kernel, _negate_kernel, _sum_kernel, _less_kernel])
def test_arithmetic_on_bf16_is_refused(kernel):
    x = torch.ones(8)
    inputs = [x] * (len(kernel.arg_names) - 2)
    kernel[(1,)](*inputs, torch.empty(8), 8)
    with pytest.raises(InterpreterError, match=r"no bf16 arithmetic in a kernel, convert with \.to\(tl\.float32\)"):
        kernel[(1,)](*[t.bfloat16() for t in inputs], torch.empty(8), 8)


def test_reversed_programs_show_a_race():
    def last_writer_wins():
        out = torch.empty(1)
        _program_order_kernel[(3,)](torch.arange(3.0), out, 1)
        return [out]

    assert last_writer_wins()[0].item() == 2
    with pytest.raises(AssertionError, match="programs in reverse order"):
        assert_program_order_free(last_writer_wins)


def _wrong_in_this_process() -> list[str]:
    """What the interpreter gets wrong on bf16 as it is, of: dot, rounding, add, compare."""
    a, b = torch.randn(2, 16, 16).bfloat16()
    product = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, product, 16)
    x = torch.tensor([2.5, 1.0 + 2**-8 + 2**-9, -5.0, 0.1]).float()
    rounded, doubled, less = torch.empty(4).bfloat16(), torch.empty(4).bfloat16(), torch.empty(4, dtype=torch.bool)
    _cast_kernel[(1,)](x, rounded, 4)
    _add_kernel[(1,)](x.bfloat16(), doubled, 4)
    _less_kernel[(1,)](x.bfloat16(), -x.bfloat16(), less, 4)
    right = {
        "dot": torch.allclose(product, a.float() @ b.float(), atol=1e-3),
        "rounding": torch.equal(rounded, x.bfloat16()),
        "add": torch.equal(doubled, 2 * x.bfloat16()),
        "compare": torch.equal(less, x.bfloat16() < -x.bfloat16()),
    }
    return [name for name, is_right in right.items() if not is_right]


def test_canary_triton_alone_still_computes_bf16_wrongly():
    """When this fails, Triton's interpreter has changed: shorten _interpret.py, or drop it."""
    script = f"from {__name__} import _wrong_in_this_process; print(*_wrong_in_this_process())"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["dot", "rounding", "add", "compare"], done.stderr
