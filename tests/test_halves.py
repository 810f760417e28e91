"""The two processes of `make test`: each says what it left to the other, and an empty one fails."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _pytest(*arguments: str, interpret: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_an_empty_half_fails_and_says_why():
    done = _pytest("tests/test_lint.py", interpret="1")
    assert done.returncode == 5, done.stdout
    assert "of the other half" in done.stdout
    assert "The interpreter is not a GPU" in done.stdout


def test_workers_report_to_the_summary():
    """With pytest-xdist the tests run elsewhere; counts and findings still reach the end of the output."""
    done = _pytest("-n1", "tests/kernels/test_layer_norm.py", "-k", "1-80 or thousand", interpret="1")
    assert done.returncode == 0, done.stdout
    assert "numerics: error / allowed error" in done.stdout
    assert "layer_norm" in done.stdout
    assert "1 slow (make test-slow)" in done.stdout
