"""Decode's Triton kernels in the interpreter: numerics, what a row may depend on, and the contract of the ops."""

import importlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from xiangxin_kernels import (
    decode_attention,
    decode_attention_ref,
    decode_block,
    decode_block_ref,
    decode_head,
    decode_head_ref,
)
from xiangxin_kernels.quantized import dequantize, quantize

from tests.kernels.decode_inputs import (
    BLOCK_ROWS,
    POSITIONS,
    appended,
    attention_inputs,
    block_inputs,
    head_inputs,
    row_of,
)
from tests.numerics import check_op
from tests.op_contract import (
    assert_compiles_without_clones,
    assert_program_order_free,
    assert_repeatable,
    assert_same_bits,
)

pytestmark = pytest.mark.interpreter

decode = importlib.import_module("xiangxin_kernels.decode")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A split is 64 positions: one key, one below, at and above a split, three splits of which the last is one key.
SPLIT_LENGTHS = torch.tensor([1, 63, 64, 65, 129])
check_block = partial(check_op, appended(decode_block), appended(decode_block_ref), wrt=(), name="decode_block")


def small_block(dtype: torch.dtype, rows: int, **changes) -> dict:
    """`rows` rows of one head, at positions on both sides of a split's end."""
    positions = torch.arange(rows) * 37 % 70
    return block_inputs(dtype, positions, **{"H": 1, "hidden": 100, "S": 71} | changes)


def quantized(inputs: dict, bits: int, group: int | None, *names: str) -> dict:
    return inputs | {name: quantize(inputs[name], bits, group) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
class TestNumerics:
    def test_attention(self, dtype):
        check_op(decode_attention, decode_attention_ref, attention_inputs(dtype, SPLIT_LENGTHS, H=2, S=131), wrt=())

    @pytest.mark.parametrize("D", [16, 24, 128])
    def test_attention_of_other_heads(self, dtype, D):
        inputs = attention_inputs(dtype, torch.tensor([5, 66]), H=2, D=D)
        check_op(decode_attention, decode_attention_ref, inputs | {"scale": 0.3}, wrt=())

    def test_attention_of_many_splits(self, dtype):
        """More than the last program takes at a time; the last scores are the largest by far."""
        inputs = attention_inputs(dtype, torch.tensor([1030]), H=1, D=16, S=1040)
        inputs["k_cache"][:, 1024:] = 2 * inputs["q"]
        check_op(decode_attention, decode_attention_ref, inputs, wrt=())

    @pytest.mark.parametrize("rows", [1, 2, 3, 5])
    def test_block(self, dtype, rows):
        check_block(small_block(dtype, rows))

    def test_block_of_whole_tiles(self, dtype):
        """C, F and the splits of K need no masks."""
        check_block(block_inputs(dtype, torch.tensor([3, 9]), H=2, D=128, hidden=768, S=10))

    def test_block_of_three_heads(self, dtype):
        """Tiles that hold the end of q and the beginning of k, of v and of h."""
        check_block(block_inputs(dtype, POSITIONS))

    def test_head(self, dtype):
        check_op(decode_head, decode_head_ref, head_inputs(dtype), wrt=())

    def test_far_from_zero(self, dtype):
        """The variance of rows whose mean is large beside their spread."""
        inputs = head_inputs(dtype, rows=2)
        mean, spread = {torch.float32: (1e4, 1e-3), torch.float16: (100, 0.1), torch.bfloat16: (100, 1)}[dtype]
        inputs["x"] = (inputs["x"].float() * spread + mean).to(dtype)
        check_op(decode_head, decode_head_ref, inputs, wrt=())


@pytest.mark.parametrize("rows", [16, 32, 33])
def test_block_of_many_rows(rows):
    check_block(small_block(torch.bfloat16, rows))


def test_head_of_many_rows():
    check_op(decode_head, decode_head_ref, head_inputs(torch.bfloat16, rows=33), wrt=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 64), (4, 128)])
def test_quantized_weights(dtype, bits, group):
    """Against the same layer with dequantized weights."""
    inputs = block_inputs(dtype, torch.arange(5), H=2, D=64, hidden=256, S=6)
    check_block(quantized(inputs, bits, group, "w_in", "w_out"))


@pytest.mark.parametrize("K", [96, 192, 2048])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_head(bits, K):
    """Columns in runs of 32, 64 and 128; less than a step of them, and four."""
    shapes = {"x": (3, K), "ln_w": (K,), "ln_b": (K,), "head_w": (40, K), "head_b": (40,)}
    inputs = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    check_op(decode_head, decode_head_ref, quantized(inputs, bits, None, "head_w"), wrt=())


@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e30])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_of_hostile_rows(bits, outlier):
    """Numbers of x far above the others, on weights that are near 0: nothing but the codes themselves enters a sum."""
    B, K, N = 3, 512, 40
    x, w = torch.randn(B, K).bfloat16(), torch.randn(N, K) * 0.02
    x[:, 7::64], w[:, 7::64] = outlier, 0
    z, w_out = x, quantize(w, bits, None)
    b_out, residual = torch.zeros(2, N).bfloat16(), torch.zeros(B, N).bfloat16()

    def product(z, w_out, residual):
        splits = -(-K // decode._split_k(K, N, *w_out))
        out, partial = torch.empty_like(residual), torch.empty(splits, B, N)
        counters = torch.zeros(N, dtype=torch.int32)
        decode._decode_project_out(z, *w_out, b_out.to(z.dtype), residual, out, partial, counters)
        return out

    def reference(z, w_out, residual):
        return residual + torch.nn.functional.linear(z, dequantize(w_out, z.dtype))

    check_op(product, reference, {"z": z, "w_out": w_out, "residual": residual}, wrt=(), name="decode_project_out")


def test_rows_that_are_not_aligned_are_brought_into_line():
    """The layout of the loads, and with it the order of a row's sums, would depend on where a row begins."""
    for C, wide, start in ((48, 48, 0), (48, 64, 0), (48, 64, 8), (48, 49, 0), (50, 50, 0)):
        x = torch.randn(3, wide)[:, start : start + C] if wide >= start + C else torch.randn(3, C)
        rows = decode._aligned_rows(x)
        assert torch.equal(rows, x)
        assert rows.stride(0) % 16 == rows.storage_offset() % 16 == 0
        in_place = C == 48 and wide % 16 == start % 16 == 0
        assert (rows.data_ptr() == x.data_ptr()) == in_place


@pytest.fixture
def sums_in_order(monkeypatch):
    """Products as tensor cores make them, element by element in the order of K: numpy's order is the library's whim."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from xiangxin_kernels._interpret import _widen

    def create_dot(self, a, b, acc, *options):
        a, b, total = _widen(a).data, _widen(b).data, acc.data
        for k in range(a.shape[-1]):
            total = total + a[..., :, k, None].astype(total.dtype) * b[..., k, None, :]
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("sums_in_order")
class TestRows:
    """A row is the same bits in any batch. `test_the_check_can_fail` shows that they need not be."""

    def assert_alone_is_together(self, inputs: dict, rows: list[int]) -> None:
        together = appended(decode_block)(**inputs)
        for row in rows:
            alone = appended(decode_block)(**row_of(inputs, row, BLOCK_ROWS))
            assert_same_bits(alone, [whole[row : row + 1] for whole in together], what=f"row {row} alone")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_block(self, dtype):
        inputs = small_block(dtype, 5)
        self.assert_alone_is_together(inputs, [0, 1, 2, 3, 4])
        order = torch.tensor([3, 1, 4, 0, 2])
        shuffled = appended(decode_block)(**inputs | {name: inputs[name][order] for name in BLOCK_ROWS})
        together = appended(decode_block)(**inputs)
        assert_same_bits(shuffled, [whole[order] for whole in together], what="rows in another order")

    @pytest.mark.parametrize("rows", [9, 32, 33])
    def test_block_of_many_rows(self, rows):
        """More rows take other tiles and normalise x in a launch of their own."""
        self.assert_alone_is_together(small_block(torch.bfloat16, rows), [0, 7, rows - 1])

    @pytest.mark.parametrize("bits", [8, 4])
    def test_block_of_quantized_weights(self, bits):
        inputs = small_block(torch.bfloat16, 9, H=2, D=64, hidden=128)
        self.assert_alone_is_together(quantized(inputs, bits, None, "w_in", "w_out"), [0, 8])

    @pytest.mark.parametrize("rows", [5, 33])
    def test_head(self, rows):
        inputs = head_inputs(torch.bfloat16, rows=rows)
        together = decode_head(**inputs)
        for row in (0, 3, rows - 1):
            assert_same_bits([decode_head(**row_of(inputs, row, ("x",)))], [together[row : row + 1]], what="row alone")

    def test_attention(self):
        inputs = attention_inputs(torch.bfloat16, SPLIT_LENGTHS, H=2, S=131)
        together = decode_attention(**inputs)
        for row in range(5):
            alone = decode_attention(**row_of(inputs, row, ("q", "k_cache", "v_cache", "lengths")))
            assert_same_bits([alone], [together[row : row + 1]], what=f"row {row} alone")

    def test_the_cache_s_capacity(self):
        inputs = attention_inputs(torch.bfloat16, torch.tensor([70, 5]), H=2, S=131)
        small = {name: inputs[name][:, :70] for name in ("k_cache", "v_cache")}
        assert_same_bits([decode_attention(**inputs | small)], [decode_attention(**inputs)], what="a smaller cache")

    def test_the_check_can_fail(self, monkeypatch):
        """The same comparison with K cut differently for one row."""
        layout = decode._layout
        inputs = small_block(torch.float32, 5)
        together = appended(decode_block)(**inputs)
        monkeypatch.setattr(decode, "_layout", lambda *given: layout(*given) | {"BLOCK_K": 32})
        alone = appended(decode_block)(**row_of(inputs, 4, BLOCK_ROWS))
        with pytest.raises(AssertionError, match="differs in"):
            assert_same_bits(alone, [whole[4:5] for whole in together], what="row 4 alone")


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_lies_beyond_a_row_is_never_read(poison):
    inputs = attention_inputs(torch.bfloat16, SPLIT_LENGTHS, H=2, S=131)
    clean = decode_attention(**inputs)
    beyond = torch.arange(131)[None, :, None, None] >= SPLIT_LENGTHS[:, None, None, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].masked_fill(beyond, poison)
    assert_same_bits([decode_attention(**inputs)], [clean], what="poisoned")

    inputs = small_block(torch.bfloat16, 3)
    clean, *_ = appended(decode_block)(**inputs)
    beyond = torch.arange(71)[None, :, None, None] >= inputs["positions"][:, None, None, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].masked_fill(beyond, poison)
    assert_same_bits([decode_block(**inputs)], [clean], what="poisoned block")


def test_a_damaged_row_spoils_no_other():
    inputs = small_block(torch.bfloat16, 9)
    clean = appended(decode_block)(**inputs)
    inputs["x"][4, 7] = math.nan
    spoilt = appended(decode_block)(**inputs)
    assert spoilt[0][4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert_same_bits([t[others] for t in spoilt], [t[others] for t in clean], what="beside a NaN")


@pytest.mark.parametrize("rows", [3, 9])
def test_rows_that_are_not_there_are_not_read(rows, monkeypatch):
    """Of up to 8 or 32 rows of x that a program has room for; what follows the last may be another's memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    inputs = small_block(torch.bfloat16, rows)
    buffer = torch.cat([inputs["x"], torch.full((32, 80), math.nan).bfloat16()])
    inputs["x"], beyond = buffer[:rows], buffer[rows:]
    read, load = [], InterpreterBuilder.create_masked_load

    def create_masked_load(self, ptrs, mask, *options):
        read.append(ptrs.data[mask.data].flatten())
        return load(self, ptrs, mask, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    decode_block(**inputs)
    addresses = np.concatenate(read)
    first, end = beyond.data_ptr(), beyond.data_ptr() + beyond.nbytes
    assert ((addresses >= buffer.data_ptr()) & (addresses < first)).any(), "no load of x was seen at all"
    assert not ((addresses >= first) & (addresses < end)).any()


def test_slots():
    """Rows may stand anywhere in a larger cache; only their places are written."""
    inputs = small_block(torch.bfloat16, 3)
    slots = torch.tensor([4, 0, 2])
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.cat([inputs[name], inputs[name] * 2])
    check_block(inputs | {"slots": slots})
    _, *caches = appended(decode_block)(**inputs, slots=slots)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        changed = (cache != inputs[name]).flatten(2).any(-1).nonzero().tolist()
        assert changed == sorted([slot, at] for slot, at in zip(slots.tolist(), [0, 37, 4], strict=True))


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_slot_are_steps_of_one_sequence(dtype):
    """Verifying drafted tokens at once gives, to the bit, what as many steps give; a repeated row changes nothing."""
    inputs = small_block(dtype, 4) | {"positions": torch.tensor([63, 64, 65, 65])}
    inputs["x"][3] = inputs["x"][2]
    caches = {name: inputs[name][:2].clone() for name in ("k_cache", "v_cache")}
    slots = torch.tensor([1, 1, 1, 1])
    together = appended(decode_block)(**inputs | caches, slots=slots)
    steps = []
    for row in range(4):
        step = row_of(inputs, row, ("x", "positions")) | caches
        out, *appended_to = appended(decode_block)(**step, slots=slots[:1])
        caches = dict(zip(caches, appended_to, strict=True))
        steps.append(out)
    assert_same_bits([torch.cat(steps), *caches.values()], list(together), what="one by one")


def test_same_bits_every_time_in_any_program_order():
    """Whichever program comes last, it adds the same numbers in the same order."""
    inputs = small_block(torch.bfloat16, 2)
    assert_repeatable(lambda: appended(decode_block)(**inputs))
    assert_program_order_free(lambda: appended(decode_block)(**inputs))
    inputs = attention_inputs(torch.bfloat16, SPLIT_LENGTHS[-2:], H=2, S=131)
    assert_program_order_free(lambda: [decode_attention(**inputs)])


def test_any_strides_of_the_rows():
    inputs = small_block(torch.bfloat16, 3)
    expected = appended(decode_block)(**inputs)
    wide = torch.cat([inputs["x"], inputs["x"]], dim=1)[:, 80:]
    assert_same_bits(appended(decode_block)(**inputs | {"x": wide}), expected, what="rows of a wider buffer")
    stacked = {name: torch.stack([inputs[name], inputs[name]], 1)[:, 1] for name in ("k_cache", "v_cache")}
    assert_same_bits([decode_block(**inputs | stacked)], expected[:1], what="caches of one layer of several")
    assert_same_bits([stacked["k_cache"]], expected[1:2], what="what was appended")


def test_caches_beyond_two_to_the_31_elements(tmp_path):
    """The stride of a slot fits 32 bits, its product with the slot does not. A sparse file stands in for the memory."""
    inputs = small_block(torch.bfloat16, 1)
    expected, *_ = appended(decode_block)(**inputs)
    slot, size = 2**30 + 2**20, 71 * 80
    for name in ("k_cache", "v_cache"):
        path = str(tmp_path / name)
        backing = torch.from_file(path, shared=True, size=2 * slot + size, dtype=torch.bfloat16)
        far = backing.as_strided((3, 71, 1, 80), (slot, 80, 80, 1))
        far[2] = inputs[name][0]
        inputs[name] = far
    assert_same_bits([decode_block(**inputs, slots=torch.tensor([2]))], [expected], what="a far slot")


def test_op_contract():
    """Each op writes what it says it writes, and fake tensors pass through."""
    B, H, D, C, F, S = 2, 1, 16, 16, 24, 5
    x, q, out = (torch.randn(B, C).bfloat16() for _ in range(3))
    z, y = torch.randn(B, C + F).bfloat16(), torch.empty(B, C).bfloat16()
    k, v = (torch.randn(B, S, H, D).bfloat16() for _ in range(2))
    ln_w, ln_b, w_in, b_in = (torch.randn(shape).bfloat16() for shape in ((C,), (C,), (3 * C + F, C), (3 * C + F,)))
    w_out, b_out = torch.randn(C, C + F).bfloat16(), torch.randn(2, C).bfloat16()
    cos, sin, at = torch.randn(S, 4), torch.randn(S, 4), torch.tensor([4, 0])
    counters, logits = torch.zeros(4, dtype=torch.int32), torch.zeros(B, 3 * C + F)
    check = torch.library.opcheck
    check(decode._decode_norm, (x, ln_w, ln_b, y, 1e-5))
    for slots in (None, at.flip(0) // 4):
        weights = (x, ln_w, ln_b, w_in, None, b_in, cos, sin, at, slots)
        check(decode._decode_project_in, (*weights, q, k, v, z, counters, H, 1e-5))
        attention = (q.view(B, H, D), k, v, at, slots, out.view(B, H, D), torch.zeros(B, H, 1, D + 2))
        check(decode._decode_attention, (*attention, torch.zeros(2, dtype=torch.int32), 0.25, 1))
    check(decode._decode_project_out, (z, w_out, None, b_out, x, out, torch.zeros(1, B, C), torch.zeros_like(counters)))
    quantized_w = quantize(w_in, 8)
    check(decode._decode_head, (x, ln_w, ln_b, *quantized_w, b_in, logits, 1e-5))


def test_compiles_without_clones():
    inputs = small_block(torch.bfloat16, 2)
    tensors = {name: t for name, t in inputs.items() if torch.is_tensor(t) and name not in ("k_cache", "v_cache")}

    def step(*given):
        caches = {name: torch.zeros(2, 71, 1, 80, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")}
        return decode_block(**dict(zip(tensors, given, strict=True)), **caches, heads=1)

    assert_compiles_without_clones(step, *tensors.values())
    head = head_inputs(torch.bfloat16, rows=2)
    assert_compiles_without_clones(decode_head, *head.values())


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"positions": torch.tensor([0, 71])}, r"expected 2 positions in 0\.\.70, got \[0, 71\]"),
            ({"slots": torch.tensor([0, 2])}, r"expected 2 slots in 0\.\.1, got \[0, 2\]"),
            ({"heads": 3}, "expected heads that divide C = 80, got 3"),
            ({"ln_w": torch.ones(79)}, r"expected ln_w \[80\], got \[79\]"),
            ({"w_in": torch.ones(341, 80)}, r"expected w_in \[3C\+F, 80\] and w_out \[80, C\+F\], got \[341, 80\]"),
            ({"w_out": torch.ones(180, 80).T}, "expected w_out contiguous"),
            ({"x": torch.ones(2, 80).half()}, "expected ln_w in torch.float16 like x"),
            ({"cos": torch.ones(71, 41), "sin": torch.ones(71, 41)}, r"expected cos \[S, R/2\] with R at most 80"),
            ({"k_cache": torch.ones(2, 71, 80, 1).transpose(2, 3)}, "expected k_cache and v_cache with equal strides"),
        ],
    )
    def test_block(self, change, message):
        with pytest.raises(ValueError, match=f"decode_block: {message}"):
            decode_block(**small_block(torch.float32, 2) | change)

    def test_head(self):
        inputs = head_inputs(torch.float32, rows=2)
        with pytest.raises(ValueError, match=r"decode_head: expected head_w \[131, 240\], got \[131, 239\]"):
            decode_head(**inputs | {"head_w": torch.ones(131, 239)})
        codes = quantize(torch.ones(131, 256), 4, 64)
        codes = codes._replace(scale=codes.scale[:, :1].contiguous())
        with pytest.raises(ValueError, match="decode_head: expected head_w in groups of 32, 64 or 128, got 256"):
            decode_head(torch.ones(2, 256), torch.ones(256), torch.ones(256), codes, torch.ones(131))

    @pytest.mark.parametrize(
        ("K", "change", "message"),
        [
            (30, {}, "expected head_w in whole words, got 30 columns of codes from byte 0 on"),
            (32, {"scale": torch.ones(7).bfloat16()}, r"expected the scale of head_w \[8\], got \[7\]"),
            (
                32,
                {"codes": torch.ones(257, dtype=torch.int8)[1:].view(8, 32)},
                "in whole words, got 32 columns of .* byte 1",
            ),
        ],
    )
    def test_head_of_codes(self, K, change, message):
        inputs = {"x": torch.ones(1, K), "ln_w": torch.ones(K), "ln_b": torch.ones(K), "head_b": torch.ones(8)}
        with pytest.raises(ValueError, match=f"decode_head: .*{message}"):
            decode_head(**inputs, head_w=quantize(torch.ones(8, K), 8)._replace(**change))
