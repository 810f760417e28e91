"""The terminal's view of a run: what it says, and that nothing it does can stop training."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from train import dashboard
from train.config import TrainConfig
from train.dashboard import Curve, Dashboard
from train.gpus import GPUS
from train.metrics import JsonLines, RunInfo, RunLog, read_metrics
from xiangxin_fast.config import PhiConfig

PHI = PhiConfig.from_preset("xiangxin-3b")
RECORD = {
    "step": 71_500, "loss": 2.5, "grad_norm": 0.25, "lr": 1.5e-4, "skipped": 0, "tokens": 75_000_000_000,
    "epoch": 1.5, "progress": 0.5, "tokens_per_second": 80_000.0, "seconds": 1e6, "eta_seconds": 2 * 86_400 + 7_300.0,
    "step_seconds": 10.0, "data_seconds": 0.1, "forward_backward_seconds": 9.5, "optimizer_seconds": 0.3,
    "other_seconds": 0.1, "memory_bytes": 44 * 2**30,
}  # fmt: skip


def info_of(console: Console, device: str = "NVIDIA A800-SXM4-80GB", run: Path = Path("runs/first")) -> RunInfo:
    config = TrainConfig("xiangxin-3b", Path("shards"), run)
    return RunInfo(run, 0, config, PHI, 8, device, console)


def console_of(terminal: bool, **options) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=110, **options)


def drawn(console: Console) -> str:
    """What stands in the console's file, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_the_panel_shows_everything_a_run_is_watched_for():
    console = console_of(terminal=True)
    shown = Dashboard(info_of(console))
    shown.write(RECORD)
    shown.write({"step": 71_500, "val_loss": 2.625, "tokens": 75_000_000_000, "progress": 0.5})
    shown.event({"event": "skip", "step": 71_499, "time": "", "reason": "loss is nan on rank 3"})
    shown.close()
    last = drawn(console).rpartition("╭")[2]
    causal, full = (flops * 80_000 / (8 * 312e12) for flops in PHI.flops_per_token(2048))
    for expected in (
        "first | xiangxin-3b | 8 x NVIDIA A800", "50.0%", "step 71,500 of 143,000", "epoch 1.50", "ETA 2 d 2 h",
        "2.5000", "validation 2.6250", "0.250", "1.50e-04", "80,000", f"{causal:.1%}", f"{full:.1%} with full", "10 s",
        "data 1.0%", "forward, backward 95.0%", "optimizer 3.0%", "44.00 GiB", "of 80.0 GiB",
        "step 71,499: skip: reason loss is nan",
    ):  # fmt: skip
        assert expected in last, expected


def test_without_a_terminal_there_are_plain_lines_few_and_without_control_sequences(monkeypatch):
    """A line at once, then every ten seconds, and one for each validation and each trouble."""
    now = [0.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    console = console_of(terminal=False)
    shown = Dashboard(info_of(console))
    for step in range(1, 41):
        now[0] += 1.0
        shown.write(RECORD | {"step": step})
    shown.write({"step": 40, "val_loss": 2.625, "tokens": 1, "progress": 0.5})
    shown.event({"event": "save", "step": 40, "time": ""})
    shown.event({"event": "save_failed", "step": 40, "time": "", "reason": "[Errno 28] No space left on device"})
    shown.close()
    lines = console.file.getvalue().splitlines()
    assert "\x1b" not in console.file.getvalue()
    assert [int(re.search(r"step (\d+)", line)[1]) for line in lines] == [1, 11, 21, 31, 40, 40]
    assert lines[0].startswith(" 50%  step 1 | loss 2.500 | 80,000 tokens/s | MFU ")
    assert "val 2.625" in lines[-2]
    assert lines[-1] == "step 40: save_failed: reason [Errno 28] No space left on device"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    """rich draws nothing there before the end."""
    monkeypatch.setenv("TERM", "dumb")
    console = console_of(terminal=True)
    Dashboard(info_of(console)).write(RECORD)
    assert "loss 2.500" in drawn(console)


def test_utilization_counts_all_ranks_and_is_not_guessed_for_a_device_without_a_peak_on_record():
    for name in GPUS:
        shown = Dashboard(info_of(console_of(terminal=False), GPUS[name].called))
        assert shown.utilization() is None, "nothing was measured yet"
        shown.write(RECORD)
        causal, full = PHI.flops_per_token(2048)
        peak = 8 * GPUS[name].flops
        assert shown.utilization() == (pytest.approx(causal * 8e4 / peak), pytest.approx(full * 8e4 / peak))
    shown = Dashboard(info_of(console_of(terminal=False), "cpu"))
    shown.write(RECORD)
    assert shown.utilization() is None
    assert "MFU" not in shown.line()


def test_a_curve_of_a_long_run_keeps_its_shape_in_few_values():
    curve = Curve(width=8)
    for i in range(100_000):
        curve.add(float(i))
        curve.add(math.nan)
    assert curve.sparkline("abcdefgh") == "abcdefgh"
    assert len(curve._means) <= 16
    flat = Curve(width=8)
    assert flat.sparkline() == ""
    flat.add(1.0)
    flat.add(1.0)
    assert flat.sparkline("ab") == "aa"


def test_a_loss_that_is_not_finite_does_not_stay_in_the_mean_shown():
    shown = Dashboard(info_of(console_of(terminal=False)))
    for loss in (2.0, math.nan, 2.0):
        shown.write(RECORD | {"loss": loss})
    assert "loss 2.000" in shown.line()


def test_a_terminal_without_unicode_gets_ascii():
    class Latin(io.StringIO):
        encoding = "latin-1"

    console = Console(file=Latin(), force_terminal=True, width=110)
    shown = Dashboard(info_of(console))
    for loss in (3.0, 2.0, 1.0):
        shown.write(RECORD | {"loss": loss})
    shown.close()
    console.file.getvalue().encode("latin-1")


class Hangup(io.StringIO):
    """A terminal that has gone away."""

    broken = False

    def write(self, text):
        if self.broken:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_incident_terminal_closed_and_training_went_on_and_was_recorded(tmp_path, terminal):
    """The sink fails, and so does the console on which that would be reported: metrics.jsonl still has every step."""
    console = Console(file=Hangup(), force_terminal=terminal, width=110)
    log = RunLog(info_of(console, run=tmp_path), (JsonLines, Dashboard))
    log.write(RECORD | {"step": 1})
    console.file.broken = True
    for step in (2, 3):
        dashboard_due = RECORD | {"step": step, "val_loss": 2.0}
        log.write(dashboard_due)
        log.event("save", step)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_panel_that_cannot_be_drawn_gives_the_terminal_back(monkeypatch):
    console = console_of(terminal=True)
    shown = Dashboard(info_of(console))
    monkeypatch.setattr(shown, "render", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shown.write(RECORD)
    assert console.file.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"
