"""How decode's kernels widen codes: the assembly, which the interpreter does not run, by hand."""

import re

import pytest
import torch
from xiangxin_kernels import _decode_weights


def _bf16(word: int) -> torch.Tensor:
    """The two bf16 numbers in a word, the low one first."""
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def _run(assembly: str, word: int) -> torch.Tensor:
    """What four of PTX's instructions make of `word`, as the two bf16 numbers in the result."""
    registers = {"$1": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in assembly.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = re.split(r",\s*", operands)
        given = [value(source) for source in sources]
        match name, *given:
            case "mov.b32", a:
                registers[target] = a
            case "lop3.b32", a, b, c, 0xEA:
                registers[target] = (a & b) | c
            case "prmt.b32", a, b, selector:
                wide = (a | b << 32).to_bytes(8, "little")
                chosen = bytes(wide[selector >> 4 * n & 7] for n in range(4))
                registers[target] = int.from_bytes(chosen, "little")
            case "fma.rn.bf16x2", a, b, c:
                exact = _bf16(a).double() * _bf16(b).double() + _bf16(c).double()
                low, high = exact.bfloat16().view(torch.uint16).tolist()
                registers[target] = low | high << 16
            case _:
                raise AssertionError(f"expected an instruction known here, got {line!r}")
    return _bf16(registers["$0"])


@pytest.mark.parametrize("shift", [0, 4, 8, 12])
def test_four_bits(shift):
    for low in range(16):
        for high in range(16):
            word = 0xA5C3_5A3C & ~(0x000F000F << shift) | low << shift | high << 16 + shift
            assert _run(_decode_weights.FOUR_BITS, word >> shift).tolist() == [low - 8, high - 8]


@pytest.mark.parametrize("pair", [0, 1])
def test_eight_bits(pair):
    assembly = _decode_weights.BYTES_ASM.value[pair]
    for low in range(-128, 128):
        for high in (-128, -127, -1, 0, 1, 64, 127, low):
            codes = torch.tensor([low, high, 99, -77] if pair == 0 else [99, -77, low, high], dtype=torch.int8)
            word = codes.view(torch.int32).item() & 0xFFFFFFFF
            assert _run(assembly, word).tolist() == [low, high]
