"""Reads Triton's first intermediate language for one kind of bug: an element offset computed in 32 bits.

Tensors here pass 2^31 elements, so a position (something derived from the program id or from a loop counter) times a
stride must be widened to 64 bits before the product. Position times tile size is a position again and stays below the
extent it walks. What tells a stride from a tile size: a stride is a kernel argument, or a constant that is no power of
two, or the second factor a position meets. A division or comparison ends the trail: its result is a tile index.
"""

import re
from dataclasses import dataclass

_RESULT = re.compile(r"^\s*(%[\w#]+)(?::\d+)?\s*=\s*(.*)$")
_VALUE = re.compile(r"%[\w#]+")
_ENDS = ("div", "rem", "cmp", "shr", "tt.load", "tt.descriptor", "tt.reduce", "tt.dot")


@dataclass(frozen=True)
class _Value:
    position: int = 0  # 0: none; 1: a program id or loop counter; 2: one that met a tile size
    constant: int | None = None
    product: str | None = None  # the 32-bit product it carries


def _constant(text: str) -> int | None:
    found = re.search(r"arith\.constant (?:dense<)?(-?\d+)>? :", text)
    return int(found[1]) if found else None


def _join(values: list[_Value]) -> _Value:
    product = next((v.product for v in values if v.product), None)
    return _Value(max((v.position for v in values), default=0), None, product)


def _multiply(a: _Value, b: _Value, narrow: bool, line: str) -> _Value:
    joined = _join([a, b])
    factor = b if a.position else a
    if not joined.position or factor.constant in (0, 1):
        return joined
    tile = factor.constant is not None and factor.constant & (factor.constant - 1) == 0
    if tile and joined.position == 1:
        return _Value(2, None, joined.product)
    return _Value(2, None, joined.product or (line.strip() if narrow else None))


def i32_offset_products(ttir: str) -> list[str]:
    """The lines whose 32-bit product of a position and a stride ends up in a pointer; empty when all is well."""
    values: dict[str, _Value] = {}
    found: dict[str, None] = {}
    regions: list[tuple[str | None, list[str]]] = []  # of open braces: the result of the op, its loop-carried values

    def operands(text: str) -> list[_Value]:
        return [values.get(name, _Value()) for name in _VALUE.findall(text)]

    for _ in range(3):  # loop-carried values settle
        for line in ttir.splitlines():
            code = line.partition(" loc(")[0]
            match = _RESULT.match(code)
            name, text = (match[1], match[2]) if match else (None, code.strip())
            if text.startswith("scf.for"):
                counter, bounds = re.match(r"scf\.for (%\w+) = (.*?)(?: iter_args\(|\s*->|\s*:)", text + " :").groups()
                values[counter] = _Value(1, None, _join(operands(bounds)).product)
                carried = re.findall(r"(%\w+) = (%[\w#]+)", text.partition("iter_args(")[2])
                for inner, start in carried:
                    values[inner] = _join([values.get(inner, _Value()), *operands(start)])
                regions.append((name, [inner for inner, _ in carried]))
            elif text.startswith("scf.yield"):
                owner, carried = regions[-1] if regions else (None, [])
                given = operands(text)
                for n, value in enumerate(given):
                    if n < len(carried):
                        values[carried[n]] = _join([values.get(carried[n], _Value()), value])
                    if owner:
                        result = f"{owner}#{n}" if len(given) > 1 else owner
                        values[result] = _join([values.get(result, _Value()), value])
            elif code.rstrip().endswith("{") and not text.startswith("}"):
                regions.append((name, []))
            elif text.startswith("}") and regions and not code.rstrip().endswith("{"):
                regions.pop()
            elif name and "tt.get_program_id" in text:
                values[name] = _Value(1)
            elif name and text.startswith("arith.constant"):
                values[name] = _Value(constant=_constant(text))
            elif name and text.startswith("arith.muli"):
                a, b = operands(text)
                values[name] = _multiply(a, b, bool(re.search(r": (?:tensor<[\dx]*x)?i32", code)), code)
            elif name and text.startswith("tt.addptr"):
                offset = operands(text)[1]
                if offset.product:
                    found[offset.product] = None
                values[name] = _Value()
            elif name and any(end in text.partition(" ")[0] for end in _ENDS):
                values[name] = _Value()
            elif name:
                given = operands(text)
                values[name] = given[0] if len(given) == 1 else _join(given)
    return list(found)
