"""What the hardware can do: issue rates of an SM's pipes, and the bounds that follow from them. `train.gpus` has the
peaks of whole boards.

Sources
[A100]   NVIDIA A100 Tensor Core GPU Architecture (whitepaper, 2020): 108 SMs at 1.41 GHz, 312 TFLOP/s dense bf16 (1,024
         FMA per clock and SM), 64 FP32 and 64 INT32 lanes, 164 KB shared memory, 32 load/store units per SM, L2 reads
         of 5,120 bytes per clock in 80 slices of 64. Datasheets of A100-80G and A800-80G: 2,039 GB/s
[H100]   NVIDIA H100 Tensor Core GPU Architecture (whitepaper, 2022): 132 SMs, 989.4 TFLOP/s dense bf16 (2,048 FMA per
         clock and SM, so 1.83 GHz), 128 FP32 and 64 INT32 lanes, 228 KB shared memory. Datasheets, SXM5: H100
         3.35 TB/s, H200 4.8 TB/s
[Guide]  CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", columns 8.0 and 9.0 (results per
         clock and SM): FP32 64, 128; integer add, compare, logic, shift 64, 64; integer multiply-add 64, 64; special
         functions 16, 16; warp shuffle 32, 32. "Features and Technical Specifications": registers, warps, blocks
[Sun22]  Sun, Li, Geng, Stuijk, Corporaal, arXiv:2206.02874: mma.sync m16n8k16 reaches the peak of the A100
[Luo24]  Luo et al., arXiv:2402.13499, 2501.12084: on Hopper mma.sync reaches about 63% of the peak, wgmma nearly all

Assumed, not published: F2FP (two floats to a packed pair) at half the rate of the integer pipe; 128 bytes per clock for
shared memory on both (32 banks of 4 bytes), which HGMMA's operands use too; 64 bytes per clock and SM from L2.
"""

from dataclasses import dataclass

from bench.sass import Counts
from train.gpus import GPUS, Gpu


@dataclass(frozen=True)
class Sm:
    """One streaming multiprocessor: what it holds, and results (lanes) or bytes per clock of each pipe."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes for all blocks; each costs 1,024 more than it asks for
    shared_per_block: int
    tensor_flops: float
    mma_sync_flops: float  # of HMMA, the only way on sm_80 and the slow one on sm_90
    fp32: int
    int32: int
    int_multiply: int
    mufu: int
    convert: int
    shuffle: int
    lsu: int
    shared_bytes: int
    l2_bytes: int
    issue: int = 128  # four schedulers, one warp instruction each


SMS = {
    80: Sm(
        registers=65536, warps=64, blocks=32, shared=164 * 1024, shared_per_block=163 * 1024,
        tensor_flops=2048, mma_sync_flops=2048, fp32=64, int32=64, int_multiply=64, mufu=16, convert=32, shuffle=32,
        lsu=32, shared_bytes=128, l2_bytes=64,
    ),
    90: Sm(
        registers=65536, warps=64, blocks=32, shared=228 * 1024, shared_per_block=227 * 1024,
        tensor_flops=4096, mma_sync_flops=0.63 * 4096, fp32=128, int32=64, int_multiply=64, mufu=16, convert=32,
        shuffle=32, lsu=32, shared_bytes=128, l2_bytes=64,
    ),
}  # fmt: skip


class Board(Gpu):
    """A GPU of the trainer's with the clock that follows from its figures."""

    @property
    def clock(self) -> float:
        """The clock in Hz at which the tensor cores give `flops`."""
        return self.flops / (self.sms * SMS[self.arch].tensor_flops)


REPORTED = {arch: Board(**vars(GPUS[name])) for arch, name in ((80, "A800-80G"), (90, "H100"))}


def blocks_per_sm(arch: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks of that size an SM holds at once; 0 when not even one fits. `shared` in bytes per block."""
    sm = SMS[arch]
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256
    shared_held = -(-(shared + 1024) // 128) * 128
    return min(
        sm.blocks, sm.warps // warps, sm.registers // registers_per_warp // 4 * 4 // warps, sm.shared // shared_held
    )


def pipe_cycles(counts: Counts, warps: float, arch: int, bulk_bytes: int = 0) -> dict[str, float]:
    """SM cycles each pipe needs when `warps` warps pass through that code once. `bulk_bytes` arrive by bulk copy."""
    sm, lanes = SMS[arch], 32 * warps
    hgmma = sum(n for name, n in counts.tensor.items() if name.startswith("HGMMA"))
    fast = counts.flops if hgmma else 0
    slow = counts.flops - fast
    loads = warps * counts.global_load_bytes.total() + bulk_bytes
    shared = warps * counts.shared_bytes + warps / 4 * counts.hgmma_shared_bytes + bulk_bytes
    fma = (counts.fp32 + counts.int_multiply) / sm.fp32
    return {
        "tensor": warps * (fast / sm.tensor_flops + slow / sm.mma_sync_flops),
        "fma": lanes * max(fma, counts.int_multiply / sm.int_multiply),
        "alu": lanes * (counts.int32 / sm.int32 + counts.convert / sm.convert),
        "mufu": lanes * counts.mufu / sm.mufu,
        "lsu": lanes * (counts.lsu + counts.shuffle) / sm.lsu,
        "shared": shared / sm.shared_bytes,
        "l2": loads / sm.l2_bytes,
        "issue": lanes * counts.instructions / sm.issue,
    }


def overlapped(cycles: dict[str, float]) -> float:
    """What pipes that work side by side take together: the 4-norm, so that a second busy pipe costs something."""
    return sum(c**4 for c in cycles.values()) ** 0.25


def loop_cycles(counts: Counts, warps: float, arch: int, bulk_bytes: int = 0) -> float:
    """Expected SM cycles of one pass through a hot loop at full efficiency.

    Floating-point work in a loop with tensor-core work stands between two of its products (softmax): those take turns.
    Addresses and copies depend on neither.
    """
    pipes = pipe_cycles(counts, warps, arch, bulk_bytes)
    if not (counts.flops and counts.fp32 + counts.mufu):
        return overlapped(pipes)
    vector = max(pipes[pipe] for pipe in ("fma", "alu", "mufu", "issue"))
    return overlapped({"chain": pipes["tensor"] + vector, "shared": pipes["shared"], "l2": pipes["l2"]})
