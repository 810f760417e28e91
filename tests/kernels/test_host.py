"""Registration of ops and checks of arguments."""

import pytest
import torch
from torch import Tensor
from xiangxin_kernels import _host, layer_norm
from xiangxin_kernels._host import as_rows, check_dtypes, kernel_op

from tests.op_contract import assert_compiles_without_clones


@kernel_op(mutates=("out", "spare"))
def _test_double(x: Tensor, out: Tensor, spare: Tensor | None) -> None:
    torch.mul(x, 2, out=out.data)  # behind autograd, as a kernel writes


def test_ops_bump_the_version_of_what_they_write_and_nothing_else():
    """Else autograd cannot see that a saved tensor was overwritten, and gives a wrong gradient in silence."""
    x, out = torch.ones(3), torch.zeros(3)
    _test_double(x, out, None)
    assert (x._version, out._version) == (0, 1)
    assert out.tolist() == [2, 2, 2]

    leaf = torch.ones(3, requires_grad=True)
    saved = leaf * 1
    loss = saved.square().sum()
    with torch.no_grad():
        _test_double(x, saved, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ops_write_inference_tensors():
    with torch.inference_mode():
        out = torch.zeros(3)
        _test_double(torch.ones(3), out, None)
    assert out.tolist() == [2, 2, 2]


def test_ops_write_slices_under_compile_without_copies():
    def halves(x):
        out = torch.empty(2 * x.shape[0], device=x.device)
        _test_double(x, out[: x.shape[0]], None)
        _test_double(x, out[x.shape[0] :], None)
        return out

    assert_compiles_without_clones(halves, torch.randn(4))


def test_compiled_results_are_right_where_aliases_and_old_values_are_read():

    def overwrites(x):
        y = x + 1
        z = y.view(2, 2)
        _test_double(x, y, None)
        return z.sum() + y.sum() + x.sum()

    def keeps(x):
        y = x + 1
        kept = y * 3
        _test_double(y, y, None)
        return kept + y

    for function in (overwrites, keeps):
        torch._dynamo.reset()
        expected = function(torch.ones(4))
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(torch.ones(4)), expected)


def test_launchers_have_no_default_values():
    def _with_default(x: Tensor, scale: float = 1.0) -> None: ...

    with pytest.raises(AssertionError, match="with_default: launchers take no default values"):
        kernel_op(mutates=("x",))(_with_default)


def test_rows_are_views_wherever_strides_allow():
    x = torch.randn(2, 3, 8)
    for view in (x, x[..., 2:6], x[:, :1], x.new_zeros(()).expand(2, 3, 8).transpose(0, 1)):
        rows = as_rows(view)
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
        assert rows.stride(1) == 1
    assert as_rows(x[..., 2:6]).data_ptr() == x[..., 2:6].data_ptr()
    assert as_rows(x[:0]).shape == (0, 8)
    assert as_rows(x.transpose(1, 2)).is_contiguous()


def test_dtypes_are_named():
    x = torch.ones(2)
    check_dtypes("op", x=x, y=x)
    with pytest.raises(ValueError, match=r"op: expected y in torch\.float32 like x, got torch\.float16"):
        check_dtypes("op", x=x, y=x.half())
    with pytest.raises(ValueError, match=r"op: expected x in float32, float16 or bfloat16, got torch\.int64"):
        check_dtypes("op", x=x.long())


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    other = _host._on_device(torch.device("cuda", 1))
    assert isinstance(other, torch.cuda.device)
    assert other.idx == 1
    for here in (torch.device("cuda", 0), torch.device("cpu")):
        assert not isinstance(_host._on_device(here), torch.cuda.device)


@pytest.mark.gpu
def test_a_launch_leaves_the_current_device_alone():
    last = torch.cuda.device_count() - 1
    x = torch.randn(4, 64, device=f"cuda:{last}")
    with torch.cuda.device(0):
        y = layer_norm(x, x[0], x[1], 1e-5)
        assert torch.cuda.current_device() == 0
    assert y.device == x.device
    assert y.isfinite().all()
