"""The parallel block as one function: output and seven gradients, what it keeps, and what its parts may not do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from xiangxin_kernels import _host, attention_ref, document_bounds, parallel_block, parallel_block_ref

from tests.conftest import INTERPRET
from tests.kernels.block_inputs import block_inputs, rotary_tables, use_way, with_other_strides
from tests.numerics import DOUT_LAYOUTS, assert_no_worse_than_torch, check_op
from tests.op_contract import (
    assert_compiles_without_clones,
    assert_program_order_free,
    assert_repeatable,
    assert_same_bits,
    saved_bytes,
)

pytestmark = [pytest.mark.interpreter] if INTERPRET else []

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("x", "ln_w", "ln_b", "w_in", "b_in", "w_out", "b_out")
only_triton = pytest.mark.skipif(not INTERPRET, reason="what the Triton path alone promises")


def check_block(inputs: dict, *, heads: int, layouts=("contiguous",), **options) -> None:
    check_op(
        lambda **given: parallel_block(**given, heads=heads, **options),
        lambda **given: parallel_block_ref(
            **given, heads=heads, **{k: v for k, v in options.items() if k == "segment_ids"}
        ),
        inputs,
        wrt=WEIGHTS,
        layouts=layouts,
        name="parallel_block",
    )


def run(inputs: dict, heads: int, **options) -> list:
    leaves = {name: x.detach().clone().requires_grad_(name in WEIGHTS) for name, x in inputs.items()}
    y = parallel_block(**leaves, heads=heads, **options)
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in WEIGHTS], torch.cos(y.detach()))]


# Rows no multiple of a tile (37, 113), one row; F odd, so that no 16-byte access may be taken for granted.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["cublas", "pointers", "descriptors"])
def test_output_and_gradients(way, dtype, monkeypatch):
    if not INTERPRET and way != "cublas":
        pytest.skip("the ways differ in Triton alone")
    use_way(monkeypatch, way)
    F = 104 if way == "descriptors" else 101
    check_block(block_inputs(1, 37, 3, 16, 8, F, dtype), heads=3)


@pytest.mark.parametrize(("B", "T", "H", "D", "R", "F"), [(1, 1, 2, 16, 16, 64), (1, 113, 1, 80, 32, 96)])
def test_odd_sizes(B, T, H, D, R, F):
    check_block(block_inputs(B, T, H, D, R, F, torch.bfloat16), heads=H)


def test_documents_and_any_strides_of_dout():
    segment_ids = torch.tensor([[0] * 5 + [3] * 12, [1] * 17])
    inputs = block_inputs(2, 17, 2, 16, 8, 40)
    made_once = run(inputs, 2, segment_ids=document_bounds(segment_ids))
    assert_same_bits(made_once, run(inputs, 2, segment_ids=segment_ids), what="bounds made beforehand")
    check_block(inputs, heads=2, segment_ids=segment_ids, layouts=DOUT_LAYOUTS)


@only_triton
def test_recomputing_gives_the_same_bits():
    inputs = block_inputs(1, 19, 2, 16, 8, 40, torch.bfloat16)
    assert_same_bits(run(inputs, 2, recompute=True), run(inputs, 2), what="recompute")


def test_empty_batch():
    results = run(block_inputs(0, 5, 2, 16, 8, 40), 2)
    assert results[0].shape == (0, 5, 32)
    assert not any(gradient.any() for gradient in results[1:])


@only_triton
def test_bytes_kept_for_backward():
    """At C = 2560, H = 32, F = 10240 in bf16 it is 46,216 a token, 10,376 when recomputing; here the same terms."""
    B, T, H, D, F = 1, 32, 4, 16, 256
    C = H * D
    inputs = block_inputs(B, T, H, D, 8, F, torch.bfloat16)
    leaves = {name: x.requires_grad_(name in WEIGHTS) for name, x in inputs.items()}
    besides = [x for name, x in leaves.items() if name != "x"]

    def per_token(C, F, H, recompute=False):
        return 2 * (C + (0 if recompute else 3 * C + F) + C) + 4 * H + 8

    assert (per_token(2560, 10240, 32), per_token(2560, 10240, 32, recompute=True)) == (46_216, 10_376)
    for recompute in (False, True):
        kept = saved_bytes(lambda r=recompute: parallel_block(**leaves, heads=H, recompute=r), besides=besides)
        assert kept == B * T * per_token(C, F, H, recompute)


@only_triton
def test_the_backward_makes_no_pass_of_its_own_over_the_projection(monkeypatch):
    """Bias gradients come from sums by tile, dq and dk are rotated back before they are stored, gelu(h) is made where h
    is read: all that touches [N, 3C] or [N, F], within the ops too, is products and the kernels of DESIGN's list."""
    inputs = block_inputs(1, 32, 4, 16, 8, 256)
    leaves = {name: x.requires_grad_(name in WEIGHTS) for name, x in inputs.items()}
    y = parallel_block(**leaves, heads=4)
    wide, kernels, products = [], [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "xiangxin" and not func.is_view and "empty" not in func.name():
                sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
                if max(sizes, default=0) >= 32 * 3 * 64:
                    (products if func.name() == "aten::mm.out" else wide).append(func.name())
            return func(*args, **(kwargs or {}))

    launch = GridExecutor.__call__

    def watched_launch(self, *args, **kwargs):
        kernels.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own copies
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", watched_launch)
    monkeypatch.setattr(_host, "_on_device", lambda device: Watch())  # a mode does not see into an op
    with Watch():
        torch.autograd.grad(y, [leaves[name] for name in WEIGHTS], torch.ones_like(y))
    assert wide == []
    assert len(products) == 4  # dh, dw_out of the MLP, dw_in, dx
    assert kernels == [
        "_layer_norm_fwd_kernel",
        "_epilogue_kernel",
        "_attention_bwd_dq_kernel",
        "_attention_bwd_dkv_kernel",
        "_layer_norm_bwd_kernel",
    ]


@pytest.mark.parametrize("chunks", [(17,), (5, 12), (1, 1, 15)])
def test_prefill_in_chunks_gives_the_rows_of_the_whole(chunks):
    inputs = block_inputs(2, 17, 2, 16, 8, 40)
    with torch.no_grad():
        plain = parallel_block_ref(**inputs, heads=2)
        exact = parallel_block_ref(**{name: x.double() for name, x in inputs.items()}, heads=2)
        x = inputs.pop("x")
        cache = [torch.full((2, 20, 2, 16), float("nan")) for _ in range(2)]
        start, rows = 0, []
        for length in chunks:
            chunk = x[:, start : start + length]
            rows.append(parallel_block(chunk, **inputs, heads=2, cache=tuple(cache), q_start=start))
            start += length
    assert_no_worse_than_torch(torch.cat(rows, dim=1), plain, exact, what="parallel_block.prefill")
    assert all(c[:, :17].isfinite().all() and c[:, 17:].isnan().all() for c in cache)


def test_the_row_order_of_w_in_makes_it_rotate_half_attention():
    """Pairs stored as neighbours, rotated in the projection, are attention's pairs i and i + R/2."""
    B, T, H, D, R = 1, 9, 2, 16, 8
    C = H * D
    inputs = block_inputs(B, T, H, D, R, 24, torch.float64)
    cos, sin = rotary_tables(T, R)
    natural = torch.arange(C).view(H, D)
    order = natural.clone()
    order[:, 0:R:2], order[:, 1:R:2] = natural[:, : R // 2], natural[:, R // 2 : R]
    order = order.flatten()
    y = torch.nn.functional.layer_norm(inputs["x"], (C,), inputs["ln_w"], inputs["ln_b"])
    w, b = inputs["w_in"].clone(), inputs["b_in"].clone()
    q, k, v = (
        torch.nn.functional.linear(y, w[i * C : (i + 1) * C], b[i * C : (i + 1) * C]).view(B, T, H, D) for i in range(3)
    )
    attn = attention_ref(q, k, v, cos.double(), sin.double())
    h = torch.nn.functional.gelu(torch.nn.functional.linear(y, w[3 * C :], b[3 * C :]), approximate="tanh")
    out = torch.nn.functional.linear(torch.cat([attn.flatten(2), h], dim=-1), inputs["w_out"])
    expected = inputs["x"] + out + inputs["b_out"].sum(0)
    for i in range(2):
        inputs["w_in"][i * C : (i + 1) * C] = w[i * C : (i + 1) * C][order]
        inputs["b_in"][i * C : (i + 1) * C] = b[i * C : (i + 1) * C][order]
    inputs["cos"], inputs["sin"] = cos.double(), sin.double()
    # The longest sum, over C + F of z, takes in what sums over C, D and T gave.
    rounding = torch.finfo(torch.float64).eps * (2 * C + 24 + D + T) * expected.abs().max().item()
    torch.testing.assert_close(parallel_block_ref(**inputs, heads=H), expected, rtol=0, atol=rounding)


def test_tables_of_any_strides():
    inputs = block_inputs(1, 9, 2, 16, 8, 40)
    strided = {name: inputs[name].t().contiguous().t() for name in ("cos", "sin")}
    assert_same_bits(run(inputs | strided, 2), run(inputs, 2), what="strides of cos, sin")


@pytest.mark.parametrize("way", ["cublas", "pointers", "descriptors"])
def test_weights_of_any_strides(way, monkeypatch):
    if not INTERPRET and way != "cublas":
        pytest.skip("the ways differ in Triton alone")
    use_way(monkeypatch, way)
    inputs = block_inputs(1, 9, 2, 16, 8, 40)
    check_block({k: with_other_strides(x) if k in WEIGHTS[1:] else x for k, x in inputs.items()}, heads=2)


@only_triton
def test_autocast_changes_nothing():
    """Products of fp32 would otherwise come out in bf16 where backward runs, and nowhere else."""
    inputs = block_inputs(1, 9, 2, 16, 8, 40)
    expected = run(inputs, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(inputs, 2), expected, what="autocast")


@only_triton
def test_tables_in_another_dtype_are_refused():
    inputs = block_inputs(1, 9, 2, 16, 8, 40, torch.bfloat16)
    with pytest.raises(ValueError, match=r"parallel_block: expected sin in torch.float32, got torch.bfloat16"):
        parallel_block(**inputs | {"sin": inputs["sin"].bfloat16()}, heads=2)


def test_two_runs_give_the_same_bits():
    inputs = block_inputs(1, 37, 2, 16, 8, 40, torch.bfloat16)
    assert_repeatable(lambda: run(inputs, 2))


@only_triton
@pytest.mark.parametrize("way", ["cublas", "pointers"])
def test_programs_in_reverse_give_the_same_bits(way, monkeypatch):
    use_way(monkeypatch, way)
    inputs = block_inputs(1, 37, 2, 16, 8, 40)
    assert_program_order_free(lambda: run(inputs, 2))


def test_compiles_without_graph_breaks_or_clones():
    inputs = block_inputs(1, 9, 2, 16, 8, 40)
    arguments = [x.requires_grad_(name in WEIGHTS) for name, x in inputs.items()]
    assert_compiles_without_clones(lambda *given: parallel_block(*given, heads=2), *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 32)}, r"expected x \[B, T, C\], got \[3, 32\]"),
        ({"heads": 5}, r"expected heads that divide C = 32, got 5"),
        ({"w_in": torch.zeros(136, 31)}, r"expected w_in \[136, 32\], got \[136, 31\]"),
        ({"b_out": torch.zeros(32)}, r"expected b_out \[2, 32\], got \[32\]"),
        ({"cos": torch.zeros(8, 4)}, r"expected cos for 9 positions, got 8"),
        ({"sin": torch.zeros(9, 2)}, r"expected sin \[9, 4\], got \[9, 2\]"),
        ({"q_start": 2, "cos": torch.zeros(99, 4), "sin": torch.zeros(99, 4)}, r"expected q_start 0 without a cache"),
        ({"segment_ids": torch.zeros(2, 9, dtype=torch.int64)}, r"expected segment_ids \[1, 9\], got \[2, 9\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"parallel_block: {message}"):
        parallel_block(**{**block_inputs(1, 9, 2, 16, 8, 40), "heads": 2, **change})
