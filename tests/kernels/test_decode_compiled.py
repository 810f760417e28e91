"""What the compiler makes of decode's kernels: what the claims about their bits and their loads rest on."""

import re
from collections import Counter

import pytest
import triton

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


def _layout_of(ttgir: str, name: str) -> dict[str, str]:
    """The fields of the layout `name`, e.g. "#blocked1"."""
    fields = re.search(rf"^{name} = #ttg.\w+<{{(.*)}}>$", ttgir, re.M)[1]
    return dict(re.findall(r"(\w+) = (\[[^\]]*\]|\w+)", fields))


@pytest.fixture(scope="module")
def of_one_row() -> dict[Job, Compiled]:
    """Kernels for one row: Triton makes a constant of an argument that is 1."""
    names = ("decode_block/project_in_1", "decode_block/project_out_1", "decode_head/head_1", "decode_head/head_1_int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_decode, "VARIANTS", ((1, 16), (1, 8)))
        patch.setattr(triton.runtime.driver, "_active", None)  # what compiling for a GPU puts there goes afterwards
        return {job: compile_job(job)[0] for job in (Job(name, 90, "bf16") for name in names)}


def test_sums_over_a_row_lie_in_the_same_lanes_whatever_the_rows(compiled, of_one_row):
    """Of a row alone in its program, of the only row, of several."""
    kernels = compiled | of_one_row
    layouts, seen = set(), Counter()
    for job, kernel in kernels.items():
        for name in re.findall(r'"tt.reduce".*?\(tensor<1024xf32, (#\w+)>\) -> f32', kernel.ttgir, re.S):
            layouts.add(str(_layout_of(kernel.ttgir, name)))
            seen[job.case] += 1
    wanted = {"sizePerThread": "[8]", "threadsPerWarp": "[32]", "warpsPerCTA": "[4]", "order": "[0]"}
    assert layouts == {str(wanted)}
    assert seen["decode_block/norm"] == 4
    assert {"decode_block/project_in_8", "decode_block/project_in_8_int8", "decode_head/head_1_int8"} <= set(seen)


def test_products_take_the_same_columns_at_once_whatever_the_rows(compiled, of_one_row):
    """How many neighbouring columns a lane has decides which sixteen a tensor core adds up together."""
    kernels = compiled | of_one_row
    found: dict[int, set] = {}
    for kernel in kernels.values():
        operands = re.findall(r"#ttg.dot_op<{opIdx = \d, parent = (#\w+), kWidth = (\d+)}>", kernel.ttgir)
        taken = {(width, str(_layout_of(kernel.ttgir, parent))) for parent, width in operands}
        found.setdefault(kernel.numbers.get("BITS", 0), set()).update(taken)
    mma = {"versionMajor": "2", "versionMinor": "0", "warpsPerCTA": "[4, 1, 1]", "instrShape": "[1, 16, 8]"}
    assert found.pop(0) == set()  # the norm
    assert found == {16: {("2", str(mma))}, 8: {("4", str(mma))}, 4: {("4", str(mma))}}


def test_codes_are_widened_two_at_a_time(compiled):
    """HFMA2.BF16: half as many as a thread has numbers, for each of 8 bits and of 4."""
    for job, kernel in compiled.items():
        if (bits := kernel.numbers.get("BITS")) in (8, 4):
            numbers = kernel.numbers["BLOCK_N"] * (kernel.numbers.get("SPLIT_K") or kernel.numbers["C"])
            found = Counter(opcode for opcode in _opcodes(kernel) if opcode.startswith("HFMA2.BF16"))
            assert found.total() == numbers // kernel.threads // 2, (job, bits, found)


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


def test_one_row_compiles(of_one_row):
    """A product by a constant is no tensor."""
    assert {kernel.numbers["B"] for kernel in of_one_row.values()} == {1}


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
