"""Which half of the suite this process runs, and what it says at the end.

Triton's interpreter and its compiler exclude each other, so `make test` is two processes: `pytest` runs what needs no
interpreter, `TRITON_INTERPRET=1 pytest -m interpreter` the rest. Each prints what it left to others; pytest exits with
code 5 when a half turns out empty. `slow` tests run only where -m names them, `gpu` ones only beside a CUDA device.
"""

import os
from collections import Counter

import pytest
import torch

from tests import numerics

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_left_out: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    # Reductions on a CPU change bits with the number of threads, and xdist has a process for every core.
    torch.set_num_threads(1)


def _reason_to_leave_out(item: pytest.Item, wants_slow: bool) -> str | None:
    marks = {mark.name for mark in item.iter_markers()}
    if ("interpreter" in marks) != INTERPRET:
        return "of the other half (TRITON_INTERPRET=1 or not)"
    if "gpu" in marks and not torch.cuda.is_available():
        return "gpu (no CUDA device here)"
    if "slow" in marks and not wants_slow:
        return "slow (make test-slow)"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_slow = "slow" in config.option.markexpr
    reasons = {item: _reason_to_leave_out(item, wants_slow) for item in items}
    _left_out.update(reason for reason in reasons.values() if reason)
    config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
    items[:] = [item for item in items if not reasons[item]]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Gathers what the processes of pytest-xdist left out (all the same) and their worst numerics findings."""
    report = getattr(node, "workeroutput", {})
    _left_out.update({reason: n for reason, n in report.get("left_out", {}).items() if reason not in _left_out})
    for finding in report.get("numerics", []):
        numerics.record(numerics.Finding(*finding))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        findings = [(f.what, f.dtype, f.ratio, f.criterion, f.where) for f in numerics.worst.values()]
        session.config.workeroutput.update(left_out=dict(_left_out), numerics=findings)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if numerics.worst:
        terminalreporter.section("numerics: error / allowed error, worst of each op")
        for (op, dtype), finding in sorted(numerics.worst.items()):
            write(f"{op:24} {dtype:9} {finding.ratio:6.3f}  {finding.criterion:4} {finding.what} {finding.where}")
    half = "interpreter" if INTERPRET else "torch and compiler"
    left = "; ".join(f"{n} {reason}" for reason, n in sorted(_left_out.items())) or "nothing"
    write(f"half: {half}; left out: {left}")
    if INTERPRET:
        write("The interpreter is not a GPU: it runs programs one by one, without races, tf32 or 16-bit accumulators.")
