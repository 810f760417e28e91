"""Breaks the project on purpose and shows that its tests notice: `python -m tests.mutation [word of a name ...]`.

Each mutation is one change of text in a copy of the project; the named tests run in the copy, those of kernels in
Triton's interpreter, and must fail. A mutant that lives is a test that is missing. Add some with every kernel: a mask
that is one too wide, a swapped axis, a dropped term, a scale left out, an offset in 32 bits.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
KERNELS = "kernels/xiangxin_kernels"
COPIED = ("bench", "kernels", "tests", "train", "xiangxin_fast")


@dataclass(frozen=True)
class Mutation:
    """Replaces `old`, which occurs exactly once in `file` of `package`, by `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # what must notice, as arguments of pytest
    package: str = KERNELS

    @property
    def source(self) -> str:
        return (ROOT / self.package / self.file).read_text()


def _layer_norm(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"layer_norm: {name}", "layer_norm.py", old, new, "tests/kernels/test_layer_norm.py")


def _attention(name: str, file: str, old: str, new: str, only: str = "other_head_dims") -> Mutation:
    """`file` is "fwd" or "bwd"; `only` names the quickest tests that can notice, as pytest's -k does."""
    tests = f"tests/kernels/test_attention.py tests/kernels/test_attention_contract.py -k {only}"
    return Mutation(f"attention: {name}", f"_attention_{file}.py", old, new, tests)


def _cross_entropy(name: str, old: str, new: str) -> Mutation:
    tests = "tests/kernels/test_cross_entropy.py tests/kernels/test_cross_entropy_contract.py"
    return Mutation(f"cross_entropy: {name}", "cross_entropy.py", old, new, tests)


def _gemm(name: str, old: str, new: str, only: str = "") -> Mutation:
    """`only` names tests of test_gemm.py that notice; without, those of the ops that call gemm.py do."""
    callers = "tests/kernels/test_mlp.py tests/kernels/test_parallel_block.py"
    tests = f"tests/kernels/test_gemm.py -k {only}" if only else callers
    return Mutation(f"gemm: {name}", "gemm.py", old, new, tests)


def _decode(name: str, file: str, old: str, new: str, only: str) -> Mutation:
    """`only` names the quickest tests that can notice, as pytest's -k does."""
    return Mutation(f"decode: {name}", file, old, new, f"tests/kernels/test_decode_kernels.py -k {only}")


def _corpus(name: str, file: str, old: str, new: str, tests: str) -> Mutation:
    """`tests` is the end of a file's name and what pytest's -k gets."""
    where, only = tests.split(": ")
    return Mutation(f"corpus: {name}", file, old, new, f"tests/test_{where}.py -k {only}", "train/corpus")


_GEMV, _WEIGHTS, _DECODE_ATTENTION = "_decode_gemv.py", "_decode_weights.py", "_decode_attention.py"

MUTATIONS = [
    _decode(
        "a split too many",
        _DECODE_ATTENTION,
        "splits = tl.cdiv(length, SPLIT)",
        "splits = tl.cdiv(length, SPLIT) + 1",
        "test_attention",
    ),
    _decode(
        "the next position seen",
        _DECODE_ATTENTION,
        "mask_n = offs_n < length",
        "mask_n = offs_n <= length",
        "never_read",
    ),
    _decode(
        "the tail of a head left out",
        _DECODE_ATTENTION,
        "        scores += tl.reshape(tail, [SPLIT])\n",
        "",
        "test_attention",
    ),
    _decode("splits not rescaled", _DECODE_ATTENTION, "acc = acc * alpha +", "acc = acc +", "many_splits"),
    _decode(
        "rows normalised otherwise before many rows",
        _GEMV,
        "_row_statistics(x_ptr, eps, C)\n    for",
        "_row_statistics(x_ptr, eps + 0.01, C)\n    for",
        "many_rows",
    ),
    _decode(
        "slot in 32 bits", _GEMV, "slot.to(tl.int64) * cache_stride_row", "slot * cache_stride_row", "two_to_the_31"
    ),
    _decode(
        "counters left as they were",
        _GEMV,
        "mask=zeros < counters)",
        "mask=zeros < counters - 1)",
        "three_heads",
    ),
    _decode(
        "the first split for all",
        _GEMV,
        "first = split.to(tl.int64) * SPLIT_K",
        "first = split.to(tl.int64) * 0",
        "three_heads",
    ),
    _decode(
        "values rotated too",
        _GEMV,
        "(offs_n < 2 * C)[None, :], rotate",
        "(offs_n < 3 * C)[None, :], rotate",
        "three_heads",
    ),
    _decode("attention's bias alone", _GEMV, "bias_ptr + N + offs_n", "bias_ptr + offs_n", "three_heads"),
    _decode(
        "variance as a difference",
        _GEMV,
        "tl.sum(squares, 0) / C + eps",
        "(tl.sum(parts[0] * parts[0], 0) / C - mean * mean) + eps",
        "far_from_zero",
    ),
    _decode(
        "tiles in the wrong order",
        _GEMV,
        "tiles = tiles[1:] + (tile,)",
        "tiles = (tile,) + tiles[1:]",
        "quantized_head",
    ),
    _decode(
        "scale of the next group",
        _GEMV,
        "+ scale_columns // GROUP\n",
        "+ scale_columns // GROUP + 1\n",
        "quantized_weights",
    ),
    _decode("a zero point of 7", _WEIGHTS, "(words & 0xF) - 8", "(words & 0xF) - 7", "quantized_weights"),
    _decode(
        "scales left out", _GEMV, "if BITS == 8:\n        offs_n", "if BITS == 9:\n        offs_n", "quantized_weights"
    ),
    _decode(
        "columns of another lane",
        _GEMV,
        "FAR: tl.constexpr = PART if BITS == 4 else OWN",
        "FAR: tl.constexpr = PART",
        "quantized_weights",
    ),
    _decode(
        "halves of a lane exchanged",
        _WEIGHTS,
        "return parts_of(first, COUNT // 2) + parts_of(second, COUNT // 2)",
        "return parts_of(second, COUNT // 2) + parts_of(first, COUNT // 2)",
        "quantized_weights",
    ),
    _decode("rows that are not there", _GEMV, "+ columns, offs_b < B", "+ columns, offs_b < ROWS", "not_there"),
    _decode("one row's statistics for all", _GEMV, "        x_ptr += x_stride_b\n", "", "three_heads"),
    _cross_entropy("row offset in 32 bits", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    _cross_entropy("one-hot left out", "dz - (1.0 - label_smoothing), dz) * dloss", "dz, dz) * dloss"),
    _cross_entropy("sum not rescaled", "l_i = l_i * tl.exp2((m_i - m_safe) * LOG2E) + ", "l_i = l_i + "),
    _cross_entropy("ignored rows get a gradient", "dz = tl.where(ignored, 0.0, dz)", "dz = dz"),
    _cross_entropy("z-loss left out of the gradient", "(1.0 + 2.0 * z_loss * lse) / l_i", "1.0 / l_i"),
    _cross_entropy("upstream gradient of row 0", "dloss_ptr + row * dloss_stride_n", "dloss_ptr"),
    _cross_entropy("strided targets read in place", "targets = targets.contiguous()\n", "targets = targets\n"),
    _cross_entropy("dW given away twice", "ctx.given = True", "ctx.given = False"),
    _gemm("last K tile unmasked", "EVEN_K=K % config.block_k == 0", "EVEN_K=True"),
    _gemm("positions run over sequences", "q_start + offs_m % T", "q_start + offs_m"),
    _gemm("rows past the end summed", "tl.sum(tl.where(mask, t, 0.0), 0)", "tl.sum(t, 0)"),
    _gemm("second bias left out", "bias_ptr + N + offs_n, mask=mask_n", "bias_ptr + N + offs_n, mask=offs_n < 0"),
    _gemm(
        "rows of a in 32 bits",
        "tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * a_stride_m",
        "tl.minimum(offs_m, M - 1)[:, None] * a_stride_m",
        "offsets_pass",
    ),
    _gemm(
        "rows of the outputs in 32 bits", "row = offs_m.to(tl.int64)[:, None]", "row = offs_m[:, None]", "offsets_pass"
    ),
    _gemm(
        "rows of cuBLAS's product in 32 bits",
        "t_ptr + offs_m.to(tl.int64)[:, None] * t_stride_m",
        "t_ptr + offs_m[:, None] * t_stride_m",
        "offsets_pass",
    ),
    _gemm(
        "a row that looks at the number of rows",
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)\n    for k",
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + 0.01 * M\n    for k",
        "itself_alone",
    ),
    _gemm("slope of another place", "t *= slope", "t *= value"),
    _layer_norm("mask one too wide", "mask_c = offs_c < C\n    x =", "mask_c = offs_c <= C\n    x ="),
    _layer_norm("gradient mask one too wide", "mask_c = offs_c < C\n    weight", "mask_c = offs_c <= C\n    weight"),
    _layer_norm("padded lanes in the variance", "tl.where(mask_c, x - mean, 0.0)", "x - mean"),
    _layer_norm("unbiased variance", "(centred * centred, 0) / C", "(centred * centred, 0) / (C - 1)"),
    _layer_norm("uncorrected mean", "(centred - correction) * rstd", "centred * rstd"),
    _layer_norm("uncorrected mean saved", "mean_ptr + row, mean + correction)", "mean_ptr + row, mean)"),
    _layer_norm("uncorrected variance", " / C - correction * correction", " / C"),
    _layer_norm("eps left out", "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var)"),
    _layer_norm("row offset in 32 bits", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    _layer_norm("gradient row offset in 32 bits", "row = tl.cast(n, tl.int64)", "row = tl.cast(n, tl.int32)"),
    _layer_norm("stride of another tensor", "dout_ptr + row * dout_stride_n", "dout_ptr + row * x_stride_n"),
    _layer_norm("rstd left out of dx", "tl.sum(g * xhat, 0) / C)) * rstd", "tl.sum(g * xhat, 0) / C))"),
    _layer_norm("a term of dx dropped", "(g - tl.sum(g, 0) / C - xhat", "(g - xhat"),
    _layer_norm("residual gradient dropped", "dx += tl.load(dresidual_row", "dx += 0.0 * tl.load(dresidual_row"),
    _layer_norm("last row of a program alone", "dbias += dout", "dbias = dout"),
    _layer_norm("dweight and dbias swapped", "dweight, dbias = partial", "dbias, dweight = partial"),
    _layer_norm("strided weight read in place", "fwd(rows, weight.contiguous()", "fwd(rows, weight"),
    _attention("a query does not see its own key", "fwd", "key <= position[:, None]", "key < position[:, None]"),
    _attention("a query sees the next key", "fwd", "key <= position[:, None]", "key <= position[:, None] + 1"),
    _attention(
        "the document before is seen", "fwd", "key >= doc_start[:, None]", "key + 1 >= doc_start[:, None]", "packed"
    ),
    _attention(
        "documents are masked, not skipped",
        "fwd",
        "lo = tl.load(doc_start_ptr + start_m) // BLOCK_N * BLOCK_N",
        "lo = full_end * 0",
        "never_visited",
    ),
    _attention(
        "a tile of the diagonal goes unmasked",
        "fwd",
        "(q_start + start_m + 1) // BLOCK_N",
        "(q_start + start_m + BLOCK_N) // BLOCK_N",
    ),
    _attention("sum not rescaled", "fwd", "l_i = l_i * alpha + tl.sum(p, 1)", "l_i = l_i + tl.sum(p, 1)"),
    _attention(
        "rows without a key in a tile", "fwd", 'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new", "packed"
    ),
    _attention("rotation the wrong way", "fwd", "-SIGN, SIGN)", "SIGN, -SIGN)"),
    _attention(
        "rotation of the columns beyond R",
        "fwd",
        "tl.where(rotary[None, :], x * cos + partner * sin, x)",
        "x * cos + partner",
    ),
    _attention("partners within one part alone", "fwd", "tl.where(column < D_MAIN, partner, from_tail)", "partner"),
    _attention(
        "offsets of a tile in 32 bits",
        "fwd",
        "tl.cast(first, tl.int64) * stride_t + offs_t[:, None] * stride_t + offs_d[None, :]\n    if",
        "first * stride_t + offs_t[:, None] * stride_t + offs_d[None, :]\n    if",
        "offsets_pass",
    ),
    _attention(
        "batch in 32 bits",
        "fwd",
        "batch = tl.cast(bh // H, tl.int64)\n    head = tl.cast(bh % H, tl.int64)\n    q_ptr",
        "batch = bh // H\n    head = bh % H\n    q_ptr",
        "offsets_pass",
    ),
    _attention(
        "tail missing from delta",
        "bwd",
        "out.to(tl.float32) * dout_tail.to(tl.float32)",
        "0.0 * dout_tail.to(tl.float32)",
        "numerics_rule",
    ),
    _attention("dq not scaled", "bwd", "dq_main *= scale", "dq_main *= 1.0"),
    _attention(
        "dk rotated twice",
        "bwd",
        "_rotate(dk_main, dk_tail, position, mask_n, cos_ptr, sin_ptr, -1",
        "_rotate(dk_main, dk_tail, position, mask_n, cos_ptr, sin_ptr, 1",
    ),
    _attention(
        "pairs of the tail not rotated back",
        "fwd",
        "new_tail = rotate_pairs(tail, row, offs_tail, cos_ptr, sin_ptr, SIGN, D, R)",
        "new_tail = tail",
        "rotates_pairs",
    ),
    _attention(
        "rows past the end summed",
        "bwd",
        "tl.sum(tl.where(valid[:, None], x, 0.0), 0)",
        "tl.sum(x + tl.where(valid[:, None], 0.0, 1.0), 0)",
        "rotates_pairs",
    ),
    _attention("sums of all sequences in one place", "bwd", "batch * tiles + index", "index", "rotates_pairs"),
    _attention(
        "sums of dk where those of dv belong",
        "bwd",
        "_store_sums(dv_sums_ptr, offs_main, dv_main, mask_n)",
        "_store_sums(dv_sums_ptr, offs_main, dk_main, mask_n)",
        "rotates_pairs",
    ),
    _attention(
        "dq of a single key not exactly 0",
        "bwd",
        "tl.where((position == doc_start)[:, None], dp, delta[:, None])",
        "delta[:, None]",
        "numerics_rule",
    ),
    _attention(
        "dk of a single key not exactly 0",
        "bwd",
        "tl.where((query == start)[None, :], dp, delta[None, :])",
        "delta[None, :]",
        "numerics_rule",
    ),
    _attention(
        "dk of a document's first row, the sequence's alone",
        "bwd",
        "start = tl.load(doc_start_ptr + query, mask=query < T, other=0)",
        "start = query * 0",
        "one_token_to_a_document",
    ),
    _attention(
        "a key's own query left out",
        "bwd",
        "query[None, :] >= position[:, None]",
        "query[None, :] > position[:, None]",
    ),
    _attention(
        "queries of the next document",
        "bwd",
        "query[None, :] < query_end[:, None]",
        "query[None, :] <= query_end[:, None]",
        "packed",
    ),
    _attention(
        "the last, partial tile of queries left out",
        "bwd",
        "ends: tl.constexpr = DOCUMENTS or not EVEN_T",
        "ends: tl.constexpr = DOCUMENTS",
    ),
    Mutation(
        "attention: a dout that strides too far",
        "attention.py",
        " or dout.stride(1) >= MAX_STRIDE_T:",
        ":",
        "tests/kernels/test_attention_contract.py -k far_along_time",
    ),
    _attention("lse of fp32 not refined", "bwd", "lse_low = tl.log2(sum_p)", "lse_low = 0.0 * sum_p", "test_scale"),
    _attention("delta of fp32 not normalised", "bwd", "delta = delta / sum_p", "delta = delta * 1.0", "scores_all_far"),
    _corpus(
        "the last copy is kept",
        "duplicates.py",
        "documents[order][1:][again]",
        "documents[order][:-1][again]",
        "corpus_stages: TestDuplicates",
    ),
    _corpus(
        "runs of 14 units",
        "benchmarks.py",
        "SHORTEST = 13, 8",
        "SHORTEST = 14, 8",
        "corpus_stages: TestDecontamination",
    ),
    _corpus(
        "no NFKC",
        "fold.py",
        'folded = unicodedata.normalize("NFKC", chr(code)).casefold()',
        "folded = chr(code).casefold()",
        "corpus_stages: TestFold",
    ),
    _corpus("Chinese is left out", "filters.py", "han < MIN_HAN", "han > MIN_HAN", "corpus_stages: TestFilters"),
    _corpus(
        "held out by chance",
        "clean.py",
        "held_out = digests[:, 1] < np.uint64(min(int(options.holdout * 2**64), 2**64 - 1))",
        "held_out = np.random.default_rng(0).random(len(texts)) < options.holdout",
        "prepare: one_side",
    ),
    _corpus(
        "a cut unit is taken for whole",
        "clean.py",
        "if not path.exists() or path.stat().st_size != size:",
        "if not path.exists():",
        "prepare: cut_file",
    ),
    _corpus(
        "everything is done again",
        "pipeline.py",
        "left = [unit for unit in units if read_unit_result(job.clean, unit.number) is None]",
        "left = list(units)",
        "prepare_killed: changes_of_any_file",
    ),
    _corpus(
        "a result has its name before it is whole",
        "pipeline.py",
        'partial = file.with_suffix(".partial")',
        "partial = file",
        "prepare_killed: changes_of_any_file",
    ),
    _corpus(
        "two processes in another order",
        "pipeline.py",
        "tokens.plan_shards(segments, job.clean, verdicts)",
        "tokens.plan_shards(segments[:: 1 if job.processes == 1 else -1], job.clean, verdicts)",
        "prepare_killed: 20_mb",
    ),
    _corpus(
        "a directory of others is taken",
        "pipeline.py",
        "    _check_out(job, files)\n",
        "",
        "prepare: left_as_it_was",
    ),
    _corpus(
        "what others put into the work directory goes",
        "pipeline.py",
        "if IN_WORK.fullmatch(leftover.name):",
        "if leftover.name != PLAN:",
        "prepare: what_others_put",
    ),
    _corpus(
        "what follows an array is lost",
        "records.py",
        'inside = mark == "["',
        "return",
        "corpus_records: follows_an_array",
    ),
    _corpus(
        "a part of the sample is lost",
        "workers.py",
        "return [future.result() for future in futures]",
        "return [future.result() for future in futures[1:]]",
        "prepare: number_of_workers",
    ),
    Mutation(
        "shards: no end-of-text",
        "shards.py",
        "ids[ends - 1] = self.eos_id",
        "ids[ends - 1] = self.vocab - 1",
        "tests/test_prepare.py -k decodes_back",
        "train",
    ),
]


def is_noticed(mutation: Mutation, directory: Path) -> tuple[bool, str]:
    """Runs the tests against a mutated copy under `directory`: whether they fail or crash, and the end of their output.

    Raises ValueError where `old` does not occur exactly once: the code has moved on, and the mutation must follow.
    """
    if mutation.source.count(mutation.old) != 1:
        count = mutation.source.count(mutation.old)
        raise ValueError(f"{mutation.name}: expected {mutation.old!r} once in {mutation.file}, got it {count} times")
    for name in COPIED:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    (directory / mutation.package / mutation.file).write_text(mutation.source.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if mutation.package == KERNELS:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise ValueError(f"{mutation.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0, done.stdout[-2000:]


def main() -> None:
    console = Console()
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    lived = []
    for mutation in chosen:
        with tempfile.TemporaryDirectory() as directory, console.status(mutation.name):
            noticed, _ = is_noticed(mutation, Path(directory))
        console.print(f"{'noticed' if noticed else '[bold red]LIVED[/]  '}  {mutation.name}")
        lived += [] if noticed else [mutation.name]
    console.print(f"{len(chosen) - len(lived)} of {len(chosen)} mutations noticed")
    sys.exit(bool(lived))


if __name__ == "__main__":
    main()
