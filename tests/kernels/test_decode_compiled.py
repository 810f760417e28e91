"""What the compiler makes of decode's kernels: what the claims about their bits and their loads rest on."""

import re
from collections import Counter

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xiangxin_kernels._decode_gemv import _row_statistics, _statistics
from xiangxin_kernels._tuning import DECODE_WARPS

from bench import roofline, sass, static, static_decode
from bench.static_compile import Compiled, Job, compile_all, compile_job

JOBS = [job for op in ("decode_block", "decode_head") for job in static.jobs_of(op)]
ATTENTION = [job for job in static.jobs_of("decode_attention") if job.arch == 90]


@pytest.fixture(scope="module")
def compiled() -> dict[Job, Compiled]:
    return {job: kernels[0] for job, kernels in compile_all(JOBS).items()}


def _opcodes(kernel: Compiled) -> list[str]:
    return [i.opcode for i in sass.parse(kernel.sass).instructions]


def _of(compiled: dict[Job, Compiled], arch: int, part: str) -> dict[str, Compiled]:
    return {job.case: kernel for job, kernel in compiled.items() if job.arch == arch and part in job.case}


@triton.jit
def _statistics_kernel(x_ptr, out_ptr, stride, rows, C: tl.constexpr, ROWS: tl.constexpr):
    offs_b = tl.arange(0, 8)
    if ROWS == 0:
        mean, rstd = _row_statistics(x_ptr, 1e-5, C)
        mean, rstd = tl.where(offs_b == 0, mean, 0.0), tl.where(offs_b == 0, rstd, 0.0)
    else:
        mean, rstd = _statistics(x_ptr, stride, offs_b, rows, 1e-5, C, 8)
    tl.store(out_ptr + offs_b, mean)
    tl.store(out_ptr + 8 + offs_b, rstd)


def test_sums_over_a_row_lie_in_the_same_lanes_whatever_the_rows():
    """Of one row in a program of its own (ROWS 0), of one row, of several."""
    along_a_row = set()
    for constants in ({"ROWS": 0}, {"ROWS": 8, "rows": 1}, {"ROWS": 8}):
        constants = {"C": 2560, **constants}
        signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "stride": "i32", "rows": "i32"}
        attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        source = ASTSource(_statistics_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": DECODE_WARPS})
        ttgir = kernel.asm["ttgir"]
        reduced = re.findall(r'"tt.reduce".*?\(tensor<1024xf32, (#\w+)>\) -> f32', ttgir, re.S)
        assert len(reduced) == 2, ttgir
        for name in reduced:
            fields = re.search(rf"^{name} = #ttg.blocked<{{(.*?)}}>", ttgir, re.M)[1]
            values = re.findall(r"(sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+)\]", fields)
            along_a_row.add(tuple(values))
    assert along_a_row == {(("sizePerThread", "8"), ("threadsPerWarp", "32"), ("warpsPerCTA", "4"))}


def _exchanges(opcodes: list[str]) -> Counter:
    """What takes a number from one thread to another between the first product and the last."""
    products = [n for n, opcode in enumerate(opcodes) if opcode.startswith("HMMA")]
    between = [opcode.partition(".")[0] for opcode in opcodes[products[0] : products[-1]]]
    return Counter(opcode for opcode in between if opcode in ("LDS", "LDSM", "SHFL", "MOVM"))


def test_weights_and_x_stay_in_the_threads_that_load_them(compiled):
    for job, kernel in compiled.items():
        if "norm" not in job.case:
            assert not _exchanges(_opcodes(kernel)), job


@pytest.mark.parametrize("exchange", ["LDSM.16.M88.4", "LDS.64", "SHFL.IDX"])
def test_an_exchange_would_be_noticed(exchange):
    product = "HMMA.16816.F32.BF16"
    assert not _exchanges([exchange, product, "LDG.E.128", product, exchange])
    assert _exchanges([product, exchange, product])


def test_every_number_of_rows_takes_the_same_tensor_core_instruction(compiled):
    for job, kernel in compiled.items():
        products = Counter(opcode for opcode in _opcodes(kernel) if opcode.startswith(("HMMA", "HGMMA")))
        expected = {"HMMA.16816.F32.BF16"} if "norm" not in job.case else set()
        assert set(products) == expected, job


@pytest.mark.parametrize("case", ["decode_block/project_in_1", "decode_block/project_out_1", "decode_head/head_1"])
def test_one_row_compiles(case, monkeypatch):
    """Triton makes a constant of an argument that is 1: a product by it is no tensor."""
    monkeypatch.setattr(static_decode, "VARIANTS", ((1, 16),))
    monkeypatch.setattr(triton.runtime.driver, "_active", None)  # what compiling for a GPU puts there goes afterwards
    (kernel,) = compile_job(Job(case, 90, "bf16"))
    assert kernel.numbers["B"] == 1


def test_products_and_sums_are_contracted_nowhere(compiled):
    """The option is set, and it tells: the sum of squares is made of FMUL and FADD. Division and root hold the FFMA."""
    assert {kernel.numbers["enable_fp_fusion"] for kernel in compiled.values()} == {False}
    for case, kernel in _of(compiled, 90, "decode_block/norm").items():
        counts = Counter(opcode.partition(".")[0] for opcode in _opcodes(kernel))
        assert counts["FMUL"] + counts["FADD"] > 4 * counts["FFMA"], (case, counts)


@pytest.mark.parametrize("arch", [80, 90])
def test_weights_are_loaded_16_bytes_at_a_time_and_evicted_first(compiled, arch):
    """As many such loads as the weights of one program take, and no other load for them."""
    for case, kernel in _of(compiled, arch, "_8").items():
        numbers = kernel.numbers
        columns = numbers.get("SPLIT_K", numbers.get("C"))
        wanted = numbers["BLOCK_N"] * columns * numbers["BITS"] // 8 // (16 * kernel.threads)
        loads = Counter(opcode for opcode in _opcodes(kernel) if opcode.startswith("LDG"))
        assert loads["LDG.E.EF.128"] == wanted, (case, loads)
        assert sum(n for opcode, n in loads.items() if ".EF" in opcode) == wanted, (case, loads)
        assert "LDGSTS" not in " ".join(loads), case


def test_dependent_launch_is_on_sm_90_alone(compiled):
    for job, kernel in compiled.items():
        opcodes = _opcodes(kernel)
        expected = [1, 1] if job.arch == 90 else [0, 0]
        assert [opcodes.count("PREEXIT"), opcodes.count("ACQBULK")] == expected, job


WEIGHT, BIAS = "LDG.E.EF.128", "LDG.E.U16"


def _before_the_wait(opcodes: list[str]) -> set[str]:
    """What touches memory before the kernel has waited for the one before; arguments and spills are a thread's own."""
    touches = [
        opcode for opcode in opcodes[: opcodes.index("ACQBULK")] if re.match(r"LD|ST|ATOM|RED|UBLKCP|UTMA", opcode)
    ]
    return {opcode for opcode in touches if not opcode.startswith(("LDC", "LDL", "STL"))}


def test_what_another_kernel_writes_is_not_touched_before_the_wait(compiled):
    """Weights and biases alone, which no kernel writes; attention, whose inputs all come of kernels, has none."""
    for case, kernel in _of(compiled, 90, "").items():
        opcodes = _opcodes(kernel)
        allowed = set() if "norm" in case else {WEIGHT} if "project_out" in case else {WEIGHT, BIAS}
        assert _before_the_wait(opcodes) == allowed, case
        assert opcodes[: opcodes.index("ACQBULK")].count(BIAS) <= 4, case
    for job, kernels in compile_all(ATTENTION).items():
        assert _before_the_wait(_opcodes(kernels[0])) == set(), job


@pytest.mark.parametrize("early", ["LDG.E.128", "STG.E", "ATOMG.E.ADD.STRONG.GPU", "RED.E.ADD.STRONG.GPU"])
def test_an_access_before_the_wait_would_be_noticed(early):
    assert _before_the_wait([WEIGHT, early, "ACQBULK", "STG.E.128"]) == {WEIGHT, early}


def test_weights_are_under_way_before_the_kernel_waits_for_the_one_before(compiled):
    """At least 40 KB on each SM of an H100, and none of them in use yet: nothing is stored to shared memory.

    32 KB where the codes of a rounded weight meet 32 rows: two programs of those have an SM's registers.
    """
    for case, kernel in _of(compiled, 90, "").items():
        if "norm" in case:
            continue
        least = 32 if "_32_int" in case else 40
        opcodes, listing = _opcodes(kernel), sass.parse(kernel.sass)
        before = opcodes[: opcodes.index("ACQBULK")]
        resident = roofline.blocks_per_sm(90, kernel.threads, listing.registers, kernel.shared)
        blocks = min(resident, kernel.numbers["grid"] / roofline.REPORTED[90].sms)
        assert not [opcode for opcode in before if opcode.startswith(("STS", "BAR"))], case
        assert before.count("LDG.E.EF.128") * 16 * kernel.threads * blocks >= least * 1024, case
