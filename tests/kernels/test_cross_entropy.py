"""Cross-entropy, plain and fused with the projection: the torch path, and in the interpreter the Triton kernel."""

import functools

import pytest
import torch
from xiangxin_kernels import cross_entropy, cross_entropy_ref, linear_cross_entropy, linear_cross_entropy_ref

from tests.conftest import INTERPRET
from tests.kernels.cross_entropy_inputs import FLOATS, confident, hostile, plain_problem, problem
from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op

pytestmark = [pytest.mark.interpreter] if INTERPRET else []


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


def check_losses_lse_and_gradients(inputs: dict) -> None:
    def reference(logits, targets):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy_ref(logits, targets, reduction="none"), wide.detach().logsumexp(1)

    check_op(
        lambda **given: cross_entropy(**given, reduction="none", return_lse=True),
        lambda **given: reference(**given),
        inputs,
        name="cross_entropy",
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_liger_1329_the_true_class_gradient_of_a_confident_model(p, dtype):
    """A true-class gradient read back from bf16 before the 1 was taken off was 100 % wrong at p = 0.999."""
    check_losses_lse_and_gradients(confident(37, 257, p, dtype))
    given = confident(37, 257, p, dtype)
    as_weight = {"x": torch.eye(37, dtype=dtype), "weight": given["logits"].t().contiguous()}

    def gradients(op, cast):
        x, weight = (t.to(cast).requires_grad_() for t in as_weight.values())
        return torch.autograd.grad(op(x, weight, None, given["targets"], reduction="sum"), (x, weight))

    found, plain = gradients(linear_cross_entropy, dtype), gradients(linear_cross_entropy_ref, dtype)
    exact = gradients(linear_cross_entropy_ref, torch.float64)
    for name, *tensors in zip(("dx", "dweight"), found, plain, exact, strict=True):
        assert_no_worse_than_torch(*tensors, what=f"linear_cross_entropy.{name}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "kind", ["uniform", "one-hot", "huge", "huge and near", "-inf columns", "-inf target", "+inf", "nan"]
)
def test_hostile_logits_hold_the_numerics_rule(kind, dtype):
    check_losses_lse_and_gradients(hostile(kind, dtype))


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


def test_a_bias_of_plus_infinity_is_nan_where_plain_torch_says_so():
    """A class of infinite logit: no loss is left, and no class but that one can be told apart."""
    inputs = problem(9, 40, ignored=0)
    inputs["bias"][7] = float("inf")

    def results(op, cast):
        leaves = {k: v.to(cast).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        loss = op(**leaves)
        return [loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in ("x", "weight", "bias")])]

    exact = results(linear_cross_entropy_ref, torch.float64)
    assert exact[0].isnan()
    found, plain = (results(op, torch.float32) for op in (linear_cross_entropy, linear_cross_entropy_ref))
    for name, *tensors in zip(("loss", "dx", "dweight", "dbias"), found, plain, exact, strict=True):
        assert_no_worse_than_torch(*tensors, what=f"linear_cross_entropy.{name}")


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
def test_an_ignore_index_beyond_the_vocabulary(op):
    make = problem if op is linear_cross_entropy else plain_problem
    inputs = make(7, 50)
    beyond = {**inputs, "targets": inputs["targets"].masked_fill(inputs["targets"] == -100, 99)}
    assert torch.equal(op(**beyond, ignore_index=99), op(**inputs))


@pytest.mark.parametrize("op", [linear_cross_entropy, cross_entropy])
def test_liger_496_680_1298_each_row_gets_its_own_upstream_gradient(op):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_1305_a_second_backward_gives_the_same_and_inputs_stay(dtype):
    """Also after a factor of 0, and after the first gradients were overwritten, as clipping does."""
    inputs = problem(9, 33, dtype=dtype)
    before = {key: x.clone() for key, x in inputs.items()}
    wrt = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    loss = linear_cross_entropy(**inputs, chunk_rows=4)
    assert not any(g.any() for g in torch.autograd.grad(0 * loss, wrt, retain_graph=True))
    given = torch.autograd.grad(loss, wrt, retain_graph=True)
    first = torch.autograd.grad(linear_cross_entropy(**inputs, chunk_rows=4), wrt)
    assert all(torch.equal(*pair) for pair in zip(given, first, strict=True))
    for g in given:
        g.zero_()
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
