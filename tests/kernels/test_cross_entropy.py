"""Cross-entropy, plain and fused with the projection: the torch path, and in the interpreter the Triton kernel."""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder
from xiangxin_kernels import cross_entropy, cross_entropy_ref, linear_cross_entropy, linear_cross_entropy_ref
from xiangxin_kernels.cross_entropy import _cross_entropy_fwd, _cross_entropy_kernel

from tests.conftest import INTERPRET
from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op
from tests.op_contract import assert_compiles_without_clones, assert_program_order_free, assert_repeatable

pytestmark = [pytest.mark.interpreter] if INTERPRET else []

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    N: int, V: int, C: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0, ignored: float = 0.2
) -> dict:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return {
        "x": torch.randn(N, C, generator=generator).to(dtype),
        "weight": (torch.randn(V, C, generator=generator) / math.sqrt(C)).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "targets": targets,
    }


def plain_problem(N: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    given = problem(N, V, dtype=dtype, seed=seed)
    return {
        "logits": torch.nn.functional.linear(given["x"], given["weight"], given["bias"]),
        "targets": given["targets"],
    }


def confident(N: int, V: int, p: float, dtype: torch.dtype) -> dict:
    """Logits as a trained model's: the true class has probability p, give or take a little, and the others the rest."""
    targets = torch.arange(N) % V
    # Without noise all errors were one and the same rounding, and a mean over them a matter of luck.
    logits = 0.1 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(N), targets] += math.log(p / (1 - p) * max(V - 1, 1))
    return {"logits": logits.to(dtype), "targets": targets}


# V: 1 and 2 (nothing to choose, one bit), 31 and 257 (no multiple of a block), 4096 and 5000 (one block, two).
# N: one, a few, more than a chunk; enough targets that the errors at them, which dominate, do not pass or fail by luck.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 2), (127, 31), (29, 257), (29, 4096), (29, 5000)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_holds_the_numerics_rule(N, V, reduction, dtype):
    options = {"reduction": reduction}
    inputs = problem(N, V, dtype=dtype)
    check_op(
        lambda **given: linear_cross_entropy(**given, chunk_rows=16, **options),
        lambda **given: linear_cross_entropy_ref(**given, **options),
        inputs,
        layouts=DOUT_LAYOUTS if (V, reduction) == (257, "none") else ("contiguous",),
        name="linear_cross_entropy",
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options", [{"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "label_smoothing": 0.1}]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_z_loss_and_label_smoothing_hold_the_numerics_rule(options, reduction, dtype):
    for op, ref, inputs in (
        (cross_entropy, cross_entropy_ref, plain_problem(23, 301, dtype)),
        (linear_cross_entropy, linear_cross_entropy_ref, problem(23, 301, dtype=dtype)),
    ):
        check_op(
            lambda op=op, **given: op(**given, reduction=reduction, **options),
            lambda ref=ref, **given: ref(**given, reduction=reduction, **options),
            inputs,
            name=op.__name__,
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_liger_1329_the_true_class_gradient_of_a_confident_model(p, dtype):
    """A true-class gradient read back from bf16 before the 1 was taken off was 100 % wrong at p = 0.999."""
    check_op(
        lambda **given: cross_entropy(**given, reduction="none"),
        lambda **given: cross_entropy_ref(**given, reduction="none"),
        confident(37, 257, p, dtype),
        name="cross_entropy",
    )
    given = confident(37, 257, p, dtype)
    as_weight = {"x": torch.eye(37, dtype=dtype), "weight": given["logits"].t().contiguous()}

    def gradients(op, cast):
        x, weight = (t.to(cast).requires_grad_() for t in as_weight.values())
        return torch.autograd.grad(op(x, weight, None, given["targets"], reduction="sum"), (x, weight))

    found, plain = gradients(linear_cross_entropy, dtype), gradients(linear_cross_entropy_ref, dtype)
    exact = gradients(linear_cross_entropy_ref, torch.float64)
    for name, *tensors in zip(("dx", "dweight"), found, plain, exact, strict=True):
        assert_no_worse_than_torch(*tensors, what=f"linear_cross_entropy.{name}")


def hostile(kind: str, dtype: torch.dtype) -> dict:
    N, V = 19, 130
    inputs = plain_problem(N, V, dtype)
    targets = inputs["targets"].clamp(min=0)
    if kind == "uniform":
        inputs["logits"].zero_()
    elif kind == "one-hot":
        inputs["logits"] = torch.nn.functional.one_hot(targets, V).to(dtype) * 100
    elif kind == "huge":
        inputs["logits"] = (inputs["logits"].sign() * 1e4).to(dtype)
    elif kind == "huge and near":
        inputs["logits"] = (1e4 + inputs["logits"].float()).to(dtype)
    elif kind == "-inf columns":
        inputs["logits"][:, ::3] = float("-inf")
    elif kind == "-inf target":
        inputs["logits"][torch.arange(N), targets] = float("-inf")
    elif kind == "+inf":
        inputs["logits"][::2, 5] = float("inf")
    elif kind == "nan":
        inputs["logits"][::2, 7] = float("nan")
    return {**inputs, "targets": targets}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "kind", ["uniform", "one-hot", "huge", "huge and near", "-inf columns", "-inf target", "+inf", "nan"]
)
def test_hostile_logits_hold_the_numerics_rule(kind, dtype):
    check_op(
        lambda **given: cross_entropy(**given, reduction="none"),
        lambda **given: cross_entropy_ref(**given, reduction="none"),
        hostile(kind, dtype),
        name="cross_entropy",
    )


def test_a_bias_of_minus_infinity_removes_a_class():
    """Masked vocabulary rows leave loss and gradients finite, and get none (CCE 52: a bias path that no test took)."""
    inputs = problem(9, 40, ignored=0)
    inputs["targets"] = inputs["targets"].clamp(min=3)
    inputs["bias"][:3] = float("-inf")
    tensors = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    loss = linear_cross_entropy(**inputs)
    gradients = torch.autograd.grad(loss, tensors)
    assert all(g.isfinite().all() for g in (loss, *gradients))
    assert not gradients[1][:3].any()
    assert not gradients[2][:3].any()
    assert gradients[2][3:].any()


def test_z_loss_and_smoothing_change_the_loss():
    inputs = plain_problem(5, 11)
    plain = cross_entropy(**inputs)
    assert cross_entropy(**inputs, z_loss=0.1) > plain
    assert cross_entropy(**inputs, label_smoothing=0.1) != plain


@pytest.mark.parametrize("op", [linear_cross_entropy, cross_entropy])
def test_no_rows_and_no_valid_rows_give_zero_and_zero_gradients(op):
    """Mean over nothing is 0, not NaN (a batch without tokens: Megatron 3396)."""
    make = problem if op is linear_cross_entropy else plain_problem
    for inputs in (make(0, 50), {**make(6, 50), "targets": torch.full((6,), -100)}):
        for reduction in ("mean", "sum"):
            leaves = {key: x.requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()}
            loss = op(**leaves, reduction=reduction)
            wrt = [x for x in leaves.values() if x.requires_grad]
            assert loss == 0
            assert not any(g.any() for g in torch.autograd.grad(loss, wrt))


def test_one_valid_row_and_the_last_class():
    inputs = problem(33, 77)
    inputs["targets"] = torch.full((33,), -100)
    inputs["targets"][12] = 76
    check_op(linear_cross_entropy, linear_cross_entropy_ref, inputs)


def test_long_batches_cross_many_chunks():
    # The interpreter takes milliseconds a row, and rows do not know of each other: a tenth of them tells as much there.
    inputs = problem(409 if INTERPRET else 4097, 31, C=8, dtype=torch.bfloat16)
    check_op(
        lambda **given: linear_cross_entropy(**given, chunk_rows=100), linear_cross_entropy_ref, inputs,
        name="linear_cross_entropy",
    )  # fmt: skip


@pytest.mark.parametrize("target", [50, -1, 2**40])
def test_a_target_outside_the_vocabulary(target):
    """On a CPU an error that names it; on a device, which is not asked, NaN in that row and nowhere else."""
    inputs = plain_problem(6, 50)
    inputs["targets"] = inputs["targets"].clamp(min=0)
    inputs["targets"][4] = target
    if not INTERPRET:
        with pytest.raises(ValueError, match=rf"targets in 0..49 or -100, got {target} in row 4"):
            cross_entropy(**inputs)
        return
    logits = inputs["logits"].requires_grad_()
    loss = cross_entropy(**inputs, reduction="none")
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    for result in (loss, dlogits):
        bad = result[4].isnan()
        assert bad.all()
        assert result[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("op", [linear_cross_entropy, cross_entropy])
def test_liger_680_1298_each_row_gets_its_own_upstream_gradient(op):
    """Reduction "none" once used the first row's gradient for all: weights that differ by row must show."""
    inputs = problem(8, 20) if op is linear_cross_entropy else plain_problem(8, 20)
    first = next(iter(inputs))
    inputs[first].requires_grad_()
    inputs["targets"] = inputs["targets"].clamp(min=0)
    dout = torch.arange(8.0)
    (whole,) = torch.autograd.grad(op(**inputs, reduction="none"), inputs[first], dout)
    for row in range(8):
        only = torch.zeros(8)
        only[row] = dout[row]
        (part,) = torch.autograd.grad(op(**inputs, reduction="none"), inputs[first], only)
        assert torch.equal(part[row], whole[row])


@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("bias",), ("x", "bias"), ("x", "weight", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_liger_931_1157_any_subset_of_gradients(needs, reduction):
    inputs = problem(9, 33)
    options = {"reduction": reduction, "chunk_rows": 4}
    wrt = [inputs[name].requires_grad_() for name in needs]
    with torch.no_grad():
        assert not linear_cross_entropy(**inputs, **options).requires_grad
    loss = linear_cross_entropy(**inputs, **options)
    assert loss.requires_grad == bool(needs)
    if needs:
        everything = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        whole = torch.autograd.grad(
            linear_cross_entropy(**everything, **options).sum(), [everything[name] for name in needs]
        )
        for part, expected in zip(torch.autograd.grad(loss.sum(), wrt), whole, strict=True):
            assert torch.equal(part, expected)


def test_liger_502_1283_autocast_casts_fp32_parameters():
    inputs = problem(9, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**inputs)
    cast = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    assert torch.equal(loss, linear_cross_entropy(**cast))
    with pytest.raises(ValueError, match=r"expected weight of torch.bfloat16, got torch.float32"):
        linear_cross_entropy(**{**inputs, "x": inputs["x"].bfloat16()})


def test_liger_1305_a_second_backward_gives_the_same_and_inputs_stay():
    inputs = problem(9, 33)
    before = {key: x.clone() for key, x in inputs.items()}
    wrt = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    loss = linear_cross_entropy(**inputs, chunk_rows=4)
    first = [g.clone() for g in torch.autograd.grad(loss, wrt, retain_graph=True)]
    for g, again in zip(first, torch.autograd.grad(2 * loss, wrt), strict=True):
        assert torch.equal(2 * g, again)
    assert all(torch.equal(before[key], inputs[key]) for key in before)


def test_transformers_34191_accumulation_over_uneven_micro_batches_is_one_big_batch():
    """The sum over all valid tokens over their number, however they are split: not a mean of means."""
    for dtype in FLOATS:
        inputs = problem(40, 65, dtype=dtype, ignored=0.5)
        targets = inputs["targets"]
        count = (targets != -100).sum()

        def in_pieces(x, weight, bias, targets, op=linear_cross_entropy, count=count):
            pieces = [slice(0, 3), slice(3, 4), slice(4, 31), slice(31, 40)]
            return sum(op(x[p], weight, bias, targets[p], reduction="sum") for p in pieces) / count.to(torch.float32)

        names = ("x", "weight", "bias")

        def gradients(op, given, names=names):
            leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in given.items()}
            loss = op(**leaves)
            return [loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in names])]

        exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        found = gradients(in_pieces, inputs)
        # autograd rounds each piece's dW and db to the parameter's dtype as it adds them up, and so does plain torch's.
        same_dtype = gradients(functools.partial(in_pieces, op=linear_cross_entropy_ref), inputs)
        truth = gradients(linear_cross_entropy_ref, exact)
        for name, *tensors in zip(("loss", *names), found, same_dtype, truth, strict=True):
            assert_no_worse_than_torch(*tensors, what=f"linear_cross_entropy.{name} accumulated")


def test_cce_we_never_filter_small_gradients():
    """Gradients below 2^-12 count in pretraining; dropping them is what makes others fast."""
    inputs = confident(4, 257, 0.999, torch.float32)
    logits = inputs["logits"].requires_grad_()
    (dlogits,) = torch.autograd.grad(cross_entropy(**inputs, reduction="sum"), logits)
    assert dlogits.abs().min() < 2**-12
    assert (dlogits != 0).all()


def test_lse_and_per_token_losses_are_returned():
    inputs = problem(13, 40)
    losses, lse = linear_cross_entropy(**inputs, reduction="none", return_lse=True)
    z = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    assert_no_worse_than_torch(lse, z.logsumexp(1), z.double().logsumexp(1), what="linear_cross_entropy.lse")
    assert losses.shape == (13,)
    assert not lse.requires_grad
    assert torch.equal(losses[inputs["targets"] == -100], torch.zeros((inputs["targets"] == -100).sum()))


def test_strided_logits_and_padded_rows():
    inputs = plain_problem(7, 60)
    wide = torch.full((7, 100), float("nan"))
    wide[:, 20:80] = inputs["logits"]
    expected = cross_entropy(**inputs, reduction="none")
    for logits in (wide[:, 20:80], inputs["logits"].t().contiguous().t()):
        assert torch.equal(cross_entropy(logits, inputs["targets"], reduction="none"), expected)


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
    """The sizes in bytes of all tensors that ops return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


def test_at_the_phi_shape_nothing_larger_than_the_workspace_is_allocated():
    """Besides dW and its fp32 accumulator 256 MB at most, of which the chunk's logits are the largest."""
    N, C, V = 16384, 2560, 51200
    x, weight, bias = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in ((N, C), (V, C), V)
    )
    targets = torch.empty(N, device="meta", dtype=torch.int64)
    for reduction in ("mean", "none"):
        with _Allocations() as allocations:
            loss = linear_cross_entropy(x, weight, bias, targets, reduction=reduction)
            torch.autograd.grad(loss.sum(), (x, weight, bias))
        of_dw = {V * C * 2, V * C * 4}
        assert max(size for size in allocations.sizes if size not in of_dw) <= 256 * 2**20
        assert sum(size == V * C * 4 for size in allocations.sizes) == 1


@pytest.mark.skipif(INTERPRET, reason="counts what the torch path of the CPU allocates")
def test_scaled_down_nothing_of_the_size_of_the_logits_is_allocated():
    inputs = problem(4096, 2048, C=32)
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_()
    allocations = _Allocations()
    with allocations:
        linear_cross_entropy(**inputs, chunk_rows=256).backward()
    logits = 4096 * 2048 * 4
    assert max(allocations.sizes) <= logits / 8
    with allocations:
        linear_cross_entropy_ref(**inputs).backward()
    assert max(allocations.sizes) >= logits


@pytest.mark.skipif(not INTERPRET, reason="the kernel's own addresses")
def test_liger_804_rows_beyond_two_to_the_31_elements_are_addressed_in_64_bits(tmp_path, monkeypatch):
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


def test_the_plain_op_does_not_write_its_logits():
    inputs = plain_problem(5, 33)
    version = inputs["logits"]._version
    peak, total, loss = (torch.zeros(5) for _ in range(3))
    _cross_entropy_fwd(inputs["logits"], inputs["targets"], peak, total, loss, -100, 0.0, 0.0)
    assert inputs["logits"]._version == version
    assert loss._version > 0
