"""What the compiler makes of attention's kernels besides what `tests/test_static.py` holds for every op."""

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from xiangxin_kernels import attention
from xiangxin_kernels._tuning import ARCHS

from bench import sass, static, static_compile
from tests.kernels.attention_inputs import module, problem

PLAIN = ("fwd", "bwd_dq", "bwd_dkv")
JOBS = static.jobs_of("attention")
JOBS += [job for job in static.jobs_of("attention", dtypes=("fp16",)) if job.case.rpartition("/")[2] in PLAIN]
PARTS = {"fwd": 2, "dq": 3, "dkv": 4}  # products of a tile


class _Lowered(Exception):
    """A kernel has come through the compiler's front end."""


@pytest.fixture
def front_end(monkeypatch):
    """Attention's launches on empty CPU tensors stop after the compiler's front end; the kernels that came through."""

    def lowered(*arguments):
        raise _Lowered

    def run(kernel, *arguments, warmup, **keywords):
        try:
            original(kernel, *arguments, warmup=True, **keywords)
        except _Lowered:
            came_through.append(kernel.__name__.removeprefix("_attention_").removesuffix("_kernel"))

    original, came_through = JITFunction.run, []
    monkeypatch.setattr(CUDABackend, "make_ttgir", staticmethod(lowered))
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", static_compile._Driver(80))
    return came_through


@pytest.mark.parametrize("D", module.HEAD_DIMS)
def test_every_head_dim_rotates_some_or_all_of_its_columns(D, front_end):
    """In one part of the head and across both: the interpreter runs what the compiler may refuse."""
    for R in (10, D):
        inputs = problem(16, D, R, dtype=torch.bfloat16)
        q, k, v, cos, sin = inputs.values()
        attention(q.requires_grad_(), k, v, cos, sin).backward(q)
        assert front_end == ["rotate", "fwd", "rotate", "rotate", "bwd_dq", "bwd_dkv"]
        lse, grads = torch.empty(1, 1, 16), [torch.empty_like(q) for _ in range(3)]
        module._attention_bwd(q, k, v, q, q, lse, cos, sin, None, *grads, lse, None, None, 0.1, True)
        assert front_end[6:] == ["bwd_dq", "bwd_dkv"]
        front_end.clear()


def test_a_full_tile_issues_matrix_work_for_80_columns_and_no_more():
    """In every loop, so that each product is on tensor cores; on sm_90 it is HGMMA's."""
    for job, made in static_compile.compile_all(JOBS).items():
        part = job.case.rpartition("_")[2].rpartition("/")[2]
        for compiled in made:
            loops = sass.hot_loops(sass.parse(compiled.sass).instructions)
            if "rotate" in compiled.kernel:
                continue
            assert len(loops) == 2 + ("packed" in job.case or "odd" in job.case)
            for number, loop in enumerate(loops):
                counts, tile = sass.count(loop), compiled.numbers["BLOCK_M"] * compiled.numbers["BLOCK_N"]
                if part == "fwd" and number == len(loops) - 1:
                    tile = compiled.numbers["BLOCK_M"] * compiled.numbers["DIAGONAL_N"]
                assert counts.flops * compiled.threads // 32 == PARTS[part] * 2 * tile * 80, f"{job}, loop {number}"
                assert {name[:5] for name in counts.tensor} == {"HMMA." if job.arch == 80 else "HGMMA"}, str(job)


def test_tiles_arrive_by_asynchronous_copies_16_bytes_wide_in_the_64_wide_part():
    """LDGSTS.E.BYPASS.128, in the loops of both architectures: nothing waits in a register for memory."""
    for job, made in static_compile.compile_all(JOBS).items():
        for compiled in made:
            loops = sass.hot_loops(sass.parse(compiled.sass).instructions)
            rows = compiled.numbers.get("BLOCK_M" if "dkv" in job.case else "BLOCK_N")
            for number, loop in enumerate(loops):
                if "fwd" in job.case and number == len(loops) - 1:
                    rows = compiled.numbers["DIAGONAL_N"]
                assert not [i.opcode for i in loop if i.base == "LDG"], f"{job}: loads into registers in a hot loop"
                wide = sum(i.opcode == "LDGSTS.E.BYPASS.128" for i in loop) * compiled.threads * 16
                both = 2 * rows * 64 * 2  # k and v, or q and dout, in 16 bits
                assert wide >= both, f"{job}: {wide} of {both} bytes by 16-byte asynchronous copies"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", ["attention/", "attention_heads/128_"])
def test_loops_of_fp32_do_not_spill(head, arch, monkeypatch):
    """Its products are FMAs, which no limit of the compile gate is about."""
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setitem(static_compile.DTYPES, "fp32", torch.float32)
    for part in PLAIN:
        (compiled,) = static_compile.compile_job(static_compile.Job(head + part, arch, "fp32"))
        inside = [i for loop in sass.loops(sass.parse(compiled.sass).instructions) for i in loop]
        assert not [i.opcode for i in inside if i.base in ("STL", "LDL")], part
