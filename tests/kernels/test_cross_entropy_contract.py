"""What cross-entropy keeps besides its numerics: strides, bits, memory, 64-bit addresses, no wait for the device."""

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder
from xiangxin_kernels import cross_entropy, linear_cross_entropy, linear_cross_entropy_ref
from xiangxin_kernels.cross_entropy import _cross_entropy_fwd, _cross_entropy_kernel

from tests.conftest import INTERPRET
from tests.kernels.cross_entropy_inputs import plain_problem, problem
from tests.op_contract import assert_compiles_without_clones, assert_program_order_free, assert_repeatable

pytestmark = [pytest.mark.interpreter] if INTERPRET else []
module = importlib.import_module("xiangxin_kernels.cross_entropy")


def test_strided_logits_and_padded_rows():
    inputs = plain_problem(7, 60)
    wide = torch.full((7, 100), float("nan"))
    wide[:, 20:80] = inputs["logits"]
    expected = cross_entropy(**inputs, reduction="none")
    for logits in (wide[:, 20:80], inputs["logits"].t().contiguous().t()):
        assert torch.equal(cross_entropy(logits, inputs["targets"], reduction="none"), expected)


@pytest.mark.parametrize("op", [linear_cross_entropy, cross_entropy])
def test_targets_of_any_strides(op):
    make = problem if op is linear_cross_entropy else plain_problem
    inputs = make(8, 60)
    first = next(iter(inputs))
    inputs[first].requires_grad_()
    targets = inputs.pop("targets")
    for given in (torch.stack([targets, targets.flip(0)], 1)[:, 0], targets[:1].clamp(min=3).expand(8)):
        for reduction in ("mean", "none"):
            losses = [op(**inputs, targets=t, reduction=reduction) for t in (given, given.contiguous())]
            assert torch.equal(*losses)
            assert torch.equal(*(torch.autograd.grad(loss.sum(), inputs[first])[0] for loss in losses))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_runs_and_programs_in_reverse_give_the_same_bits(reduction):
    inputs = problem(21, 301, dtype=torch.bfloat16)
    wrt = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]

    def run():
        loss = linear_cross_entropy(**inputs, reduction=reduction, chunk_rows=8)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), wrt)]

    assert_repeatable(run)
    if INTERPRET:
        assert_program_order_free(run)


def test_compiles_without_graph_breaks_or_clones():
    inputs = problem(9, 33)
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_()
    names = ("x", "weight", "bias", "targets")
    arguments = [inputs[name] for name in names]
    assert_compiles_without_clones(lambda *given: linear_cross_entropy(*given), *arguments)
    assert_compiles_without_clones(lambda *given: linear_cross_entropy(*given, reduction="none").sum(), *arguments)
    plain = plain_problem(9, 33)
    assert_compiles_without_clones(
        lambda *given: cross_entropy(*given), plain["logits"].requires_grad_(), plain["targets"]
    )


def test_the_ops_keep_their_contract():
    inputs = problem(5, 33)
    ops = torch.ops.xiangxin
    z, stats = torch.zeros(3, 33), [torch.zeros(5) for _ in range(3)]
    gradients = [torch.zeros_like(inputs[name]) for name in ("x", "weight", "bias")]
    given, options = tuple(inputs.values()), (-100, 0.0, 0.0)
    logits = torch.randn(5, 33)
    for op, arguments in (
        (ops.cross_entropy_fwd, (logits, inputs["targets"], *stats, *options)),
        (ops.cross_entropy_bwd, (logits, torch.zeros(5, 33), inputs["targets"], *stats, *options)),
        (ops.linear_cross_entropy_fwd, (*given, z, *stats, *gradients, *options)),
        (ops.linear_cross_entropy_bwd, (*given, z, *stats, *gradients, *options)),
    ):
        torch.library.opcheck(op.default, arguments)


class _Allocations(TorchDispatchMode):
    """The storages of all tensors that ops return, but those of `besides`; kept, so that none takes another's place."""

    def __init__(self, *besides: torch.Tensor):
        super().__init__()
        self.besides = {t.untyped_storage()._cdata for t in besides}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.besides:
                self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return out

    @property
    def sizes(self) -> list[int]:
        return [storage.nbytes() for storage in self.storages.values()]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_the_phi_shape_nothing_is_asked_of_the_device_or_larger_than_the_workspace(dtype, reduction, monkeypatch):
    """More than 256 MB has dW's fp32 accumulator alone, which in fp32 is dW itself. Meta tensors have no values, so
    that whatever waits for one (item, tolist, a bool) would fail."""
    N, C, V = 16384, 2560, 51200
    given = [torch.empty(s, device="meta", dtype=dtype, requires_grad=True) for s in ((N, C), (V, C), V)]
    targets = torch.empty(N, device="meta", dtype=torch.int64)
    chunks, in_place = module._chunks, []
    # As on a device: what lies behind the ops runs too, but for the kernel, which is told where to write.
    monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(module, "_rows", lambda z, dz, *rest: in_place.append(dz is None or dz is z))
    monkeypatch.setattr(module, "_linear_cross_entropy_fwd", lambda *a: chunks(*a[:8], None, *a[8:]))
    monkeypatch.setattr(module, "_linear_cross_entropy_bwd", lambda *a: chunks(*a[:7], None, *a[7:]))
    with _Allocations(*given) as allocations:
        loss = linear_cross_entropy(*given, targets, reduction=reduction)
        torch.autograd.grad(loss.sum(), given)
    assert [size for size in allocations.sizes if size > 256 * 2**20] == [V * C * 4]
    assert max(size for size in allocations.sizes if size != V * C * 4) > 128 * 2**20
    assert len(in_place) >= N * V * given[0].itemsize / (256 * 2**20)
    assert all(in_place)


@pytest.mark.skipif(INTERPRET, reason="counts what the torch path of the CPU allocates")
def test_scaled_down_nothing_of_the_size_of_the_logits_is_allocated(monkeypatch):
    """A mode does not see into an op: the chunks inside enter one of their own."""
    inputs = problem(4096, 2048, C=32)
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_()
    outside, inside, chunks = _Allocations(), _Allocations(), module._chunks

    def watched(*arguments):
        with inside:
            chunks(*arguments)

    monkeypatch.setattr(module, "_chunks", watched)
    with outside:
        linear_cross_entropy(**inputs, chunk_rows=256).backward()
    logits = 4096 * 2048 * 4
    assert inside.sizes
    assert max(inside.sizes + outside.sizes) <= logits / 8
    with outside:
        linear_cross_entropy_ref(**inputs).backward()
    assert max(outside.sizes) >= logits


@pytest.mark.skipif(INTERPRET, reason="the interpreter excludes the compiler")
def test_liger_1350_1358_1362_1364_no_scalar_is_widened_to_fp64():
    from bench import static, static_compile

    for job, made in static_compile.compile_all(static.jobs_of("cross_entropy")).items():
        assert all("tt.func" in compiled.ttir and "f64" not in compiled.ttir for compiled in made), str(job)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction):
    inputs = {key: x.cuda() for key, x in problem(300, 1000, dtype=torch.bfloat16).items()}
    wrt = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.autograd.grad(linear_cross_entropy(**inputs, reduction=reduction, chunk_rows=128).sum(), wrt)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(not INTERPRET, reason="the kernel's own addresses")
def test_liger_804_1248_rows_beyond_two_to_the_31_elements_are_addressed_in_64_bits(tmp_path, monkeypatch):
    """Row 41,944 of 51,200 logits passes 2^31 elements; a sparse file stands in for the 8 GB."""
    V, row = 51200, 42000
    file = tmp_path / "logits"
    with open(file, "wb") as sparse:
        sparse.truncate((row + 1) * V * 4)
    logits = torch.from_file(str(file), shared=True, size=(row + 1) * V, dtype=torch.float32).view(row + 1, V)
    logits[row, 17] = 3.0
    targets = torch.full((row + 1,), -100)
    targets[row] = 17
    peak, total, loss = (torch.zeros(row + 1) for _ in range(3))

    # Programs 0..row would touch every page of the file: only the last one runs.
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: setattr(self, "grid_idx", (row, 0, 0))
    )
    _cross_entropy_kernel[(1,)](
        logits, None, targets, peak, total, loss, None, V, 0, 0, V, -100, 0.0, 0.0,
        FORWARD=True, WRITE_DZ=False, SMOOTH=False, BLOCK_V=4096,
    )  # fmt: skip
    expected = math.log(V - 1 + math.exp(3.0)) - 3.0
    assert loss[row].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"expected x \[N, C\], got \[2, 3, 4\]"),
        ({"weight": torch.zeros(33, 7)}, r"expected weight \[V, 24\], got \[33, 7\]"),
        ({"bias": torch.zeros(5)}, r"expected bias \[33\], got \[5\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"expected targets \[9\], got \[4\]"),
        ({"targets": torch.zeros(9)}, r"expected targets of torch.int64, got torch.float32"),
        ({"reduction": "average"}, r"expected reduction mean, sum or none, got 'average'"),
        ({"chunk_rows": 0}, r"expected chunk_rows > 0, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**problem(9, 33), **change})


@pytest.mark.skipif(not INTERPRET, reason="what the kernel computes in")
@pytest.mark.parametrize("op", [linear_cross_entropy, cross_entropy])
def test_fp64_is_refused_where_it_would_be_computed_in_fp32(op):
    inputs = problem(9, 33) if op is linear_cross_entropy else plain_problem(9, 33)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    with pytest.raises(
        ValueError, match=f"{op.__name__}: expected .* in float32, float16 or bfloat16, got torch.float64"
    ):
        op(**wide)


def test_the_plain_op_does_not_write_its_logits():
    inputs = plain_problem(5, 33)
    version = inputs["logits"]._version
    peak, total, loss = (torch.zeros(5) for _ in range(3))
    _cross_entropy_fwd(inputs["logits"], inputs["targets"], peak, total, loss, -100, 0.0, 0.0)
    assert inputs["logits"]._version == version
    assert loss._version > 0
