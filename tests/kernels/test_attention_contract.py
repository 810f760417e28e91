"""What attention keeps besides its numerics: bits, layouts, offsets, tiles visited, errors, torch.compile."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from xiangxin_kernels import attention
from xiangxin_kernels._attention_fwd import _tile_and_head
from xiangxin_kernels.parallel_block import rotate_pairs_ref

from tests.conftest import INTERPRET
from tests.kernels.attention_inputs import documents, module, problem, rotary, use_tiles
from tests.numerics import assert_no_worse_than_torch, run_with_grads
from tests.op_contract import (
    assert_compiles_without_clones,
    assert_program_order_free,
    assert_repeatable,
    assert_same_bits,
    saved_bytes,
)

pytestmark = [pytest.mark.interpreter] if INTERPRET else []
triton_only = pytest.mark.interpreter

QKV = ("q", "k", "v")


def forward_and_backward(inputs: dict) -> list[Tensor]:
    """out, dq, dk, dv, given a fixed dout."""
    dout = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["q"].dtype)
    outputs, grads = run_with_grads(attention, inputs, QKV, [dout])
    return [*outputs, *grads.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time_and_in_any_order_of_programs(dtype, monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(33, dtype=dtype) | {"segment_ids": documents(1, 33)}
    (assert_program_order_free if INTERPRET else assert_repeatable)(lambda: forward_and_backward(inputs))


# The interpreter runs programs one by one: a second run says little there, and the reversed one is a second run too.
@triton_only
def test_same_bits_twice(monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(17, dtype=torch.float16)
    assert_repeatable(lambda: forward_and_backward(inputs))


@pytest.mark.parametrize("T", [17, 40])
def test_the_future_changes_no_bit_of_the_past(T, monkeypatch):
    use_tiles(monkeypatch, 16, 32)
    inputs = problem(T)
    past = attention(**inputs)
    for t in (1, 16):
        changed = inputs | {name: inputs[name].clone() for name in QKV}
        for name in QKV:
            changed[name][:, t:] = 1e3 * torch.randn(changed[name][:, t:].shape)
        assert_same_bits([attention(**changed)[:, :t]], [past[:, :t]], what=f"rows before {t}")


def test_another_document_changes_no_bit(monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(48) | {"segment_ids": (torch.arange(48) >= 20).long()[None]}
    both = forward_and_backward(inputs)
    first = inputs | {name: inputs[name].clone() for name in QKV}
    for name in QKV:
        first[name][:, :20] *= -3
    assert_same_bits([x[:, 20:] for x in forward_and_backward(first)], [x[:, 20:] for x in both], what="document 1")
    second = inputs | {name: inputs[name].clone() for name in QKV}
    for name in QKV:
        second[name][:, 20:] *= -3
    assert_same_bits([x[:, :20] for x in forward_and_backward(second)], [x[:, :20] for x in both], what="document 0")


@triton_only
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_that_nothing_sees_are_never_visited(packed, monkeypatch):
    """NaN in them would come through, since 0 * NaN is NaN: those above the diagonal, and those of other documents."""
    use_tiles(monkeypatch, 16, 16)
    clean = problem(64) | {"segment_ids": (torch.arange(64) >= 32).long()[None] if packed else None}
    inputs = clean | {name: clean[name].clone() for name in QKV}
    hidden = slice(0, 32) if packed else slice(32, 64)
    seen = slice(32, 64) if packed else slice(0, 32)
    for name in QKV:
        inputs[name][:, hidden] = math.nan
    expected = [x[:, seen] for x in forward_and_backward(clean)]
    got = [x[:, seen] for x in forward_and_backward(inputs)]
    # Without documents the keys of the first half are seen by all queries: dk and dv do change there.
    compared = slice(None) if packed else slice(0, 2)
    assert_same_bits(got[compared], expected[compared], what="the other half")


@triton_only
def test_slices_of_one_buffer_in_and_out(monkeypatch):
    """q, k, v and their gradients are columns of [N, 3C + F] buffers; out goes to columns of another, and to a copy."""
    use_tiles(monkeypatch, 16, 16)
    B, T, H, D = 2, 21, 2, 80
    C, F = H * D, 48
    given = problem(T, D, R=0, B=B, H=H)
    plain = forward_and_backward(given)

    def columns(buffer: Tensor, index: int) -> Tensor:
        return buffer[..., index * C : (index + 1) * C].unflatten(-1, (H, D))

    fused, gradients, z = (torch.full((B, T, 3 * C + F), math.nan) for _ in range(3))
    for index, name in enumerate(QKV):
        columns(fused, index).copy_(given[name])
    q, k, v, dq, dk, dv = (columns(buffer, index) for buffer in (fused, gradients) for index in range(3))
    out, lse, copy = torch.empty(B, T, H, D), torch.empty(B, H, T), columns(z, 1)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    module._attention_fwd(q, k, v, None, None, None, out, copy, lse, D**-0.5, 0)
    module._attention_bwd(
        q, k, v, copy, dout, lse, *[None] * 3, dq, dk, dv, torch.empty(2, B, H, T), None, None, D**-0.5, False
    )
    assert_same_bits([out, copy, dq, dk, dv], [plain[0], *plain], what="slices")
    for buffer, untouched in ((z, [0, 2]), (gradients, [])):
        assert buffer[..., 3 * C :].isnan().all()
        assert all(columns(buffer, index).isnan().all() for index in untouched)


@triton_only
@pytest.mark.parametrize("R", [32, 80])
def test_the_backward_rotates_pairs_back_and_sums_the_columns_of_each_tile(R, monkeypatch):
    use_tiles(monkeypatch, 16, 32)
    B, T, H, D = 2, 37, 2, 80
    q, k, v, cos, sin = problem(T, D, R, B=B, H=H).values()
    out, lse, delta, scale = torch.empty_like(q), torch.empty(B, H, T), torch.empty(2, B, H, T), D**-0.5
    module._attention_fwd(q, k, v, None, None, None, out, None, lse, scale, 0)

    def backward(cos, sin, *sums):
        grads = [torch.empty_like(q) for _ in QKV]
        module._attention_bwd(q, k, v, out, v, lse, cos, sin, None, *grads, delta, *sums, scale, True)
        return grads

    tiles_q, tiles_k = module.backward_tiles(q)
    assert (tiles_q, tiles_k) == (2 * 3, 2 * 2)
    sums_q, sums_k = torch.empty(tiles_q, H * D), torch.empty(2, tiles_k, H * D)
    unrotated, grads = backward(None, None, None, None), backward(cos, sin, sums_q, sums_k)
    assert_same_bits([grads[2]], [unrotated[2]], what="dv")
    back = [
        [
            torch.cat([rotate_pairs_ref(x[..., :R], cos.to(x), -sin.to(x)), x[..., R:]], dim=-1)
            for x in (grad, grad.double())
        ]
        for grad in unrotated[:2]
    ]
    for name, grad, (plain, exact) in zip("qk", grads, back, strict=False):
        assert_no_worse_than_torch(grad, plain, exact, what=f"attention.d{name} of pairs")
    for name, grad, sums, size in zip(QKV, grads, (sums_q, *sums_k), (16, 32, 32), strict=True):
        padded = torch.nn.functional.pad(grad.flatten(2), (0, 0, 0, -T % size)).unflatten(1, (-1, size))
        plain, exact = (x.sum(2).flatten(0, 1) for x in (padded, padded.double()))
        assert_no_worse_than_torch(sums, plain, exact, what=f"attention.d{name} summed")


@triton_only
@pytest.mark.parametrize("far", ["batch", "time", "head"])
def test_offsets_pass_2_to_the_31(far, tmp_path, monkeypatch):
    """All tensors interleaved in one sparse file: each passes 2^31 elements, through an index times a 32-bit stride."""
    use_tiles(monkeypatch, 128, 128)
    B, T, H, D = {"batch": (3, 2, 1, 16), "time": (1, 386, 1, 16), "head": (1, 2, 3, 16)}[far]
    step = 2**31 // 384 // 16 * 16 + 16 if far == "time" else 2**30 + 16
    assert step < module.MAX_STRIDE_T or far != "time"
    strides = {"batch": (step, 512, 256, 1), "time": (16, step, 16, 1), "head": (16, 512, step, 1)}[far]
    names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    size = sum((n - 1) * stride for n, stride in zip((B, T, H, D), strides, strict=True)) + 16 * len(names) + 1
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    x = {name: storage.as_strided((B, T, H, D), strides, 16 * i) for i, name in enumerate(names)}
    given = problem(T, D, R=0, B=B, H=H, dtype=torch.float16)
    plain = forward_and_backward(given)
    for name in QKV:
        x[name].copy_(given[name])
    x["dout"].copy_(torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1)))
    lse, delta = torch.empty(B, H, T), torch.empty(2, B, H, T)
    module._attention_fwd(x["q"], x["k"], x["v"], None, None, None, x["out"], None, lse, 0.25, 0)
    module._attention_bwd(
        *(x[name] for name in ("q", "k", "v", "out", "dout")), lse, None, None, None,
        *(x[name] for name in ("dq", "dk", "dv")), delta, None, None, 0.25, False,
    )  # fmt: skip
    assert_same_bits([x[name] for name in ("out", "dq", "dk", "dv")], plain, what=f"far apart along {far}")
    cos, sin = rotary(T, 16)
    rotated = torch.empty(B, T, H, D, dtype=torch.float16)
    module._attention_rotate(x["q"], cos, sin, x["out"])
    module._attention_rotate(given["q"], cos, sin, rotated)
    assert_same_bits([x["out"]], [rotated], what="rotation")


@triton_only
def test_a_dout_that_strides_far_along_time_comes_to_the_kernels_contiguous(monkeypatch):
    """Within a tile rows times their stride are 32-bit offsets."""
    inputs, strides, backward = problem(2, 16, 0), [], module._attention_bwd
    monkeypatch.setattr(module, "_attention_bwd", lambda *a: (strides.append(a[4].stride(1)), backward(*a)))
    values = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    far = torch.empty(module.MAX_STRIDE_T + 16).as_strided(values.shape, (1, module.MAX_STRIDE_T, 1, 1)).copy_(values)
    grads = [run_with_grads(attention, inputs, QKV, [dout])[1].values() for dout in (far, values)]
    assert max(strides) < module.MAX_STRIDE_T
    assert_same_bits(*grads, what="dout far apart along time")


@triton.jit
def _order_kernel(out_ptr, tiles, heads, HEADS_PER_GROUP: tl.constexpr):
    tile, head = _tile_and_head(tl.program_id(0), tiles, heads, HEADS_PER_GROUP)
    tl.store(out_ptr + 2 * tl.program_id(0), tile)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, head)


@triton_only
@pytest.mark.parametrize(("tiles", "heads", "group"), [(1, 1, 8), (4, 6, 2), (3, 7, 4), (5, 3, 8)])
def test_longest_tiles_of_a_group_of_heads_come_first(tiles, heads, group):
    out = torch.empty(tiles * heads, 2, dtype=torch.int32)
    _order_kernel[(tiles * heads,)](out, tiles, heads, HEADS_PER_GROUP=group)
    order = [tuple(pair) for pair in out.tolist()]
    assert sorted(order) == [(tile, head) for tile in range(tiles) for head in range(heads)]
    for first in range(0, heads, group):
        of_group = order[tiles * first : tiles * min(first + group, heads)]
        assert [tile for tile, _ in of_group] == sorted(tile for tile, _ in of_group)
        assert {head for _, head in of_group} == set(range(first, min(first + group, heads)))


def test_expanded_keys_and_values(monkeypatch):
    """One head of k and v for all heads of q, as a view."""
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(20, H=3)
    for name in ("k", "v"):
        inputs[name] = inputs[name][:, :, :1].expand(-1, -1, 3, -1)
    copied = inputs | {name: inputs[name].contiguous() for name in ("k", "v")}
    assert_same_bits([attention(**inputs)], [attention(**copied)], what="expanded k, v")


def test_no_rotary_columns_is_no_rotary():
    inputs = problem(9, R=0)
    empty = torch.empty(9, 0)
    assert_same_bits([attention(**(inputs | {"cos": empty, "sin": empty}))], [attention(**inputs)], what="R = 0")


@pytest.mark.parametrize(("B", "T", "H"), [(0, 5, 2), (2, 0, 2)])
def test_nothing_in_nothing_out(B, T, H):
    inputs = problem(T, B=B, H=H) | {"segment_ids": torch.zeros(B, T, dtype=torch.int32)}
    assert [x.shape for x in forward_and_backward(inputs)] == [(B, T, H, 80)] * 4


@triton_only
@pytest.mark.parametrize("rotated", [False, True])
def test_saves_what_its_contract_says_and_no_more(rotated):
    inputs = problem(16, 80, 32 if rotated else 0, H=2, dtype=torch.bfloat16)
    for name in QKV:
        inputs[name].requires_grad_()
    kept = saved_bytes(lambda: attention(**inputs), besides=[inputs["cos"], inputs["sin"]] if rotated else [])
    assert kept == 4 * 16 * 2 * 80 * 2 + 16 * 2 * 4  # q, k, v, out in bf16; lse in fp32


def test_gradients_only_where_asked():
    inputs = problem(8)
    inputs["v"].requires_grad_()
    (dv,) = torch.autograd.grad(attention(**inputs).sum(), [inputs["v"]])
    assert_same_bits([dv], [run_with_grads(attention, inputs, ["v"], [torch.ones(1, 8, 1, 80)])[1]["v"]], what="dv")
    with torch.no_grad():
        assert not attention(**inputs).requires_grad


@triton_only
def test_a_second_backward_is_refused():
    inputs = problem(4)
    inputs["q"].requires_grad_()
    dout = torch.ones(1, 4, 1, 80, requires_grad=True)
    (dq,) = torch.autograd.grad(attention(**inputs), [inputs["q"]], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@triton_only
def test_a_saved_tensor_overwritten_later_is_noticed():
    inputs = problem(4)
    inputs["q"].requires_grad_()
    out = attention(**inputs)
    inputs["v"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@triton_only
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_opcheck(packed, rotated):
    given = problem(5, 16, 8 if rotated else 0, B=2, H=2)
    q, k, v, cos, sin = given.values()
    bounds = module.document_bounds(documents(2, 5, mean=2)) if packed else None
    # Dense but permuted, as torch.compile may lay an output out.
    out = torch.empty(2, 2, 5, 16).transpose(1, 2)
    lse, delta = torch.empty(2, 2, 5), torch.empty(2, 2, 2, 5)
    torch.library.opcheck(module._attention_fwd, (q, k, v, cos, sin, bounds, out, None, lse, 0.25, 0))
    module._attention_fwd(q, k, v, cos, sin, bounds, out, None, lse, 0.25, 0)
    dq, dk, dv = (torch.empty_like(q) for _ in QKV)
    sums = [torch.empty(2, 32), torch.empty(2, 2, 32)] if packed else [None, None]
    arguments = (q, k, v, out, out, lse, cos, sin, bounds, dq, dk, dv, delta, *sums, 0.25, packed)
    torch.library.opcheck(module._attention_bwd, arguments)
    if rotated:
        torch.library.opcheck(module._attention_rotate, (q, cos, sin, torch.empty_like(q)))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph_without_copies(packed):
    """pytorch#136550: torch.compile of a user's Triton kernel gave other results than eager."""
    inputs = problem(9, H=2)
    leaves = [inputs[name].requires_grad_() for name in QKV]
    segment_ids = documents(1, 9, mean=4) if packed else None

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, inputs["cos"], inputs["sin"], segment_ids=segment_ids)

    assert_compiles_without_clones(f, *leaves)


def wrong_arguments():
    """What to change about a good call, and the words the error must have."""
    x = torch.zeros
    yield {"q": x(6, 2, 16)}, "q [B, T, H, D]", "[6, 2, 16]"
    yield {"k": x(1, 6, 3, 16)}, "k [1, S, 2, 16]", "[1, 6, 3, 16]"
    yield {"v": x(1, 5, 2, 16)}, "v [1, 6, 2, 16]", "[1, 5, 2, 16]"
    yield {"k": x(1, 6, 2, 16).half()}, "k of q's dtype torch.float32", "torch.float16"
    yield {"v": x(1, 6, 2, 16, device="meta")}, "v on q's device cpu", "meta"
    yield {"q_start": 1}, "q_start 0 or more and q_start + T <= S", "1"
    yield {"q_start": -1}, "q_start 0 or more", "-1"
    yield {"scale": 0.0}, "scale > 0", "0.0"
    yield {"scale": math.nan}, "scale > 0", "nan"
    yield {"cos": x(6, 4)}, "cos and sin both or neither", "one of them"
    yield {"cos": x(6, 9), "sin": x(6, 9)}, "cos", "[6, 9]"
    yield {"cos": x(5, 4), "sin": x(5, 4)}, "cos [>= 6, R/2]", "[5, 4]"
    yield {"cos": x(6, 4), "sin": x(6, 3)}, "sin", "[6, 3]"
    yield {"cos": x(6, 4), "sin": x(6, 4).double()}, "sin of torch.float32", "torch.float64"
    yield {"segment_ids": x(1, 5, dtype=torch.int32)}, "segment_ids [1, 6]", "[1, 5]"
    yield {"segment_ids": x(1, 6)}, "segment_ids of integers", "torch.float32"


@pytest.mark.parametrize(("change", "expected", "got"), list(wrong_arguments()))
def test_errors_name_the_argument_what_was_expected_and_what_came(change, expected, got):
    good = {name: torch.zeros(1, 6, 2, 16) for name in QKV}
    with pytest.raises(ValueError) as raised:
        attention(**(good | change))
    assert str(raised.value).startswith(f"attention: expected {expected}")
    assert str(raised.value).endswith(f"got {got}")


def test_gradients_of_queries_from_the_middle_are_refused():
    inputs = problem(6, R=0)
    inputs["k"].requires_grad_()
    with pytest.raises(ValueError, match=r"expected q_start = 0 and T = S where gradients are wanted, got q_start = 2"):
        attention(inputs["q"][:, :4], inputs["k"], inputs["v"], q_start=2)
    with torch.no_grad():
        attention(inputs["q"][:, :4], inputs["k"], inputs["v"], q_start=2)


@triton_only
@pytest.mark.parametrize(
    ("q", "words"),
    [
        (torch.zeros(1, 4, 2, 72), "D in (16, 32, 48, 64, 80, 96, 128), got 72"),
        (torch.zeros(1, 4, 2, 112), "got 112"),
        (torch.zeros(1, 4, 2, 16, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(1, 4, 16, 2).transpose(2, 3), "contiguous last axis"),
        (torch.zeros(16).as_strided((1, 1, 1, 16), (1, 2**23, 1, 1)), "below 8388608 along T"),
    ],
)
def test_limits_of_the_kernels_are_said(q, words):
    with pytest.raises(ValueError) as raised:
        attention(q, q, q)
    assert words in str(raised.value)
