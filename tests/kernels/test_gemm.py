"""The ops of gemm.py by themselves; their numerics are those of gelu_mlp and parallel_block, which call them."""

import pytest
import torch
from torch import Tensor
from xiangxin_kernels import _tuning
from xiangxin_kernels._tuning import fuses_gemm

from tests.conftest import INTERPRET
from tests.kernels.block_inputs import block_inputs, gemm, use_way
from tests.op_contract import assert_same_bits

pytestmark = [pytest.mark.interpreter] if INTERPRET else []
triton_only = pytest.mark.interpreter

N, H, D, R, F = 5, 2, 16, 8, 40
C = H * D
FUSED = ("pointers", "descriptors")  # cuBLAS promises no bits


def launches(rows: int = N, dtype: torch.dtype = torch.float32, empty=None) -> dict[str, tuple]:
    """Arguments of each op for `rows` rows; `empty(columns)` makes the matrices of so many rows, read and written."""
    given = block_inputs(1, rows, H, D, R, F, dtype)
    empty = empty or (lambda columns: torch.empty(rows, columns, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    x = empty(C).copy_(given["x"][0])
    h, attn, g, dp = (torch.randn(rows, columns, generator=generator).to(dtype) for columns in (F, C, F, 3 * C + F))
    w_in, b_in, w_out, b_out = (given[name] for name in ("w_in", "b_in", "w_out", "b_out"))
    sums = torch.empty(gemm.dgelu_row_tiles(x, F), F)
    p, z = empty(3 * C + F), empty(C + F)
    wide_h, wide_dp = empty(3 * C + F)[:, 3 * C :], empty(3 * C + F)
    wide_h.copy_(h)
    return {
        "project_in": (x, w_in, b_in, given["cos"], given["sin"], p, z, H, rows, 0),
        "project_out": (empty(C + F).copy_(torch.cat([attn, g], 1)), w_out, b_out, x, empty(C)),
        "project_out_bwd": (x, w_out, wide_h, empty(C), wide_dp[:, 3 * C :], empty(F), sums),
        "linear_gelu": (x, w_in[3 * C :], b_in[3 * C :], empty(F), empty(F)),
        "linear_gelu_bwd": (x, w_out[:, C:], wide_h, wide_dp[:, 3 * C :], empty(F), sums),
        "weight_gradients": (x, attn, g, dp, x, torch.empty_like(w_out), torch.empty_like(w_in)),
    }  # fmt: skip


WRITTEN = {
    "project_in": (5, 6),
    "project_out": (4,),
    "project_out_bwd": (3, 4, 5, 6),
    "linear_gelu": (3, 4),
    "linear_gelu_bwd": (3, 4, 5),
    "weight_gradients": (5, 6),
}


def written(name: str, arguments: tuple) -> list[Tensor]:
    """Runs the op and gives what it wrote: of z the columns of gelu(h) alone."""
    getattr(torch.ops.xiangxin, name)(*arguments)
    return [arguments[i][:, C:] if (name, i) == ("project_in", 6) else arguments[i] for i in WRITTEN[name]]


@triton_only
@pytest.mark.parametrize("way", ["cublas", *FUSED])
@pytest.mark.parametrize("name", list(WRITTEN))
def test_op_contract(name, way, monkeypatch):
    use_way(monkeypatch, way)
    torch.library.opcheck(getattr(torch.ops.xiangxin, name).default, launches()[name])


@triton_only
@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("name", ["project_in", "project_out", "linear_gelu"])
def test_a_row_depends_on_itself_alone(name, way, monkeypatch):
    """A row's bits are the same however many rows there are: no split of K."""
    use_way(monkeypatch, way)
    many, few = launches(70, torch.bfloat16), launches(70, torch.bfloat16)
    rows = slice(33, 36)
    alone = [x[rows] if isinstance(x, Tensor) and len(x) == 70 and x.shape[1] != R // 2 else x for x in few[name]]
    if name == "project_in":
        alone[-2:] = 3, 33  # the positions of these rows
    expected = [x[rows] for x in written(name, many[name])]
    assert_same_bits(written(name, tuple(alone)), expected, what=name)


@triton_only
@pytest.mark.parametrize("way", ["cublas", *FUSED])
def test_offsets_pass_2_to_the_31(way, tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file: what is written equals what is written side by side."""
    use_way(monkeypatch, way)
    step, taken = 2**30 + 64, 0
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * step + 2**14, dtype=torch.float16)

    def far(columns: int) -> Tensor:
        nonlocal taken
        taken += columns + -columns % 16
        return storage.as_strided((3, columns), (step, 1), taken - columns - -columns % 16)

    near, apart = launches(3, torch.float16), launches(3, torch.float16, far)
    assert taken < 2**14
    for name in ("project_in", "project_out", "project_out_bwd", "linear_gelu", "linear_gelu_bwd"):
        assert_same_bits(written(name, apart[name]), written(name, near[name]), what=name)


def test_rows_that_do_not_start_on_16_bytes_are_left_to_cublas(monkeypatch):
    """Wherever the Triton GEMM was measured to be faster: read a number at a time its loop spills."""
    every = {(epilogue, arch) for epilogue in gemm.EPILOGUES for arch in _tuning.ARCHS}
    monkeypatch.setattr(_tuning, "_FUSED_IS_FASTER", every)
    for arch in _tuning.ARCHS:
        fused = [(n, k) for n in (96, 100, 101) for k in (64, 100) if fuses_gemm("gelu", n, k, torch.bfloat16, arch)]
        assert fused == [(96, 64)]
        assert not fuses_gemm("gelu", 96, 64, torch.float32, arch)


def test_bulk_copies_take_rows_that_lie_apart_on_16_bytes():
    rows = torch.empty(8, 96, dtype=torch.bfloat16)
    assert gemm._takes_descriptors(rows, rows[:, :64], rows[::2])
    for x in (rows[:, 1:], rows[:1].expand(8, 96), torch.empty(8, 98, dtype=torch.bfloat16)):
        assert not gemm._takes_descriptors(rows, x)


@pytest.mark.skipif(INTERPRET, reason="the interpreter excludes the compiler")
def test_matrices_are_read_and_written_16_bytes_at_a_time():
    """Epilogues too. What is narrower: a bias of a column, cos and sin of a pair, a column's sum."""
    from bench import sass, static, static_compile

    narrow = {"gemm/rotary": {"LDG.E", "LDG.E.U16"}, "gemm/after_cublas_rotary": {"LDG.E"}, "gemm/bias": {"LDG.E.U16"}}
    narrow |= {f"gemm/{name}": {"LDG.E.U16"} for name in ("gelu", "residual", "after_cublas_residual")}
    narrow |= {f"gemm/{name}": {"STG.E"} for name in ("dgelu", "after_cublas_dgelu")}
    for job, made in static_compile.compile_all(static.jobs_of("gemm")).items():
        for compiled in made:
            instructions = sass.parse(compiled.sass).instructions
            moves = {i.opcode for i in instructions if i.base in ("LDG", "STG", "LDGSTS")}
            wide = {opcode for opcode in moves if opcode.endswith(".128")}
            assert "STG.E.128" in wide
            assert moves - wide <= narrow.get(job.case, set()), str(job)
            sums = sum(i.opcode == "STG.E" for i in instructions)
            assert sums == ("dgelu" in job.case), f"{job}: {sums} narrow stores"
