"""bench.tune: what the static bound rules out, and how a sweep survives its candidates."""

import dataclasses
import io
import json

import pytest

from bench import tune
from bench.static_compile import CompileError, find_case, forced
from tests.test_static import ROW

A, B, C = ((("block_m", size),) for size in (16, 32, 64))


def test_spilling_and_oversized_candidates_do_not_run():
    spills = dataclasses.replace(ROW, spills_in_loop=3)
    too_large = dataclasses.replace(ROW, blocks_per_sm=0)
    assert tune.rejected([ROW]) == ""
    assert tune.rejected([ROW, spills]) == "3 spills in the hot loop of _op_kernel"
    assert tune.rejected([too_large]).startswith("200000 bytes of shared memory in _op_kernel")
    assert tune.rejected(CompileError("the compiler died (SIGABRT)")) == "the compiler died (SIGABRT)"


def _child(body: str) -> tuple[str, str]:
    """A child process that runs `body` with its configs, and `say` to answer."""
    start = (
        "import json, os, sys\nconfigs = json.loads(sys.argv[2])['configs']\n"
        "def say(config, **record): print(json.dumps({'config': config, **record}), flush=True)\n"
    )
    return "-c", start + body


def test_a_candidate_that_kills_its_process_costs_only_itself():
    body = (
        "for c in configs:\n"
        "    say(c, judging=True)\n"
        "    if c == [['block_m', 32]]: os._exit(7)\n"
        "for c in configs: say(c, median=1.0, p20=0.9, p80=1.1)\n"
    )
    results = {r.config: r for r in tune.sweep("case", [A, B, C], 60.0, False, _child(body))}
    assert results[B].reason == "the child process died (exit code 7)"
    assert results[A].median == results[C].median == 1.0


def test_a_death_while_timing_is_told_of_every_candidate_without_a_time():
    body = "for c in configs: say(c, judging=True)\nsay(configs[0], reason='wrong')\nos._exit(7)"
    results = tune.sweep("case", [A, B], 60.0, False, _child(body))
    assert [(r.config, r.reason) for r in results] == [(A, "wrong"), (B, "the child process died (exit code 7)")]


def test_a_sweep_ends_when_its_time_is_out():
    body = "import time\nsay(configs[0], reason='wrong')\ntime.sleep(600)"
    results = tune.sweep("case", [A, B], 2.0, False, _child(body))
    assert [r.config for r in results if r.reason == "out of time"][-1] == B


def test_what_there_is_no_time_to_judge_is_said_and_not_tried(monkeypatch):
    judged, answers = [], io.StringIO()
    monkeypatch.setattr(tune, "check", lambda *arguments: judged.append(1) or arguments[-1]({"passed": True}))
    monkeypatch.setattr(tune, "interleaved", lambda turns, *rest: ({}, dict.fromkeys(turns, "not timed")))
    monkeypatch.setattr(tune, "_tensors", lambda *arguments: {})
    configs = tune.candidates("layer_norm/fwd", 80)[:3]
    tune.child({"case": "layer_norm/fwd", "configs": configs, "seconds": 0.0, "dry_run": True}, answers)
    reasons = [json.loads(line).get("reason") for line in answers.getvalue().splitlines()]
    assert len(judged) == 1
    assert reasons.count("not tried: out of time") == len(configs) - 1


def test_a_forced_config_reaches_the_launcher_and_leaves_no_trace():
    case = find_case("cross_entropy/fwd")
    before = case.module.choose_cross_entropy
    with forced(case, None, (("block_v", 16), ("num_warps", 1))) as used:
        chosen = case.module.choose_cross_entropy(51200, None, 80)
    assert (chosen.block_v, chosen.num_warps) == (16, 1)
    assert used == [chosen]
    assert case.module.choose_cross_entropy is before


def test_the_command_sweeps_what_compiles_well_and_prints_it_fastest_first(monkeypatch, capsys):
    compiled, swept = [], []

    def examine(jobs, workers, progress):
        compiled.extend(jobs)
        return {job: CompileError("it died") if job.case.endswith("bwd") and job.config else [ROW] for job in jobs}

    def sweep(case, configs, seconds, dry_run):
        swept.append((case, configs, seconds, dry_run))
        return [tune.Result(config, 2.0 - i, 1.0, 3.0) for i, config in enumerate(configs)]

    monkeypatch.setattr(tune.static, "examine", examine)
    monkeypatch.setattr(tune, "sweep", sweep)
    tune.main(["--dry-run", "--op", "layer_norm"])
    forward, backward = (tune.candidates(f"layer_norm/{way}", 80)[:2] for way in ("fwd", "bwd"))
    assert [job.config for job in compiled] == [*forward, *backward]
    settings = (tune.DRY_RUN_S, True)
    assert swept == [("layer_norm/fwd", forward, *settings), ("layer_norm/bwd", backward[:1], *settings)]
    printed = capsys.readouterr().out
    block_c = dict(forward[1])["block_c"]
    assert printed.index(f"(block_c={block_c}") < printed.index("(chosen now)  # measured 2000.0 us (1000.0-3000.0)")
    assert ": it died" in printed
    assert printed.rstrip().endswith("comment included.")


@pytest.mark.slow
def test_a_dry_run_compiles_judges_and_times_in_the_interpreter(capsys):
    tune.main(["--dry-run", "--op", "layer_norm"])
    printed = capsys.readouterr().out
    assert printed.count("(chosen now)  # measured") == 2
    assert "died" not in printed


def test_the_command_wants_a_gpu_or_a_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tune.main([])
    message = "error: bench.tune: expected a CUDA device, got none; --dry-run needs none\n"
    assert (end.value.code, capsys.readouterr().err) == (2, message)


def test_configs_pass_the_process_boundary_unchanged():
    for config in tune.candidates("attention/fwd", 90):
        assert tune._config(json.loads(json.dumps(config))) == config
