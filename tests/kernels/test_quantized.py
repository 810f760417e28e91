"""Weights of 8 and 4 bits, and the layouts that a CPU decodes from: what they stand for, and rows apart."""

import pytest
import torch
import torch.nn.functional as F
from xiangxin_kernels import (
    QuantizedWeight,
    _cpu,
    decode_block,
    decode_block_ref,
    dequantize,
    linear,
    parallel_block,
    parallel_block_ref,
    prepack,
    quantize,
    quantized,
    unpacked,
)

from tests.kernels.decode_inputs import POSITIONS, appended, block_inputs
from tests.numerics import assert_no_worse_than_torch, check_op
from tests.op_contract import assert_same_bits

# Rows that fill blocks of 64 and 80 exactly, and rows that do neither nor end in torch's 16; groups of 64 and of 32.
SHAPES = [(320, 128), (131, 96)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


needs_bf16 = pytest.mark.skipif(not _cpu._has_bf16(), reason="oneDNN lays bf16 out for CPUs that multiply it alone")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_bf16)], ids=["AVX2", "AVX-512"], autouse=True)
def cpu(request, monkeypatch):
    """A CPU without bf16 arithmetic or AVX-512, and one with both: each has layouts of its own."""
    monkeypatch.setattr(_cpu, "_has_bf16", lambda: request.param)
    monkeypatch.setattr(_cpu, "_has_avx512", lambda: request.param)
    return request.param


one_cpu = pytest.mark.parametrize("cpu", [False], indirect=True, ids=["AVX2"])


def layouts(N: int, K: int) -> dict[str, _cpu.Weight]:
    weight = noise(N, K) * K**-0.5
    plain = {"fp32": weight, "bf16": weight.bfloat16(), "int8": quantize(weight, 8), "int4": quantize(weight, 4)}
    return plain | {f"{name} packed": prepack(value) for name, value in plain.items()}


LAYOUTS = list(layouts(64, 32))


def dense(N: int, K: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """What the weight of a layout stands for."""
    weight = layouts(N, K)[layout.removesuffix(" packed")]
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else dequantize(weight, dtype)


@one_cpu
class TestQuantize:
    def test_eight_bits_by_hand(self):
        weight = torch.tensor([[-127.0, 0.0, 63.4, 63.6], [0.0, 1.0, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
        codes, scale = quantize(weight, 8)
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
        assert scale.tolist() == [1.0, torch.tensor(2 / 127).bfloat16().item(), 0.0]
        assert codes.tolist() == [[-127, 0, 63, 64], [0, 64, -127, 32], [0, 0, 0, 0]]
        assert dequantize(QuantizedWeight(codes, scale), torch.float32)[0].tolist() == [-127.0, 0.0, 63.0, 64.0]

    def test_four_bits_by_hand(self):
        """The extreme of each group takes the code 0 whatever its sign; even columns of 8 come before odd ones."""
        weight = torch.zeros(1, 96)
        weight[0, :4] = torch.tensor([-8.0, 7.0, 1.2, -3.0])
        weight[0, 32:35] = torch.tensor([4.0, -3.5, -4.0])
        packed = quantize(weight, 4, 32)
        assert packed.codes.shape == (1, 48)
        assert packed.scale.tolist() == [[1.0, -0.5, 0.0]]
        assert [hex(byte) for byte in packed.codes[0, :4].tolist()] == ["0x90", "0x88", "0x5f", "0x88"]
        assert [hex(byte) for byte in packed.codes[0, 16:20].tolist()] == ["0xf0", "0x88", "0x8f", "0x88"]
        assert dequantize(packed, torch.float32)[0, 32:36].tolist() == [4.0, -3.5, -3.5, 0.0]

    @pytest.mark.parametrize("K", [32, 64, 96, 128, 192, 256])
    def test_four_bits_lie_as_a_tensor_core_takes_them(self, K):
        """Word by word: lane l of four has columns 8 l .. 8 l + 7 of each 32, whole runs of 128 columns together."""
        columns = torch.arange(K)
        weight = (columns % 16 - 8.0)[None]
        codes = quantize(weight, 4, 32).codes.view(-1).tolist()
        found = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
        run = 128 if K % 128 == 0 else 64 if K % 64 == 0 else 32
        expected = [
            start + 32 * part + 8 * lane + column
            for start in range(0, K, run)
            for lane in range(4)
            for part in range(run // 32)
            for column in (0, 2, 4, 6, 1, 3, 5, 7)
        ]
        assert found == [column % 16 for column in expected]

    @pytest.mark.parametrize(("bits", "group", "codes"), [(8, 256, range(-127, 128)), (4, 64, range(-8, 8))])
    def test_every_number_takes_the_nearest_code(self, bits, group, codes):
        weight = noise(24, 256)
        weight[3] *= 1e-30  # far below bf16's usual scales
        rounded = quantize(weight, bits)
        assert (rounded.bits, rounded.group, rounded.shape) == (bits, group, (24, 256))
        scale = rounded.scale.double().view(24, -1, 1).expand(-1, -1, group).reshape(24, 256)
        choices = torch.tensor(list(codes)).double()[:, None, None] * scale
        nearest = (choices - weight.double()).abs().amin(0)
        error = (dequantize(rounded, torch.float64) - weight.double()).abs()
        assert (error <= nearest * (1 + 1e-6)).all()

    def test_in_chunks_of_rows_as_in_one(self, monkeypatch):
        whole = [quantize(noise(50, 64), bits) for bits in (8, 4)]
        monkeypatch.setattr(quantized, "CHUNK", 16 * 64)
        for one, bits in zip(whole, (8, 4), strict=True):
            assert_same_bits(list(quantize(noise(50, 64), bits)), list(one), what=f"{bits} bits in chunks")

    @pytest.mark.parametrize(
        ("shape", "arguments", "message"),
        [
            ((4,), (8,), r"expected a weight \[N, K\], got \[4\]"),
            ((4, 64), (6,), "expected 8 or 4 bits, got 6"),
            ((4, 64), (8, 32), "expected no group with 8 bits, got 32"),
            ((4, 64), (4, 48), "expected a group of 32, 64 or 128, got 48"),
            ((4, 96), (4, 64), "expected a multiple of the group 64 as K, got 96"),
            ((4, 80), (4,), "expected a multiple of 32 columns for 4 bits, got 80"),
        ],
    )
    def test_refuses(self, shape, arguments, message):
        with pytest.raises(ValueError, match=f"quantize: {message}"):
            quantize(torch.zeros(shape), *arguments)


@pytest.mark.parametrize(("rows", "shape"), [(1024, (16, 48, 64)), (960, (12, 48, 80)), (90, (90, 48))])
def test_another_layout_holds_the_same_numbers(rows, shape, cpu):
    weight = noise(rows, 48).bfloat16()
    packed = prepack(weight)
    assert packed.is_mkldnn if cpu else packed.shape == shape
    assert torch.equal(unpacked(packed), weight)
    assert prepack(packed) is packed


def test_another_layout_passes_gradients_on():
    weight, x = noise(128, 48).bfloat16(), noise(20, 48).round().bfloat16()  # whole numbers: no sum rounds
    packed = prepack(weight).requires_grad_()
    linear(x, packed, torch.zeros(128).bfloat16()).sum().backward()
    assert packed.grad.layout == packed.layout
    assert torch.equal(unpacked(packed.grad), x.float().sum(0).bfloat16().expand(128, 48))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestLinear:
    @pytest.mark.parametrize("rows", [1, 5, _cpu.WIDEN_ROWS + 1])
    def test_numerics(self, layout, shape, rows, monkeypatch):
        monkeypatch.setattr(_cpu, "WIDEN_ELEMENTS", 3 * 80 * shape[1])  # several blocks, the last one smaller
        dtype = torch.float32 if "fp32" in layout else torch.bfloat16
        x, bias = noise(rows, shape[1], seed=1).to(dtype), noise(shape[0], seed=2).to(dtype)
        plain = F.linear(x, dense(*shape, layout, dtype), bias)
        exact = F.linear(x.double(), dense(*shape, layout, torch.float64), bias.double())
        for op in (linear, _cpu.linear_rows):
            assert_no_worse_than_torch(op(x, layouts(*shape)[layout], bias), plain, exact, what=f"{op.__name__}.out")

    def test_a_row_has_the_same_bits_in_any_company(self, layout, shape):
        dtype = torch.float32 if "fp32" in layout else torch.bfloat16
        x, bias, weight = noise(9, shape[1]).to(dtype), noise(shape[0]).to(dtype), layouts(*shape)[layout]
        alone = [_cpu.linear_rows(row, weight, bias) for row in x.split(1)]
        for rows in (2, 3, 8, 9):
            assert_same_bits([_cpu.linear_rows(x[:rows], weight, bias)], [torch.cat(alone[:rows])], what=f"{rows} rows")
        x[:8] = float("nan")
        assert_same_bits([_cpu.linear_rows(x, weight, bias)[8:]], [alone[8]], what="beside NaN")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bits(layout):
    """336 rows: cut into 8 chunks instead of 16, fp32's end otherwise within a vector."""
    N, K = (336, 2560) if "fp32" in layout else (320, 128)
    dtype = torch.float32 if "fp32" in layout else torch.bfloat16
    x, bias, weight = noise(2, K).to(dtype), noise(N).to(dtype), layouts(N, K)[layout]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(_cpu.linear_rows(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits([results[0], results[0]], results[1:], what="threads")


@needs_bf16
@pytest.mark.parametrize("cpu", [True], indirect=True, ids=["AVX-512"])
def test_a_row_in_onednn_s_layout_has_the_same_bits_in_any_company():
    """Of a weight so wide that oneDNN was seen to sum several rows in another order than one."""
    N, K = 1024, 2560
    x, bias, weight = noise(9, K, seed=1).bfloat16(), noise(N, seed=2).bfloat16(), prepack(noise(N, K).bfloat16())
    alone = torch.cat([_cpu.linear_rows(row, weight, bias) for row in x.split(1)])
    assert_same_bits([_cpu.linear_rows(x, weight, bias)], [alone], what="9 rows")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 16):
            torch.set_num_threads(n)
            assert_same_bits([_cpu.linear_rows(x, weight, bias)], [alone], what=f"{n} threads")
    finally:
        torch.set_num_threads(threads)


def packable_block(bits: int | None, packed: bool, rows: int = len(POSITIONS)) -> dict:
    """decode_block's inputs in bf16 with rounded weights, or none; 3C + F and C are multiples of 64."""
    inputs = block_inputs(torch.bfloat16, POSITIONS[:rows], H=4, D=48, hidden=320)
    for name in ("w_in", "w_out"):
        weight = inputs[name] if bits is None else quantize(inputs[name], bits)
        inputs[name] = prepack(weight) if packed else weight
    return inputs


@pytest.mark.parametrize(("bits", "packed"), [(None, True), (8, False), (8, True), (4, False), (4, True)])
class TestBlocks:
    def test_decode(self, bits, packed):
        inputs, plain = packable_block(bits, packed), packable_block(bits, packed=False)

        def run(**others):
            return decode_block(**others | {name: inputs[name] for name in ("w_in", "w_out")})

        check_op(appended(run), appended(decode_block_ref), plain, wrt=(), name="decode_block")

    def test_prefill(self, bits, packed):
        inputs, plain = packable_block(bits, packed), packable_block(bits, packed=False)
        rest = {name: value for name, value in plain.items() if name not in ("x", "k_cache", "v_cache", "positions")}
        x = noise(2, 17, plain["x"].shape[1]).bfloat16()

        def exactly(w_in, w_out, x, **others):
            w_in, w_out = (w if isinstance(w, torch.Tensor) else dequantize(w, x.dtype) for w in (w_in, w_out))
            return parallel_block_ref(w_in=w_in, w_out=w_out, x=x, **others)

        def run(**others):
            return parallel_block(**others | {name: inputs[name] for name in ("w_in", "w_out")})

        check_op(run, exactly, rest | {"x": x}, wrt=(), name="parallel_block")


def test_a_weight_of_the_wrong_shape_is_named():
    inputs = packable_block(8, packed=True)
    inputs["w_out"] = prepack(quantize(torch.zeros(100, 512), 8))
    x = torch.zeros(1, 3, 192, dtype=torch.bfloat16)
    rest = {name: value for name, value in inputs.items() if name not in ("x", "k_cache", "v_cache", "positions")}
    with pytest.raises(ValueError, match=r"parallel_block: expected w_out \[192, 512\], got \[100, 512\]"):
        parallel_block(x, **rest)
