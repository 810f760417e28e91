"""Numerics of attention: the torch path, and in the interpreter the Triton kernels."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from xiangxin_kernels import attention, attention_ref

from tests.conftest import INTERPRET
from tests.kernels.attention_inputs import documents, module, problem, rotary, use_tiles
from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op, lay_out, run_with_grads
from tests.op_contract import assert_same_bits

pytestmark = [pytest.mark.interpreter] if INTERPRET else []

TS = (1, 2, 15, 16, 17, 63, 64, 65, 113, 128, 200, 257)
DS = (64, 80, 96, 128)
ROTARY = (0, 16, 32, None)  # None: all of D
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QKV = ("q", "k", "v")
# Queries by keys: square, wider, higher, and "chosen" for those of _tuning.py.
TILES = ((16, 16), "chosen", (16, 32), (32, 16))


def pairwise() -> Iterator:
    """Every T with every D and every R, every D with every R; dtypes, tiles and documents spread over them."""
    for i, T in enumerate(TS):
        for j, D in enumerate(DS):
            R = ROTARY[(i + j) % 4]
            tiles = TILES[(i // 3 + j) % 4] if T <= 65 else ((32, 64), "chosen", (64, 32), "chosen")[(i + j // 2) % 4]
            dtype = FLOATS[(i + 2 * j) % 3]
            yield pytest.param(T, D, D if R is None else R, dtype, tiles, (i + j // 2) % 2 == 1)


@pytest.mark.parametrize(("T", "D", "R", "dtype", "tiles", "packed"), list(pairwise()))
def test_holds_the_numerics_rule(T, D, R, dtype, tiles, packed, monkeypatch):
    """pytorch#138522, #193893, cudnn-frontend#160: what SDPA picks by default was wrong; the reference calls none."""
    if tiles != "chosen":
        use_tiles(monkeypatch, *tiles)
    B, H = (2, 2) if T <= 2 else (1, 1)
    inputs = problem(T, D, R, B=B, H=H, dtype=dtype)
    inputs["segment_ids"] = documents(B, T) if packed else None
    check_op(attention, attention_ref, inputs, wrt=QKV, name="attention")


# 16, 32: one part; 48: 32 + 16. R = 50: pairs no power of two apart; R = 80: pairs across the parts of 64 and 16.
@pytest.mark.parametrize(("D", "R"), [(16, 0), (16, 16), (32, 10), (48, 40), (80, 2), (80, 50), (80, 80)])
def test_other_head_dims_and_odd_rotary_widths(D, R, monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    check_op(attention, attention_ref, problem(37, D, R), wrt=QKV, name="attention")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_layout_of_dout_changes_no_bit(dtype, monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(3, B=2, dtype=dtype)
    noise = torch.randn(2, 3, 1, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layout in DOUT_LAYOUTS[1:]:
        dout = lay_out(noise, layout)
        laid_out, contiguous = (run_with_grads(attention, inputs, QKV, [d])[1] for d in (dout, dout.contiguous()))
        assert_same_bits(laid_out.values(), contiguous.values(), what=f"dout {layout}")


# With a scale of 1 a row's lse is far from 0, and its rounding alone would be most of the error in fp32.
@pytest.mark.parametrize(("scale", "seed"), [(0.01, 0), (1.0, 0), (1.0, 1), (1.0, 2), (1.0, 3)])
def test_scale(scale, seed, monkeypatch):
    use_tiles(monkeypatch, 16, 32)
    op, ref = (partial(f, scale=scale) for f in (attention, attention_ref))
    check_op(op, ref, problem(33, R=0, seed=seed), wrt=QKV, name="attention")


def packed_in_every_way() -> Iterator:
    """segment_ids [B, 70]: one document; borders on, before and after those of tiles of 16 and 32; ids come again."""
    yield pytest.param(torch.zeros(1, 70), id="one document")
    for border in (15, 16, 17, 33, 48):
        yield pytest.param((torch.arange(70) >= border)[None], id=f"border at {border}")
    yield pytest.param(
        torch.repeat_interleave(torch.tensor([1, 0, 1, 0]), torch.tensor([5, 40, 3, 22]))[None], id="ids again"
    )
    yield pytest.param(torch.stack([torch.arange(70) // 23, torch.arange(70) // 50]), id="rows differ")


@pytest.mark.parametrize("segment_ids", list(packed_in_every_way()))
@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (32, 16)], ids=str)
def test_packed_documents_do_not_see_each_other(segment_ids, tiles, monkeypatch):
    use_tiles(monkeypatch, *tiles)
    inputs = problem(70, 32, 16, B=len(segment_ids)) | {"segment_ids": segment_ids.long()}
    check_op(attention, attention_ref, inputs, wrt=QKV, name="attention")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_token_to_a_document(dtype, monkeypatch):
    """pytorch#41508, #103963, #109517, mlx#2608, transformers#38690: NaN from rows that see no key; here a tile's."""
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(20, R=0, dtype=dtype) | {"segment_ids": torch.arange(20)[None]}
    check_op(attention, attention_ref, inputs, wrt=QKV, name="attention")
    _, grads = run_with_grads(attention, inputs, QKV, [inputs["q"]])
    assert not grads["q"].any()
    assert not grads["k"].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("q_start", "T", "S"), [(0, 5, 40), (1, 1, 2), (16, 16, 32), (37, 20, 70), (69, 1, 70)])
def test_queries_from_the_middle(q_start, T, S, packed, dtype, monkeypatch):
    """pytorch#108108, #144858, executorch#21749: SDPA's is_causal counts queries from the first key, not q_start."""
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(S, B=2, dtype=dtype) | {"segment_ids": documents(2, S) if packed else None}
    # What the reference makes of q_start: the rows of a full forward.
    whole = attention_ref(**{name: x.double() if name in QKV else x for name, x in inputs.items()})
    inputs["q"] = inputs["q"][:, q_start : q_start + T]
    op, ref = (partial(f, q_start=q_start) for f in (attention, attention_ref))
    check_op(op, ref, inputs, wrt=(), name="attention")
    exact = ref(**{name: x.double() if name in QKV else x for name, x in inputs.items()})
    # Sums of D and of S terms, each in an order of its own.
    rounding = torch.finfo(torch.float64).eps * (inputs["q"].shape[-1] + S) * whole.abs().max().item()
    assert torch.allclose(exact, whole[:, q_start : q_start + T], rtol=0, atol=rounding)


def same_delta_ref(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> list[Tensor]:
    """dq, dk from delta = sum(out * dout) of that very `out`, as the kernels take it in 16 bits; no documents."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw, outw, doutw = (x.to(wide) for x in (q, k, v, out, dout))
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    s = torch.einsum("bthd,bshd->bhts", qw, kw) * scale
    p = s.masked_fill(~module.visible_keys(T, T, 0, None, q.device), -math.inf).softmax(dim=-1)
    delta = (outw * doutw).sum(-1).transpose(1, 2)[..., None]
    ds = (p * (torch.einsum("bthd,bshd->bhts", doutw, vw) - delta)).to(q.dtype).to(wide)
    dq, dk = torch.einsum("bhts,bshd->bthd", ds, kw), torch.einsum("bhts,bthd->bshd", ds, qw)
    return [(x * scale).to(q.dtype) for x in (dq, dk)]


def test_large_q_and_k_in_bf16():
    """transformers#28163, mlc-llm#1870: Phi-2's q and k reach a few hundred, where fp16 scores overflow."""
    inputs = problem(65, dtype=torch.bfloat16)
    for name in ("q", "k"):
        inputs[name] = (inputs[name] * 300 / inputs[name].abs().max()).to(torch.bfloat16)
    check_op(attention, attention_ref, inputs, wrt=("v",), name="attention")
    _, grads = run_with_grads(attention, inputs, QKV, [inputs["v"]])
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.interpreter
def test_gradients_of_large_q_and_k_in_bf16():
    """Every row is one-hot, so that dq and dk would be 0 but for rounding, unless its key comes twice."""
    inputs = problem(65, R=0, dtype=torch.bfloat16)
    for name in ("q", "k"):
        inputs[name] = (inputs[name] * 300 / inputs[name].abs().max()).to(torch.bfloat16)
    inputs["k"][:, 1::2] = inputs["k"][:, :-1:2]
    dout = inputs["v"].flip(1)
    (out,), grads = run_with_grads(attention, inputs, QKV, [dout])
    given = [*(inputs[name] for name in QKV), out, dout]
    plain, exact = same_delta_ref(*given), same_delta_ref(*(x.double() for x in given))
    for name, *tensors in zip("qk", (grads["q"], grads["k"]), plain, exact, strict=True):
        assert_no_worse_than_torch(*tensors, what=f"attention.d{name} of large q, k")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_past_the_range_of_fp16_stay_finite(dtype):
    inputs = problem(40, dtype=dtype)
    inputs["q"], inputs["k"] = (torch.full_like(inputs["q"], 300) for _ in range(2))
    assert attention(**inputs).isfinite().all()


def test_no_bias_where_rows_have_several_equal_maxima(monkeypatch):
    """arXiv 2510.04212: with values of one sign, rounding with a bias there blew up a training."""
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(64, R=0, dtype=torch.bfloat16)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 64, -1, -1).contiguous()
    inputs["v"] = -inputs["v"].abs()
    check_op(attention, attention_ref, inputs, wrt=("v",), name="attention")


def test_scores_all_far_below_zero(monkeypatch):
    """pytorch#196678: cuDNN was wrong for T % 128 == 64 with lse < -88.7."""
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(49, R=0)
    inputs["q"], inputs["k"] = 4 + inputs["q"].abs(), -4 - inputs["k"].abs()
    check_op(attention, attention_ref, inputs, wrt=QKV, name="attention")


@pytest.mark.parametrize("name", QKV)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_what_torch_lets_see_them(name, value, monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(50, R=0)
    at = 20
    inputs[name][0, at, 0, 3] = value
    out, expected = attention(**inputs), attention_ref(**inputs)
    assert torch.equal(out[:, at:].isnan(), expected[:, at:].isnan())
    # In torch what is not finite in v also reaches the rows before it, through 0 * NaN; here those of its own tile.
    if name != "v" or INTERPRET:
        assert out[:, : 16 if name == "v" else at].isfinite().all()


@pytest.mark.parametrize("name", QKV)
def test_nan_reaches_the_gradients_torch_lets_it_reach(name, monkeypatch):
    use_tiles(monkeypatch, 16, 16)
    inputs = problem(50, R=0)
    inputs[name][0, 20, 0, 3] = math.nan
    for x in QKV:
        inputs[x].requires_grad_()
    seen, expected = (
        torch.autograd.grad(f(**inputs).sum(), [inputs[x] for x in QKV]) for f in (attention, attention_ref)
    )
    rows, expected = ([grad.isnan().any(dim=(0, 2, 3)) for grad in grads] for grads in (seen, expected))
    for x, ours, torchs in zip(QKV, rows, expected, strict=True):
        assert not (ours & ~torchs).any(), f"d{x} has NaN where torch has none"
    assert rows[0][20 : 21 if name == "q" else None].all()


@pytest.mark.parametrize("T", [1, 2, 5, 17, 47])
def test_nothing_past_the_end_is_read_into_a_result(T, monkeypatch):
    """flash-attn's test_flash_attn_bwd_overflow: keys past the end, not masked, made NaN in dq when q, k were large."""
    use_tiles(monkeypatch, 16, 32)
    given = problem(T, H=4)  # with one head five rows of p are all that dv's error comes from
    padded = {name: torch.full((2, T + 40, 4, 80), math.nan) for name in QKV}
    for name in QKV:
        padded[name][:1, :T] = given[name]
        given[name] = padded[name][:1, :T]
    check_op(attention, attention_ref, given, wrt=QKV, name="attention")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 33, 70])
@pytest.mark.interpreter
def test_lse(T, packed, dtype, monkeypatch):
    use_tiles(monkeypatch, 16, 32)
    inputs = problem(T, R=0, B=2, H=2, dtype=dtype)
    segment_ids = documents(2, T) if packed else None
    q, k, v = (inputs[name] for name in QKV)
    bounds = None if segment_ids is None else module.document_bounds(segment_ids)
    lse = torch.empty(2, 2, T)
    module._attention_fwd(q, k, v, None, None, bounds, torch.empty_like(q), None, lse, 0.1, 0)

    def ref(q, k):
        scores = torch.einsum("bthd,bshd->bhts", q, k).to(torch.promote_types(q.dtype, torch.float32)) * 0.1
        hidden = ~module.visible_keys(T, T, 0, segment_ids, q.device)
        return scores.masked_fill(hidden, -math.inf).logsumexp(dim=-1) / math.log(2)

    assert_no_worse_than_torch(lse, ref(q, k), ref(q.double(), k.double()), what="attention.lse")


def test_position_2047_is_rotated_as_exactly_as_position_0():
    cos, sin = rotary(2048, 32)
    inputs = problem(64) | {"cos": cos[1984:].contiguous(), "sin": sin[1984:].contiguous()}
    check_op(attention, attention_ref, inputs, wrt=QKV, name="attention")


def test_document_bounds_against_a_loop():
    segment_ids = documents(3, 40, mean=4)
    start, end = module.document_bounds(segment_ids)
    for b in range(3):
        ids = segment_ids[b].tolist()
        for t in range(40):
            run = [s for s in range(40) if len(set(ids[min(s, t) : max(s, t) + 1])) == 1]
            assert (start[b, t], end[b, t]) == (run[0], run[-1] + 1)
