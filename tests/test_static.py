"""The compile gate: every chosen kernel config, compiled for both architectures without a GPU, keeps to its budgets."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xiangxin_kernels import _tuning

from bench import budget, roofline, sass, static, static_compile
from bench.static_cases import CHECKS, OPS
from bench.static_compile import CompileError
from bench.ttir import i32_offset_products

ROOT = Path(__file__).parent.parent
SHIPPED = [op for op in OPS if op not in CHECKS]
FAST = [op for op in SHIPPED if op != "attention_heads"]


def _violations(jobs: list[static.Job]) -> str:
    """What breaks a limit, and in bf16 what is worse than recorded."""
    results = static.examine(jobs, progress=False)
    found = [f"{job}: {error}" for job, error in results.items() if isinstance(error, CompileError)]
    rows = static.rows_of(results)
    found += budget.violations([row for row in rows if row.dtype == "bf16"], budget.load())
    found += [f"{budget.key(row)}: {text}" for row in rows if row.dtype != "bf16" for text in budget.broken_limits(row)]
    return "\n".join(found)


# One test for all ops: a process that compiles takes as long to start as for a kernel.
def test_chosen_configs_keep_to_their_budgets():
    fp16 = [
        job
        for job in static.jobs_of("attention", dtypes=("fp16",))
        if job.case.rpartition("/")[2] in ("fwd", "bwd_dq", "bwd_dkv")
    ]
    found = _violations([job for op in FAST for job in static.jobs_of(op)] + fp16)
    assert not found, f"\n{found}"


@pytest.mark.slow
def test_attention_of_other_head_dims_keeps_to_its_budgets():
    """In fp16 where documents are packed, whose loops hold the most."""
    fp16 = [job for job in static.jobs_of("attention_heads", dtypes=("fp16",)) if "packed" in job.case]
    found = _violations(static.jobs_of("attention_heads") + fp16)
    assert not found, f"\n{found}"


def test_results_file_holds_exactly_the_kernels_there_are():
    launched = {
        f"{job.case}|{launch.kernel.__name__}|sm_{job.arch}|{job.dtype}"
        for op in SHIPPED
        for job in static.jobs_of(op)
        for launch in static_compile.capture(job)
    }
    assert set(budget.load()) == launched, f"run {budget.COMMAND}"


@pytest.mark.slow
@pytest.mark.parametrize("op", FAST)
def test_candidates_and_fp16_compile(op):
    jobs = static.jobs_of(op, configs="candidates") + static.jobs_of(op, dtypes=("fp16",))
    results = static.examine(jobs, progress=False)
    failed = [f"{job}: {error}" for job, error in results.items() if isinstance(error, CompileError)]
    assert not failed, "\n".join(["", *failed])
    chosen = static.rows_of({job: rows for job, rows in results.items() if job.config is None})
    broken = [f"{budget.key(row)}: {text}" for row in chosen for text in budget.broken_limits(row)]
    assert not broken, "\n".join(["", *broken])


def test_the_readme_s_decode_step_is_what_the_recorded_rows_add_up_to():
    """32 layers and the head of one row; int4's LayerNorms are launches of their own."""
    expected = {(row.case, row.arch): row.estimate_us for row in budget.load().values()}
    readme = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    steps = {}
    for weights, suffix, norms in (("bf16", "", 0), ("int8", "_int8", 0), ("int4", "_int4", 33)):
        for arch in _tuning.ARCHS:
            parts = [
                f"decode_block/project_in_8{suffix}",
                f"decode_block/project_out_8{suffix}",
                "decode_attention/step",
            ]
            layers = 32 * sum(expected[part, arch] for part in parts)
            head, norm = expected[f"decode_head/head_8{suffix}", arch], expected["decode_block/norm", arch]
            steps[weights, arch] = layers + head + norms * norm
        found = re.search(rf"^\| {weights} \| (\d+) \| (\d+) \|(.*)\|$", readme, re.M)
        assert [int(found[1]), int(found[2])] == [round(steps[weights, arch]) for arch in (80, 90)], weights
        ratios = [float(ratio) for ratio in re.findall(r"([\d.]+)x", found[3])]
        wanted = [steps["bf16", arch] / steps[weights, arch] for arch in (80, 90)] if suffix else []
        assert ratios == pytest.approx(wanted, abs=0.05 if suffix == "_int4" else 0.005), weights


@pytest.mark.slow
def test_chosen_configs_keep_to_the_limits_on_the_oldest_triton(tmp_path):
    """Triton 3.6.0 in an environment of its own; skipped where packages cannot be had."""
    wanted = ["triton==3.6.0", "numpy<2.4"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *wanted]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install triton 3.6.0 here: {done.stderr.strip().splitlines()[-1]}")
    program = (
        "import triton; from bench import budget, static; assert triton.__version__ == '3.6.0', triton.__version__\n"
        f"results = static.examine([job for op in {FAST!r} for job in static.jobs_of(op)], progress=False)\n"
        "bad = [f'{job}: {e}' for job, e in results.items() if isinstance(e, static.CompileError)]\n"
        "bad += [f'{budget.key(r)}: {t}' for r in static.rows_of(results) for t in budget.broken_limits(r)]\n"
        "raise SystemExit('\\n'.join(bad) or None)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def expected_tflops():
    """Of the check kernels, by (case, arch, config values)."""
    jobs = [job for op in CHECKS for job in static.jobs_of(op, configs="candidates")]
    return {
        (row.case, row.arch, *row.config.values()): static_compile.find_case(row.case).work[row.kernel].flops
        / row.estimate_us
        / 1e6
        for row in static.rows_of(static.examine(jobs, progress=False))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arch", "config", "published"),
    [
        ("check_matmul", 80, (128, 256, 64, 8, 3, False), (241, 268)),
        ("check_attention/64", 80, (128, 64, 4, 3), (152, 152)),
        ("check_attention/128", 80, (128, 64, 8, 3), (154, 154)),
        ("check_matmul", 90, (128, 256, 64, 8, 3, True), (523, 730)),
        ("check_attention/64", 90, (128, 128, 8, 2), (342, 363)),
        ("check_attention/128", 90, (128, 128, 8, 2), (323, 434)),
    ],
)
def test_model_expects_what_was_published(expected_tflops, case, arch, config, published):
    low, high = published
    assert 0.9 * low <= expected_tflops[case, arch, *config] <= 1.1 * high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arch", "better", "worse"),
    [
        ("check_matmul", 80, (128, 256, 64, 8, 3, False), (128, 64, 32, 4, 4, False)),
        ("check_matmul", 80, (128, 64, 32, 4, 4, False), (64, 64, 32, 4, 4, False)),
        ("check_matmul", 90, (128, 256, 64, 8, 3, True), (128, 256, 64, 8, 3, False)),
        ("check_matmul", 90, (128, 256, 64, 8, 3, False), (64, 64, 64, 4, 4, False)),
        ("check_attention/64", 80, (128, 64, 4, 3), (128, 64, 8, 3)),
    ],
)
def test_model_ranks_as_is_known(expected_tflops, case, arch, better, worse):
    assert expected_tflops[case, arch, *better] > expected_tflops[case, arch, *worse]


LISTING = """
  REG:40 STACK:8 SHARED:0 LOCAL:0
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0020*/               @P0 BRA 0x0000 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR15], R13 ;
        /*0040*/              @!P3 BRA 0x00b0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/               @P1 BRA 0x0030 ;
        /*0080*/                   STG.E [R2.64], R4 ;
        /*0090*/               @P2 BRA 0x0000 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR15], R13 ;
        /*00c0*/              @!P3 BRA 0x00b0 ;
        /*00d0*/                   BRA 0x0050 ;
        /*00e0*/                   BRA 0x00e0;
"""


def test_hot_loop_is_the_innermost_around_tensor_cores_even_with_code_behind_the_end():
    listing = sass.parse(LISTING)
    (hot,) = sass.hot_loops(listing.instructions)
    assert [i.address for i in hot] == [0x30, 0x40, 0x50, 0x60, 0x70, 0xB0, 0xC0, 0xD0]
    assert [loop[0].address for loop in sass.loops(listing.instructions)] == [0x00, 0x30, 0xB0]
    assert (listing.registers, listing.stack) == (40, 8)


def test_counts_of_a_listing():
    counts = sass.count(sass.parse(LISTING).instructions)
    assert counts.tensor == {"HMMA.16816": 1}
    assert counts.flops == 2 * 16 * 8 * 16
    assert (counts.spill_stores, counts.spill_loads) == (1, 0)
    assert (counts.shared, counts.global_, counts.lsu) == (1, 2, 4)
    assert counts.global_load_bytes == {128: 512}
    assert counts.global_store_bytes == {32: 128}
    assert counts.wide_fraction == 512 / 640
    assert counts.shared_bytes == 512


def test_pipe_cycles_of_known_tiles():
    """128x256x64 is 1,024 cycles at 4,096 FLOPs a cycle; HGMMA with A in shared memory reads A and B for each group."""
    hgmma = "        /*0000*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;\n"
    counts = sass.count(4 * sass.parse("REG:40 STACK:0\n" + hgmma).instructions)
    cycles = roofline.pipe_cycles(counts, warps=8, arch=90)
    assert cycles["tensor"] == 2 * 128 * 256 * 64 / 4096
    assert cycles["shared"] == 4 * 2 * (2 * 64 * 16 + 2 * 256 * 16) / 128


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (80, 256, 255, 98304, 1),  # registers
        (80, 128, 255, 49152, 2),  # registers: 4 x 8,192 each
        (80, 128, 168, 0, 3),
        (80, 256, 32, 0, 8),  # 64 warps
        (80, 32, 16, 0, 32),  # blocks
        (80, 128, 64, 100 * 1024, 1),  # shared memory
        (80, 128, 64, 163 * 1024, 1),
        (80, 128, 64, 163 * 1024 + 1, 0),
        (90, 128, 64, 227 * 1024, 1),
        (90, 256, 128, 113 * 1024, 2),
    ],
)
def test_blocks_per_sm_as_the_occupancy_calculator_has_them(arch, threads, registers, shared, blocks):
    assert roofline.blocks_per_sm(arch, threads, registers, shared) == blocks


@triton.jit
def _rows_kernel(x_ptr, stride, C: tl.constexpr, WIDE: tl.constexpr, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    ptrs = x_ptr + tl.arange(0, BLOCK)
    if LOOP:
        for n in range(0, 1000):
            tl.store(ptrs + (n.to(tl.int64) if WIDE else n) * stride, 0.0)
    elif C:
        tl.store(ptrs + row * C, 0.0)
    else:
        tl.store(ptrs + row * BLOCK * stride, 0.0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("C", "loop", "factor"),
    [(2560, False, "%c2560_i32"), (0, False, "%stride"), (0, True, "%stride")],
    ids=["constant", "argument", "counter"],
)
def test_32_bit_offsets_are_found_where_they_are(C, loop, factor, wide):
    constants = {"C": C, "WIDE": wide, "LOOP": loop, "BLOCK": 64}
    signature = {"x_ptr": "*fp32", "stride": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_rows_kernel, signature, constants)
    ttir = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]
    found = i32_offset_products(ttir)
    assert len(found) == (0 if wide else 1), found
    assert wide or factor in found[0]


ROW = dataclasses.replace(
    static.Row(**dict.fromkeys((f.name for f in dataclasses.fields(static.Row)), 0)),
    case="op", kernel="_op_kernel", arch=90, dtype="bf16", config={"block_m": 128}, shared=200_000, blocks_per_sm=2,
    tensor={"HGMMA.64x128x16": 8}, flops_ratio=1.05, wide_fraction=1.0, bulk={"UTMALDG": 2}, estimate_us=100.0,
    warp_specialized=True, offset_products=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills_in_loop": 1}, "spills (STL, LDL) in the hot loops: expected 0, got 1"),
        ({"shared": 232_449}, "shared memory: expected at most 232448 bytes, got 232449"),
        ({"blocks_per_sm": 0}, "blocks per SM: expected at least 1, got 0"),
        ({"offset_products": ["%a * %b"]}, "32-bit products of position and stride: expected none, got ['%a * %b']"),
        ({"tensor": {"HMMA.16816": 8}}, "tensor-core instructions on sm_90: expected HGMMA only, got ['HMMA.16816']"),
        ({"tensor": {}}, "tensor-core instructions in the hot loop: expected some, got none"),
        ({"flops_ratio": 1.2}, "FLOPs per useful FLOP: expected at most 1.15, got 1.2"),
        ({"config": {"warp_specialize": True}, "warp_specialized": False}, "warp specialization: expected present"),
        ({"spills_elsewhere": 1}, "spills outside the hot loops: recorded 0, now 1"),
        ({"blocks_per_sm": 1}, "blocks per SM: recorded 2, now 1"),
        ({"wide_fraction": 0.9}, "share of 16-byte accesses: recorded 1.000, now 0.900"),
        ({"flops_ratio": 1.06}, "FLOPs per useful FLOP: recorded 1.050, now 1.060"),
        ({"estimate_us": 106.0}, "expected microseconds: recorded 100.0, now 106.0"),
        ({"warp_specialized": False}, "warp specialization: recorded True, now False"),
        ({"bulk": {}}, "bulk copies: recorded {'UTMALDG': 2}, now {}"),
        ({"config": {"block_m": 64}}, "config: recorded {'block_m': 128}, now {'block_m': 64}"),
        ({"kernel": "_new_kernel"}, "not in static.json"),
    ],
)
def test_each_budget_names_what_broke_it(change, message):
    recorded = {budget.key(ROW): ROW}
    assert budget.violations([ROW], recorded) == []
    found = budget.violations([dataclasses.replace(ROW, **change)], recorded)
    assert any(message in text for text in found), found


def test_saving_some_rows_keeps_the_others_and_drops_ops_that_are_gone(tmp_path):
    path = tmp_path / "static.json"
    other, gone = dataclasses.replace(ROW, case="other"), dataclasses.replace(ROW, case="gone")
    budget.save([ROW, other, gone], path, {"op", "other", "gone"})
    faster = dataclasses.replace(ROW, estimate_us=50.0)
    budget.save([faster], path, {"op", "other"})
    assert budget.load(path) == {budget.key(faster): faster, budget.key(other): other}


def test_a_crash_of_the_compiler_is_the_result_of_its_job_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crash = "import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(static_compile, "WORKER", ("-c", crash))
    jobs = static.jobs_of("layer_norm")
    results = static.examine(jobs, progress=False)
    assert [str(error) for error in results.values()] == ["the compiler died (SIGSEGV)"] * len(jobs)


def test_a_hanging_compiler_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(static_compile, "WORKER", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(static_compile, "TIMEOUT_S", 0.2)
    (error, *_) = static.examine(static.jobs_of("layer_norm", archs=(80,))[:1], progress=False).values()
    assert str(error) == "the compiler died (SIGKILL)"


def test_what_is_compiled_is_what_the_launcher_launches():
    (job,) = (job for job in static.jobs_of("attention", archs=(90,)) if job.case == "attention/fwd")
    (launch,) = static_compile.capture(job)
    config = _tuning.choose_attention("fwd", 80, torch.bfloat16, 90)
    assert launch.arguments["BLOCK_M"] == config.block_m
    assert launch.config == dataclasses.asdict(config)
    assert launch.arguments["grid"] == 2048 // config.block_m * 8 * 32


def test_bulk_bytes_are_those_of_the_deepest_loop():
    load = "ttng.async_tma_copy_global_to_local %d[%i] %s : !tt.tensordesc<> -> !ttg.memdesc<{}xbf16, #s>"
    text = "\n".join([load.format("64x64"), "scf.for %k = a to b {", load.format("128x64"), load.format("256x64"), "}"])
    assert static_compile._bulk_bytes(text) == 2 * 64 * (128 + 256)
