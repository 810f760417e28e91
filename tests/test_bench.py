"""The benches: what they count, that nothing wrong gets a number, and that a GPU run survives what its sections do."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xiangxin_kernels
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__ as command_line
from bench import budget, gpu, gpu_sections, races, static
from bench.case import Case, Shape, make_inputs
from bench.cases import CASES, SHAPES, TINY
from bench.measure import DeviceLost, interleaved
from bench.numerics import compare
from bench.peers import PEERS, reference
from bench.races import parse_sanitizer
from bench.runner import run_case
from xiangxin_fast.reference import PhiReference

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def records_of(directory: Path, kind: str) -> list[dict]:
    return [r for r in gpu.read_records(directory / gpu.RESULTS) if r["kind"] == kind]


class TestNumericsRule:
    """Each criterion fails what it is there for; rounding itself passes."""

    exact = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.bfloat16()

    def test_rounding_passes(self):
        assert compare(self.rounded, self.rounded, self.exact).passed

    def test_one_element_far_off_fails_the_largest_error(self):
        actual = self.rounded.clone()
        actual[17] += 0.125
        found = compare(actual, self.rounded, self.exact)
        assert (found.criterion, found.passed) == ("max", False)
        assert "[17]" in found.worst

    def test_twice_and_more_the_noise_fails_the_rms(self):
        noisy = (self.exact + 2.6 * (self.rounded.double() - self.exact).flip(0)).bfloat16()
        assert compare(noisy, self.rounded, self.exact).rms_ratio > 1

    def test_a_bias_below_both_fails_the_mean(self):
        exact = self.exact.abs() + 1
        down = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
        found = compare(down, exact.bfloat16(), exact)
        assert (found.criterion, found.passed) == ("mean", False)

    @pytest.mark.parametrize(("standard_errors", "passes"), [(3.9, True), (4.1, False)])
    def test_the_mean_may_lie_four_standard_errors_off(self, standard_errors, passes):
        noise = 1e-6 * (self.exact.flip(0) - self.exact.mean())
        shift = standard_errors * noise.square().mean().sqrt() / noise.numel() ** 0.5
        assert compare(self.exact + noise + shift, self.exact + noise, self.exact).passed == passes

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite_where_fp64_is_fails_and_the_reverse(self, value):
        actual = self.rounded.clone()
        actual[3] = value
        assert not compare(actual, self.rounded, self.exact).passed
        exact = self.exact.clone()
        exact[3] = value
        assert not compare(self.rounded, self.rounded, exact).passed
        assert compare(actual, actual, exact).passed

    def test_a_reference_that_overflows_is_no_excuse(self):
        plain = self.rounded.clone()
        plain[3] = float("inf")
        actual = self.rounded.clone()
        actual[3] += 4
        assert not compare(actual, plain, self.exact).passed


def test_every_op_of_the_front_door_has_a_case_peers_and_a_name_on_the_command_line():
    ops = {name.removesuffix("_ref") for name in xiangxin_kernels.__all__ if name.endswith("_ref")}
    assert ops <= set(CASES)
    assert set(CASES) == set(PEERS) == set(command_line.OPS)


@pytest.mark.parametrize("op", ["gelu_mlp", "linear_cross_entropy", "attention", "parallel_block"])
def test_flops_are_those_that_torch_counts(op):
    """torch counts every score; the cases the causal half of them."""
    case, shape = CASES[op], SHAPES["tiny"]
    inputs = make_inputs(case, shape, CPU, torch.float32)
    with FlopCounterMode(display=False) as forward:
        out = case.reference(**inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), [inputs[name] for name in case.leaves])
    scores = 2.0 * shape.B * shape.config.channels * shape.T**2 if "q" in inputs or "ln_w" in inputs else 0.0
    assert forward.get_total_flops() == case.flops(shape)["fwd"] + scores
    # A flash backward computes the scores once more: 2.5 times the forward, of which torch's has 2.
    assert backward.get_total_flops() == case.flops(shape)["bwd"] + 2 * scores - scores / 2


def test_training_flops_are_those_that_torch_counts():
    config, B, T = replace(TINY, layers=2), 2, 7
    tokens = torch.randint(config.vocab, (B, T))
    with FlopCounterMode(display=False) as counter:
        PhiReference(config).loss(tokens, tokens).backward()
    causal, full = config.flops_per_token(T)
    assert counter.get_total_flops() == full * B * T
    assert full - causal == 6 * config.layers * config.channels * T


def bench_tiny(case: Case, peers: dict) -> list[dict]:
    records = []
    shape, modes = SHAPES["tiny"], ("fwd", "bwd")
    options = {"modes": modes, "peers": peers, "seconds": 0.0, "ceilings": None, "emit": records.append}
    run_case(case, shape, CPU, torch.float32, **options)
    return records


@pytest.mark.parametrize("wrong", ["out", "gradient"])
def test_an_op_that_is_wrong_gets_no_number(wrong):
    def broken(x, weight, bias):
        out = xiangxin_kernels.layer_norm(x, weight, bias)
        return out * 1.001 if wrong == "out" else out + 0.01 * (weight - weight.detach())

    records = bench_tiny(replace(CASES["layer_norm"], ours=broken), {"torch": reference})
    verdict = next(r for r in records if r["kind"] == "check" and r["provider"] == "ours")
    assert not verdict["passed"]
    assert {r["provider"] for r in records if r["kind"] == "time"} == {"torch"}


def test_a_peer_that_cannot_run_costs_only_itself():
    def absent(case: Case, inputs: dict, shape: Shape):
        raise RuntimeError("built for another torch")

    records = bench_tiny(CASES["layer_norm"], {"absent": absent, "torch": reference})
    assert [(r["provider"], r["reason"]) for r in records if r["kind"] == "error"] == [
        ("absent", "RuntimeError: built for another torch")
    ]
    timed = [(r["mode"], r["provider"]) for r in records if r["kind"] == "time"]
    assert timed == [("fwd", "ours"), ("fwd", "torch"), ("bwd", "ours"), ("bwd", "torch")]


def test_turns_interleave_and_a_failing_one_is_named():
    calls = []

    def turn(name: str):
        def run(start):
            start()
            calls.append(name)
            if name == "bad":
                raise ValueError("no")

        return run

    timings, failed = interleaved({name: turn(name) for name in ("a", "bad", "b")}, CPU, 1e-9, flush=False)
    assert failed == {"bad": "ValueError: no"}
    assert set(timings) == {"a", "b"}
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80
    assert calls[-2 * timings["a"].rounds :] == ["a", "b"] * timings["a"].rounds


# What a section of bench.gpu may do to its process. Items are begun and recorded as gpu_sections.Work does it.
BEHAVIOUR = """
import os, signal, sys, time
from pathlib import Path
from bench.gpu import append, begun_items
what, results = sys.argv[1], Path(sys.argv[2]) / "results.jsonl"
def item(name):
    if name not in begun_items(results, what):
        append(results, {"kind": "begin", "section": what, "item": name})
        return True
if item("first"):
    append(results, {"kind": "figure", "section": what, "item": "first"})
if item("second"):
    if what == "raises":
        raise RuntimeError("boom")
    if what == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    append(results, {"kind": "figure", "section": what, "item": "second"})
if item("third"):
    append(results, {"kind": "figure", "section": what, "item": "third"})
"""


def test_a_section_that_raises_hangs_or_dies_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names = ("good", "raises", "hangs", "dies", "last")
    sections = tuple(gpu.Section(name, 0.4 if name == "hangs" else 1.0, name) for name in names)
    run = gpu.Run(
        tmp_path, 0.6, lambda section, seconds: [sys.executable, "-c", BEHAVIOUR, section.name, str(tmp_path)]
    )
    run.sections(sections)
    figures = {name: [r["item"] for r in records_of(tmp_path, "figure") if r["section"] == name] for name in names}
    assert figures["good"] == figures["last"] == ["first", "second", "third"]
    # The process that died is started again behind the item that killed it; the one that hung is not.
    assert figures["raises"] == figures["dies"] == ["first", "third"]
    assert figures["hangs"] == ["first"]
    status = {r["section"]: (r["status"], r["attempts"]) for r in records_of(tmp_path, "section")}
    assert status["good"] == status["last"] == ("done", 1)
    assert status["raises"] == status["dies"] == ("done", 2)
    assert status["hangs"][0].startswith("killed at its limit")


def test_the_log_of_a_section_that_prints_without_end_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES_PER_SECTION", 1000)
    run = gpu.Run(tmp_path, 1, lambda section, seconds: [sys.executable, "-c", "print('x' * 9000, 'the end')"])
    run.sections((gpu.Section("a", 1, ""), gpu.Section("b", 1, "")))
    log = (tmp_path / gpu.LOG).read_text()
    assert len(log) < 2200
    assert log.count("the end") == 2


def test_the_process_that_runs_the_sections_imports_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, bench.gpu; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=True
    )


def found_by(out: Path, sections: list[str]) -> None:
    """Holds the records of a dry run to what a run must bring."""
    log = (out / gpu.LOG).read_text() if (out / gpu.LOG).exists() else ""
    # Some backends need a GPU; an error without a provider, or with ours, is ours.
    assert [r for r in records_of(out, "error") if r.get("provider", "ours") == "ours"] == [], log
    records = [r for r in gpu.read_records(out / gpu.RESULTS) if r.get("section") in sections]
    assert {r["section"] for r in records if r["kind"] == "begin"} == set(sections)
    ours = [r for r in records if r["kind"] == "check" and r["provider"] == "ours"]
    assert all(r["passed"] for r in ours), ours
    brings = {
        "environment": "device", "ceilings": "device", "check": "correctness attention block gemm cross_entropy decode",
        "time": "attention block gemm cross_entropy decode", "generate": "generate", "race": "races",
        "train": "train train_peer train_again train_peer_again",
    }  # fmt: skip
    for kind, names in brings.items():
        missing = set(names.split()).intersection(sections) - {r["section"] for r in records if r["kind"] == kind}
        assert not missing, f"no {kind} in {missing}\n{log}"


def dry_run(directory: Path, *options: str) -> Path:
    """A dry run of the whole command, where packages that a bare machine lacks cannot be imported; its directory."""
    absent, out = directory / "absent", directory / "out"
    absent.mkdir()
    for package in ("einops", "tyro", "importlinter", "pytest"):
        (absent / f"{package}.py").write_text("raise ImportError('a bare machine has none')\n")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out), "--minutes", "9", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(absent), str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / gpu.TABLE).read_text().strip() in done.stdout
    assert sorted(path.name for path in out.iterdir()) == sorted([gpu.RESULTS, gpu.LOG, gpu.TABLE])
    status = {r["section"]: r["status"] for r in records_of(out, "section")}
    assert set(status.values()) == {"done"}, (out / gpu.LOG).read_text()
    found_by(out, list(status))
    return out


def test_the_command_runs_where_tyro_and_pytest_are_absent(tmp_path):
    out = dry_run(tmp_path, "--only", "races", "--commit", "abc123")
    assert [r["commit"] for r in records_of(out, "environment")] == ["abc123"]


def test_items_are_announced_run_once_and_cost_only_themselves(tmp_path):
    def lost():
        raise DeviceLost("an illegal memory access")

    def fails():
        raise ValueError("two\nlines")

    ran = []
    work = gpu_sections.Work("device", tmp_path, 600, dry_run=True)
    work.item("fails", fails)
    work.item("works", ran.append, 1)
    with pytest.raises(DeviceLost):
        work.item("lost", lost)
    again = gpu_sections.Work("device", tmp_path, 600, dry_run=True)
    for name in ("fails", "works", "lost", "new"):
        again.item(name, ran.append, 2)
    assert ran == [1, 2]
    assert [r["reason"] for r in records_of(tmp_path, "error")] == ["ValueError: two lines"]
    gpu_sections.Work("device", tmp_path, 0, dry_run=True).item("late", ran.append, 3)
    assert [r["item"] for r in records_of(tmp_path, "skip")] == ["late"]
    assert ran == [1, 2]


@pytest.mark.slow
def test_a_dry_run_walks_every_section(tmp_path):
    out = dry_run(tmp_path)
    assert [r["section"] for r in records_of(out, "section")] == [section.name for section in gpu.SECTIONS]


def walk(section: str, directory: Path) -> list[dict]:
    """The records of one section of a dry run, held to what a run must bring."""
    gpu_sections.SECTIONS[section](gpu_sections.Work(section, directory, 600, dry_run=True))
    found_by(directory, [section])
    return gpu.read_records(directory / gpu.RESULTS)


@pytest.mark.parametrize("section", [s.name for s in gpu.SECTIONS if not s.interpreted])
def test_every_section_without_our_kernels_walks_at_tiny_shapes(section, tmp_path):
    walk(section, tmp_path)


@pytest.mark.interpreter
@pytest.mark.parametrize("section", [s.name for s in gpu.SECTIONS if s.interpreted and s.name != "train_again"])
def test_every_section_with_our_kernels_takes_them_through_the_interpreter(section, tmp_path):
    records = walk(section, tmp_path)
    assert {r["implementation"] for r in records if "implementation" in r} <= {"kernels"}


def test_command_line_judges_times_and_draws(tmp_path, monkeypatch, capsys):
    options = ["--tokens", "16", "--against", "torch", "--seconds", "0.01", "--mode", "fwdbwd", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", "layer_norm", *options])
    monkeypatch.setitem(PEERS, "layer_norm", {"torch": reference})
    command_line.main()
    printed = capsys.readouterr().out
    assert "layer_norm" in printed
    assert "measured ceilings" in printed
    kinds = [r["kind"] for r in gpu.read_records(tmp_path / "layer_norm.jsonl")]
    assert kinds == ["environment", "ceilings", "check", "check", "time", "time"]
    assert (tmp_path / "layer_norm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "expected layer_norm"),
        (["attention", "demo"], "alone"),
        (["attention", "--mode", "sideways"], "expected fwd, bwd, fwdbwd"),
        (["attention", "--frobnicate"], "unrecognized"),
    ],
)
def test_command_line_refuses_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_sanitizer_summaries_are_understood():
    memcheck = "========= Invalid read\n=========     at kernel+0x10\n========= ERROR SUMMARY: 3 errors\n"
    assert parse_sanitizer(memcheck) == (3, ["=========     at kernel+0x10"])
    assert parse_sanitizer("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == (0, [])
    assert parse_sanitizer("========= Error: Device not supported\n") == (None, [])


SANITIZER = """#!/bin/sh
echo "$*" >> {calls}
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {calls}
echo "ran layer_norm"
echo "========= ERROR SUMMARY: 2 errors"
[ "$2" = memcheck ] && [ {hang} -gt 0 ] && exec sleep {hang}
exit 7
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_the_sanitizer_section_reads_what_the_tool_says_and_stops_one_that_hangs(tmp_path, monkeypatch, hangs):
    tool, calls = tmp_path / "bin" / "compute-sanitizer", tmp_path / "calls"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(calls=calls, hang=60 if hangs else 0))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(races, "LEAST_S", 0.5)
    gpu_sections.SECTIONS["sanitizer"](gpu_sections.Work("sanitizer", tmp_path, 1.5, dry_run=True))
    found = [(r["tool"], r["errors"], r["exit_code"], r["finished"]) for r in records_of(tmp_path, "sanitizer")]
    assert found == [(name, 2, 7, ["layer_norm"]) for name in ("memcheck", "racecheck")[hangs:]]
    stopped = [(r["item"], r["reason"]) for r in records_of(tmp_path, "error")]
    assert stopped == ([("memcheck", "not finished after 1 s")] if hangs else [])
    lines = calls.read_text().splitlines()
    assert lines[0] == f"--tool memcheck --target-processes all {sys.executable} -m bench.races"
    assert lines[1::2] == ["1", "1"]


def test_the_static_command_prints_a_table_and_keeps_its_rows(tmp_path, capsys):
    file = tmp_path / "static.json"
    assert static.main(["--only", "layer_norm", "--arch", "80", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(f"layer_norm/{way}" in printed for way in ("fwd", "bwd"))
    recorded, kept = budget.load(), budget.load(file)
    assert kept.keys() == {key for key in recorded if key.startswith("layer_norm") and "sm_80" in key}
    assert budget.violations(list(kept.values()), recorded) == []
