"""Reads the machine code of a kernel: `cuobjdump -sass -res-usage` text -> instructions, loops, counts. Pure text work.

A loop is a natural loop of the control-flow graph (a back edge goes to a block that dominates it). Backward branches
alone would not do: ptxas moves the slow path of a barrier wait behind the kernel's end and branches back from there.
"""

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_LAST_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # with its modifiers, e.g. "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where it jumps to. A predicated CALL.REL.NOINC is how ptxas writes a far jump."""
        found = _LAST_ADDRESS.search(self.operands) if self.base in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Listing:
    """One kernel: its instructions in address order, registers per thread and bytes of stack per thread."""

    instructions: tuple[Instruction, ...]
    registers: int
    stack: int


def parse(text: str) -> Listing:
    """Reads the output of `cuobjdump -sass -res-usage` for a cubin with one kernel."""
    usage = _USAGE.search(text)
    instructions = tuple(
        Instruction(int(address, 16), predicate or None, opcode, operands.strip())
        for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
    )
    if usage is None or not instructions:
        raise ValueError("sass: expected one kernel with its resource usage, found none")
    return Listing(instructions, int(usage[1]), int(usage[2]))


def _blocks(instructions: tuple[Instruction, ...]) -> tuple[list[range], list[set[int]]]:
    """Basic blocks as ranges of instruction indices, and the successors of each."""
    at = {i.address: n for n, i in enumerate(instructions)}
    starts = {0}
    for n, i in enumerate(instructions):
        if i.target in at:
            starts.add(at[i.target])
        if i.base in ("BRA", "CALL", "EXIT", "RET"):
            starts.add(n + 1)
    edges = sorted(starts - {len(instructions)}) + [len(instructions)]
    blocks = [range(a, b) for a, b in itertools.pairwise(edges)]
    block_at = {b.start: n for n, b in enumerate(blocks)}
    successors: list[set[int]] = []
    for n, block in enumerate(blocks):
        last = instructions[block[-1]]
        follows = {block_at[at[last.target]]} if last.target in at else set()
        conditional = last.predicate is not None or "," in last.operands
        ends = last.base in ("BRA", "EXIT", "RET") and not conditional
        if not ends and n + 1 < len(blocks):
            follows.add(n + 1)
        successors.append(follows)
    return blocks, successors


def _dominators(successors: list[set[int]]) -> list[set[int]]:
    """For every block the blocks on all paths from the entry to it; unreachable blocks are dominated by everything."""
    everything = set(range(len(successors)))
    predecessors: list[set[int]] = [set() for _ in successors]
    for n, follows in enumerate(successors):
        for s in follows:
            predecessors[s].add(n)
    dominators = [{0}] + [set(everything) for _ in successors[1:]]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            before = [dominators[p] for p in predecessors[n]]
            new = (set.intersection(*before) if before else set(everything)) | {n}
            if new != dominators[n]:
                dominators[n], changed = new, True
    return dominators


def loops(instructions: tuple[Instruction, ...]) -> list[tuple[Instruction, ...]]:
    """The natural loops in order of their headers, each as its instructions; loops that share a header are one."""
    blocks, successors = _blocks(instructions)
    dominators = _dominators(successors)
    predecessors: list[set[int]] = [set() for _ in successors]
    for n, follows in enumerate(successors):
        for s in follows:
            predecessors[s].add(n)
    bodies: dict[int, set[int]] = {}
    reachable = {n for n in range(len(blocks)) if len(dominators[n]) < len(blocks) or n == 0}
    for n in sorted(reachable):
        for header in successors[n] & dominators[n]:
            body, front = bodies.setdefault(header, {header}), [n]
            while front:
                block = front.pop()
                if block not in body:
                    body.add(block)
                    front.extend(predecessors[block] & reachable)
    return [
        tuple(instructions[i] for block in sorted(body) for i in blocks[block]) for _, body in sorted(bodies.items())
    ]


def is_tensor(i: Instruction) -> bool:
    return i.base in ("HMMA", "HGMMA", "IMMA", "DMMA", "QGMMA", "IGMMA")


def is_global_load(i: Instruction) -> bool:
    return i.base in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")


def hot_loops(instructions: tuple[Instruction, ...]) -> list[tuple[Instruction, ...]]:
    """The innermost loops around tensor-core instructions, in program order (the K or KV loops of a kernel).

    Without tensor-core instructions: the innermost loop with the most global loads. Without loops: nothing.
    """
    found = loops(instructions)

    def innermost(wanted) -> list[tuple[Instruction, ...]]:
        holding = [loop for loop in found if any(wanted(i) for i in loop)]
        spans = [{i.address for i in loop if wanted(i)} for loop in holding]
        whole = [{i.address for i in loop} for loop in holding]
        return [
            loop
            for n, loop in enumerate(holding)
            if not any(whole[m] < whole[n] and spans[m] for m in range(len(holding)))
        ]

    if any(is_tensor(i) for i in instructions):
        return innermost(is_tensor)
    candidates = innermost(is_global_load)
    return [max(candidates, key=lambda loop: sum(is_global_load(i) for i in loop))] if candidates else []


@dataclass
class Counts:
    """What one pass through a stretch of code issues, per warp: instructions, tensor-core FLOPs, bytes of 32 lanes."""

    instructions: int = 0
    flops: int = 0
    tensor: Counter = field(default_factory=Counter)  # opcode shape -> how many, e.g. {"HMMA.16816": 64}
    hgmma_shared_bytes: int = 0  # operands that HGMMA reads from shared memory, per warpgroup
    fp32: int = 0
    int32: int = 0
    int_multiply: int = 0
    convert: int = 0
    mufu: int = 0
    shuffle: int = 0
    shared: int = 0  # instructions that touch shared memory, matrix loads included
    global_: int = 0  # ... and global memory; LDGSTS, which touches both, is here
    shared_bytes: int = 0
    global_load_bytes: Counter = field(default_factory=Counter)  # width in bits -> bytes
    global_store_bytes: Counter = field(default_factory=Counter)
    bulk: Counter = field(default_factory=Counter)
    barriers: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    register_requests: int = 0  # USETMAXREG: warp specialization really happened

    @property
    def lsu(self) -> int:
        """What passes through the load-store units, spills included."""
        return self.shared + self.global_ + self.spill_loads + self.spill_stores

    @property
    def wide_fraction(self) -> float:
        """Share of the bytes of LDG, LDGSTS and STG that move 16 bytes per thread; 1 where there are none."""
        moved = self.global_load_bytes + self.global_store_bytes
        return moved[128] / moved.total() if moved else 1.0


_FP32 = {"FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
_INT_MULTIPLY = {"IMAD", "IMUL", "IDP"}  # on the FMA pipe; ptxas also writes moves and shifts as IMAD.MOV, IMAD.SHL
_MUFU = {"MUFU", "POPC", "FLO", "BREV", "F2I", "I2F", "F2F", "FRND"}
_CONVERT = {"F2FP", "I2FP", "F2IP"}
_UNCOUNTED = {"NOP", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "BREAK", "WARPSYNC", "YIELD", "DEPBAR", "LDGDEPBAR"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LDGSTS", "ATOMG", "RED", "LD", "ST"}
_BARRIERS = {"BAR", "SYNCS", "WARPGROUP", "MEMBAR", "FENCE", "ERRBAR"}
_SPECIAL = {"LDC", "S2R", "CS2R", "S2UR", "B2R", "R2B", "CCTL", "ELECT", "VOTE", "VOTEU", "R2UR", "NANOSLEEP", "MATCH"}


def _width(i: Instruction) -> int:
    """Bits per thread of a load or store."""
    for modifier in i.opcode.split(".")[1:]:
        if modifier in ("128", "64"):
            return int(modifier)
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:])
    return 32


def _shared_bytes(i: Instruction) -> int:
    if i.base in ("LDSM", "STSM"):  # one, two or four 8x8 matrices of 16 bits
        return 128 * {"2": 2, "4": 4}.get(i.opcode.rpartition(".")[2], 1)
    return 4 * _width(i)


def _hgmma(i: Instruction, counts: Counts) -> None:
    m, n, k = (int(x) for x in i.opcode.split(".")[1].split("x"))
    counts.flops += 2 * m * n * k // 4  # per warp; the four warps of a group share it
    counts.tensor[f"HGMMA.{m}x{n}x{k}"] += 1
    operands = [o.strip() for o in i.operands.split(",")]
    counts.hgmma_shared_bytes += 2 * n * k + (2 * m * k if operands[1].startswith("gdesc") else 0)


def count(instructions) -> Counts:
    """Counts one pass through `instructions`, predicated ones as if executed."""
    c = Counts()
    for i in instructions:
        base = i.base
        c.instructions += 1
        if base == "HGMMA":
            _hgmma(i, c)
        elif base == "HMMA":
            shape = i.opcode.split(".")[1]
            m, n, k = int(shape[:2]), int(shape[2]), int(shape[3:])
            c.flops += 2 * m * n * k
            c.tensor[f"HMMA.{shape}"] += 1
        elif base in ("STL", "LDL"):
            c.spill_stores += base == "STL"
            c.spill_loads += base == "LDL"
        elif base in _SHARED:
            c.shared += 1
            c.shared_bytes += _shared_bytes(i)
        elif base in _GLOBAL:
            c.global_ += 1
            moved = c.global_store_bytes if base in ("STG", "ST", "RED") else c.global_load_bytes
            moved[_width(i)] += 4 * _width(i)
            c.shared_bytes += 4 * _width(i) if base == "LDGSTS" else 0
        elif base in ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKPF"):
            c.bulk[base] += 1
        elif base == "SHFL":
            c.shuffle += 1
        elif base == "USETMAXREG":
            c.register_requests += 1
        elif base in _BARRIERS:
            c.barriers += 1
        elif base in _MUFU:
            c.mufu += 1
        elif base in _CONVERT:
            c.convert += 1
        elif base in _FP32:
            c.fp32 += 1
        elif base in _INT_MULTIPLY:
            c.int_multiply += 1
        elif base not in _UNCOUNTED | _SPECIAL and not base.startswith("U"):
            c.int32 += 1
    return c
