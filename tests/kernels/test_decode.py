"""One token per row against the cache: numerics, and what a row may depend on."""

import math

import pytest
import torch
import torch.nn.functional as F
from xiangxin_kernels import (
    _cpu,
    decode_attention,
    decode_attention_ref,
    decode_block,
    decode_block_ref,
    decode_head,
    decode_head_ref,
    parallel_block,
)

from tests.kernels.decode_inputs import (
    BLOCK_ROWS,
    LENGTHS,
    POSITIONS,
    appended,
    attention_inputs,
    block_inputs,
    head_inputs,
    row_of,
)
from tests.numerics import assert_no_worse_than_torch, check_op
from tests.op_contract import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
class TestNumerics:
    def test_attention(self, dtype):
        check_op(decode_attention, decode_attention_ref, attention_inputs(dtype), wrt=())

    def test_attention_with_a_scale(self, dtype):
        check_op(decode_attention, decode_attention_ref, attention_inputs(dtype) | {"scale": 0.3}, wrt=())

    def test_block(self, dtype):
        inputs = block_inputs(dtype, POSITIONS)
        check_op(appended(decode_block), appended(decode_block_ref), inputs, wrt=(), name="decode_block")

    def test_head(self, dtype):
        check_op(decode_head, decode_head_ref, head_inputs(dtype), wrt=())

    def test_widened_products(self, dtype, monkeypatch):
        monkeypatch.setattr(_cpu, "WIDEN_ELEMENTS", 7 * 240)
        monkeypatch.setattr(_cpu, "_has_bf16", lambda: False)
        inputs = head_inputs(dtype, rows=_cpu.WIDEN_ROWS)
        x, weight, bias = (inputs[name] for name in ("x", "head_w", "head_b"))
        plain, exact = F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
        assert_no_worse_than_torch(_cpu.linear(x, weight, bias), plain, exact, what="linear.out")


def test_widened_products_leave_gradients_to_torch(monkeypatch):
    monkeypatch.setattr(_cpu, "_has_bf16", lambda: False)
    x, weight, bias = (
        torch.randn(shape).bfloat16().requires_grad_() for shape in ((_cpu.WIDEN_ROWS, 16), (4, 16), (4,))
    )
    _cpu.linear(x, weight, bias).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_widening_scratch_outlives_inference_mode(monkeypatch):
    monkeypatch.setattr(_cpu, "_has_bf16", lambda: False)
    monkeypatch.setattr(_cpu, "_scratch", type(_cpu._scratch)())
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((_cpu.WIDEN_ROWS, 16), (4, 16), (4,)))
    with torch.inference_mode():
        expected = _cpu.linear(x, weight, bias)
    assert_same_bits([_cpu.linear(x, weight, bias)], [expected], what="outside inference mode")


@pytest.mark.parametrize("dtype", DTYPES)
class TestRows:
    """A row is the same bits in any batch. `test_the_check_can_fail` shows that plain torch's are not."""

    def test_attention(self, dtype):
        inputs = attention_inputs(dtype)
        together = decode_attention(**inputs)
        for row in range(len(LENGTHS)):
            alone = decode_attention(**row_of(inputs, row, ("q", "k_cache", "v_cache", "lengths")))
            assert_same_bits([alone], [together[row : row + 1]], what=f"row {row} alone")

    @pytest.mark.parametrize("hidden", [500, 4096])
    def test_block(self, dtype, hidden):
        inputs = block_inputs(dtype, POSITIONS, hidden=hidden)
        parts = [appended(decode_block)(**row_of(inputs, row, BLOCK_ROWS)) for row in range(len(POSITIONS))]
        together = appended(decode_block)(**inputs)
        order = torch.tensor([3, 1, 4, 0, 2])
        shuffled = appended(decode_block)(**inputs | {name: inputs[name][order] for name in BLOCK_ROWS})
        for i, whole in enumerate(together):
            assert_same_bits([torch.cat([part[i] for part in parts])], [whole], what=f"rows alone, output {i}")
            assert_same_bits([shuffled[i]], [whole[order]], what=f"rows in another order, output {i}")

    def test_head(self, dtype):
        inputs = head_inputs(dtype)
        together = decode_head(**inputs)
        for row in range(5):
            assert_same_bits([decode_head(**row_of(inputs, row, ("x",)))], [together[row : row + 1]], what="row alone")


def test_the_check_can_fail():
    """The same comparison on torch's own batched product, which the ops above would be without their care."""
    inputs = head_inputs(torch.float32)
    together = decode_head_ref(**inputs)
    rows = torch.cat([decode_head_ref(**row_of(inputs, row, ("x",))) for row in range(5)])
    with pytest.raises(AssertionError, match="differs in"):
        assert_same_bits([rows], [together], what="rows alone")


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_beyond_a_row_is_never_read(dtype, poison):
    inputs = attention_inputs(dtype)
    clean = decode_attention(**inputs)
    beyond = torch.arange(96)[None, :, None, None] >= LENGTHS[:, None, None, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].masked_fill(beyond, poison)
    assert_same_bits([decode_attention(**inputs)], [clean], what="poisoned")

    inputs = block_inputs(dtype, POSITIONS)
    clean = decode_block(**{name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()})
    beyond = torch.arange(64)[None, :, None, None] >= POSITIONS[:, None, None, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].masked_fill(beyond, poison)
    assert_same_bits([decode_block(**inputs)], [clean], what="poisoned block")


def test_writes_the_cache_at_the_positions_and_nowhere_else():
    inputs = block_inputs(torch.float32, POSITIONS)
    _, *caches = appended(decode_block)(**inputs)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        changed = (cache != inputs[name]).flatten(2).any(-1)
        assert changed.nonzero().tolist() == [[row, position] for row, position in enumerate(POSITIONS.tolist())]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_slot_are_steps_of_one_sequence(dtype):
    """Verifying three drafted tokens at once gives, to the bit, what three decode steps give."""
    inputs = block_inputs(dtype, torch.tensor([7, 8, 9]))
    caches = {name: inputs[name][:2].clone() for name in ("k_cache", "v_cache")}
    slots = torch.tensor([1, 1, 1])
    together = appended(decode_block)(**inputs | caches, slots=slots)
    steps = []
    for row in range(3):
        step = row_of(inputs, row, ("x", "positions")) | caches
        out, *appended_to = appended(decode_block)(**step, slots=slots[:1])
        caches = dict(zip(caches, appended_to, strict=True))
        steps.append(out)
    assert_same_bits([torch.cat(steps), *caches.values()], list(together), what="one by one")


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots(dtype):
    """Rows may stand anywhere in a larger cache."""
    inputs = block_inputs(dtype, POSITIONS)
    slots = torch.tensor([6, 2, 0, 3, 5])
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.cat([inputs[name], inputs[name][:3] * 2])
    check_op(appended(decode_block), appended(decode_block_ref), inputs | {"slots": slots}, wrt=(), name="decode_block")


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_give_what_the_whole_sequence_gives(dtype):
    """Row t of `parallel_block` is decode step t: the two layouts of keys agree, and so do their positions."""
    T = 40
    inputs = block_inputs(dtype, torch.zeros(1, dtype=torch.int64))
    weights = {name: x for name, x in inputs.items() if name not in BLOCK_ROWS}
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in weights.items()}
    sequence = torch.randn(1, T, 240, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = parallel_block(sequence.double(), **wide)
    plain = parallel_block(sequence, **weights)
    k_cache, v_cache = (torch.full((1, T, 3, 80), math.nan, dtype=dtype) for _ in "kv")
    steps = [
        decode_block(sequence[:, t], **weights, k_cache=k_cache, v_cache=v_cache, positions=torch.tensor([t]))
        for t in range(T)
    ]
    assert_no_worse_than_torch(torch.stack(steps, 1), plain, exact, what="decode_block.steps")


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lengths": torch.tensor([1, 2, 3, 4, 97])}, "5 lengths in 1..96, got"),
            ({"lengths": torch.tensor([1, 2, 3, 4, 0])}, "5 lengths in 1..96, got"),
            ({"lengths": torch.tensor([1, 2])}, "5 lengths"),
            ({"v_cache": torch.zeros(5, 95, 3, 80)}, "expected caches"),
            ({"q": torch.zeros(5, 2, 80)}, "expected caches"),
            ({"slots": torch.tensor([0, 1, 2, 3, 5])}, "5 slots in 0..4, got"),
        ],
    )
    def test_attention(self, change, message):
        with pytest.raises(ValueError, match=f"decode_attention: expected.*{message.removeprefix('expected ')}"):
            decode_attention(**attention_inputs(torch.float32) | change)

    @pytest.mark.parametrize("positions", [[0, 1, 2, 3, 64], [0, 1, 2, 3, -1], [0, 1]])
    def test_block(self, positions):
        inputs = block_inputs(torch.float32, POSITIONS) | {"positions": torch.tensor(positions)}
        with pytest.raises(ValueError, match=r"decode_block: expected 5 positions in 0\.\.63, got"):
            decode_block(**inputs)
