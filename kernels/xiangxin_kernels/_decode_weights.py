"""Device code that brings decode's weights, and x beside them, from memory to the tensor cores.

Weights go from the loads into a product's operands without leaving their thread. A tensor core takes column k of both
its operands from the same lane of four, in runs of a few columns. A thread's 16 bytes are a longer run; which columns
they are does not matter as long as both operands agree. So a tile is loaded with 8 of its rows, then the slices, then
the rows beyond 8 along one dimension and 4 lanes of 16 bytes along the other, which is how the compiler deals elements
out to lanes, warps and registers, and `operand` only renames. Nothing moves: tests read that off the compiled code.

Of a slice's BLOCK_K columns a lane owns OWN, and multiplies PART of them at once, 16 bytes of x. The i-th of part p of
lane l is column

    16 bits    8 l + i           BLOCK_K 32     OWN 8     PART 8
     8 bits    16 l + 8 p + i    BLOCK_K 64     OWN 16    PART 8
     4 bits    32 p + 8 l + i    BLOCK_K 128    OWN 32    PART 8     as quantized.py stores them
"""

import triton
import triton.language as tl

LANES = tl.constexpr(4)  # of an operand that share a row
TILE = tl.constexpr(8)  # rows of an operand that lie in lanes

# Codes in the halves of a word become bf16 numbers in two to four instructions, all exact: the low seven bits of the
# bf16 number 128 are free, and the eighth makes 256 of it. 136 is 128 and the 8 that codes of 4 bits are too large by.
FOUR_BITS = """{ .reg .b32 t, one, zero;
    lop3.b32 t, $1, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 one, 0x3F803F80; mov.b32 zero, 0xC308C308; fma.rn.bf16x2 $0, t, one, zero; }"""
EIGHT_BITS = """{ .reg .b32 t, low, sign, minus; prmt.b32 t, $1, 0, SELECT;
    lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 sign, t, 0x00800080, 0x43004300, 0xEA;
    mov.b32 minus, 0xBF80BF80; fma.rn.bf16x2 $0, sign, minus, low; }"""
NIBBLES_ASM = tl.constexpr(FOUR_BITS)
BYTES_ASM = tl.constexpr((EIGHT_BITS.replace("SELECT", "0x4140"), EIGHT_BITS.replace("SELECT", "0x4342")))


@triton.jit
def places_of(HEIGHT: tl.constexpr, SLICES: tl.constexpr):
    """For a tile of HEIGHT rows as loaded, [SLICES HEIGHT, 1]: which row each place has, and which slice."""
    places = tl.arange(0, SLICES * HEIGHT)[:, None]
    return places // (SLICES * TILE) * TILE + places % TILE, places // TILE % SLICES


@triton.jit
def load_weights(w_ptr, first_n, N, first, end, K: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
                  SLICES: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The weights [SLICES BLOCK_N, BLOCK_K] of the step at column `first`, as stored: rounded ones in words."""
    PACKED: tl.constexpr = 32 // BITS if BITS < 16 else 1
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    rows, slices = places_of(BLOCK_N, SLICES)
    words = first // PACKED + slices * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = first_n + rows < N
    if MASKED:
        mask = mask & (words < end // PACKED)
    ptrs = w_ptr + (first_n + rows) * (K // PACKED) + words
    return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def load_first(w_ptr, first_n, N, first, end, K: tl.constexpr, SPLIT_K: tl.constexpr, BITS: tl.constexpr,
                BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """The weights of the first DEPTH steps."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    tiles = (load_weights(w_ptr, first_n, N, first, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED),)
    for i in tl.static_range(1, DEPTH):
        if i * STEP < SPLIT_K:
            ahead = first + i * STEP
            tile = load_weights(w_ptr, first_n, N, ahead, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED)
            tiles = tiles + (tile,)
    return tiles


@triton.jit
def not_before(x, PIN: tl.constexpr):
    """x, which with PIN stays in the registers it was loaded into up to here.

    The compiler else widens or moves it right behind the load, and waits for it there. The instruction itself goes
    away; the interpreter, which has none, needs no PIN.
    """
    if PIN:
        packed: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=packed)
    else:
        return x


@triton.jit
def _in_turns(a, b, c, d):
    """Four tensors [A, n] as one [A, 4 n]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4 * a.shape[1]])


@triton.jit
def _halves(words):
    """The two bf16 numbers in each word [A, n], the low one first: [A, 2 n]."""
    low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _bf16_bits(codes):
    """int32 codes as the bits of bf16 numbers, in the low half of a word."""
    return codes.to(tl.float32).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _nibbles(words, SHIFT: tl.constexpr, PIN: tl.constexpr):
    """Two codes of 4 bits, SHIFT and SHIFT + 16 bits up in each word, as two bf16 numbers in a word."""
    words = words >> SHIFT
    if PIN:
        return tl.inline_asm_elementwise(NIBBLES_ASM, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _bf16_bits((words & 0xF) - 8) | (_bf16_bits(((words >> 16) & 0xF) - 8) << 16)


@triton.jit
def _bytes(words, PAIR: tl.constexpr, PIN: tl.constexpr):
    """Two codes of 8 bits, the first two of each word or the last, as two bf16 numbers in a word."""
    if PIN:
        return tl.inline_asm_elementwise(BYTES_ASM[PAIR], "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        words = words >> (16 * PAIR)
        return _bf16_bits((words << 24) >> 24) | (_bf16_bits((words << 16) >> 24) << 16)


@triton.jit
def widen(stored, dtype: tl.constexpr, BITS: tl.constexpr, PIN: tl.constexpr):
    """Stored weights in `dtype`, exactly; quantized ones without their scale."""
    if BITS == 4:
        a, b = _nibbles(stored, 0, PIN), _nibbles(stored, 4, PIN)
        c, d = _nibbles(stored, 8, PIN), _nibbles(stored, 12, PIN)
        return _halves(_in_turns(a, b, c, d)).to(dtype)
    elif BITS == 8:
        words = tl.join(_bytes(stored, 0, PIN), _bytes(stored, 1, PIN))
        return _halves(tl.reshape(words, [stored.shape[0], 2 * stored.shape[1]])).to(dtype)
    else:
        return stored


@triton.jit
def parts_of(stored, COUNT: tl.constexpr):
    """A tile of weights as loaded in COUNT tiles, the first of which has the first of each lane's columns."""
    if COUNT == 1:
        return (stored,)
    else:
        HALF: tl.constexpr = stored.shape[1] // LANES // 2
        halves = tl.permute(tl.reshape(stored, [stored.shape[0], LANES, 2, HALF]), 0, 1, 3, 2)
        first, second = tl.split(halves)
        first = tl.reshape(first, [stored.shape[0], LANES * HALF])
        second = tl.reshape(second, [stored.shape[0], LANES * HALF])
        return parts_of(first, COUNT // 2) + parts_of(second, COUNT // 2)


@triton.jit
def operand(tile, SLICES: tl.constexpr, RUN: tl.constexpr):
    """A tile [SLICES n, columns] of weights or of x as loaded, now [SLICES, n, columns]: see the head of this file."""
    HEIGHT: tl.constexpr = tile.shape[0] // SLICES
    COLUMNS: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, [HEIGHT // TILE, SLICES, TILE, LANES, COLUMNS // LANES // RUN, RUN])
    return tl.reshape(tl.permute(tile, 1, 0, 2, 4, 3, 5), [SLICES, HEIGHT, COLUMNS])


@triton.jit
def for_products(scale, SLICES: tl.constexpr, ROWS: tl.constexpr):
    """Scales [SLICES n, lane], equal in all lanes, for products [SLICES, n, ROWS]: a lane has pairs of ROWS."""
    HEIGHT: tl.constexpr = scale.shape[0] // SLICES
    scale = tl.reshape(scale, [HEIGHT // TILE, SLICES, TILE, 1, LANES, 1])
    scale = tl.broadcast_to(scale, [HEIGHT // TILE, SLICES, TILE, ROWS // TILE, LANES, TILE // LANES])
    return tl.reshape(tl.permute(scale, 1, 0, 2, 3, 4, 5), [SLICES, HEIGHT, ROWS])
