"""bench.report: what it makes of result files, and that the README holds exactly that."""

import functools
import json
import sys
from pathlib import Path

import pytest

from bench import gpu, report
from bench.tables import train_table
from xiangxin_fast.errors import InputError

README = "# Title\n" + "".join(f"<!-- bench:begin {n} -->\nold\n<!-- bench:end {n} -->\ntext\n" for n in report.BLOCKS)


@pytest.fixture
def measured(tmp_path) -> tuple[Path, Path]:
    """A README with markers, and a directory of results that a GPU run was added to."""
    run, results, readme = tmp_path / "run", tmp_path / "results", tmp_path / "README.md"
    run.mkdir()
    facts = {
        "device": "NVIDIA X100",
        "capability": "9.0",
        "date": "2026-01-02T03:04:05Z",
        "torch": "2",
        "commit": "abc",
    }
    gpu.append(run / gpu.RESULTS, {"kind": "environment"} | facts)
    gpu.append(run / gpu.RESULTS, {"kind": "ceilings", "copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14})
    for provider, ms in (("ours", 2.0), ("slow", 9.0), ("fast", 3.0)):
        about = {"kind": "time", "op": "attention", "shape": "B=8", "dtype": "bfloat16", "mode": "fwd"}
        figures = {"ms": ms, "p20": ms, "p80": ms, "tflops": 600 / ms, "gbs": 800 / ms, "percent": 50.0}
        extra = {"provider": provider, "implementation": "kernels", "ratio": 0.5}
        gpu.append(run / gpu.RESULTS, about | figures | extra)
    assert report.add(run, results).name == "gpu-nvidia-x100-2026-01-02T0304.jsonl"
    readme.write_text(README)
    return readme, results


def test_report_writes_the_tables_from_the_results_and_knows_when_they_are_stale(measured):
    readme, results = measured
    picture = "gpu-nvidia-x100-2026-01-02T0304-attention.png"
    assert report.stale(readme, results) == ["README.md, gpu", "README.md, cpu", "README.md, demo", picture]
    report.write(readme, results)
    assert report.stale(readme, results) == []
    text = readme.read_text()
    assert "| attention | B=8 | fwd | 2 ms | 300 TFLOP/s | 50% | fast, 3 ms | 1.50x |" in text
    assert text.startswith("# Title\n")
    assert text.count("text\n") == 3
    assert "old" not in text
    readme.write_text(text.replace("300 TFLOP/s", "400 TFLOP/s"))
    assert report.stale(readme, results) == ["README.md, gpu"]
    file = next(results.glob("*.jsonl"))
    report.write(readme, results)
    file.write_text(file.read_text() + "\n")
    assert report.stale(readme, results) == [picture]
    report.write(readme, results)
    (results / "gpu-of-no-run.png").touch()
    assert report.stale(readme, results) == ["gpu-of-no-run.png"]


def test_the_report_command_says_what_is_stale_and_writes_it(measured, tmp_path, monkeypatch, capsys):
    readme, results = measured
    for name in ("stale", "write"):
        monkeypatch.setattr(report, name, functools.partial(getattr(report, name), readme, results))
    monkeypatch.setattr(report, "add", functools.partial(report.add, results=results))

    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.report", *options])
        report.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"run: python -m bench\.report"):
        said("--check")
    before = capsys.readouterr().out
    assert before.startswith("stale: README.md, gpu\n")
    assert said() == before.replace("stale: ", "written: ")
    assert said("--check") == ""
    file = next(results.glob("*.jsonl"))
    file.unlink()
    assert said("--add", str(tmp_path / "run")) == f"added: {file}\n"
    with pytest.raises(SystemExit) as end:
        said("--add", str(tmp_path))
    assert end.value.code == 2


def test_report_says_what_is_not_measured(tmp_path):
    for build in report.BLOCKS.values():
        assert "not yet measured" in build(tmp_path).lower()


def test_report_refuses_a_run_without_a_gpu(tmp_path):
    gpu.append(tmp_path / gpu.RESULTS, {"kind": "environment", "device": "a CPU", "date": "2026-01-02T03:04:05Z"})
    with pytest.raises(InputError, match="expected a run on a GPU, got one on a CPU"):
        report.add(tmp_path, tmp_path / "results")


def test_report_of_the_cpu_chain(tmp_path):
    where = {"environment": {"device": "CPU", "torch": "2", "commit": "abc", "date": "2026"}}
    both = {"xiangxin_fast": {"median_s": 0.2}, "transformers": {"median_s": 0.5}}
    generate = {"dtype": "bfloat16", "parameters": 10, "prompt_tokens": 32, "decode": both, "peer_dtype": "bfloat16"}
    (tmp_path / "cpu-generate-avx2.json").write_text(json.dumps(where | {"results": [generate]}))
    losses = {"unigram_loss": 7.0, "validation_loss": 5.5, "steps": 9, "minutes": 5, "held_out_tokens": 100}
    (tmp_path / "cpu-demo.json").write_text(json.dumps(where | {"results": [losses]}))
    assert "| decode after 32 tokens | bfloat16 | 0.200 s | 0.500 s | 2.50x |" in report.cpu_block(tmp_path)
    assert "| lower by | 1.500 |" in report.demo_block(tmp_path)


def test_readme_and_pictures_are_those_of_the_result_files():
    assert report.stale() == [], "run: python -m bench.report"


def test_training_compares_a_peer_with_ours_of_the_same_round():
    """Drift between rounds must not enter the ratio."""
    common = {"kind": "train", "micro_batch": 8, "T": 2048, "ms": 1.0, "p20": 1.0, "p80": 1.0}
    speeds = (("ours", 300.0), ("peer", 200.0), ("ours", 150.0), ("peer", 120.0))
    table = train_table([common | {"provider": provider, "tokens_per_s": speed} for provider, speed in speeds])
    assert [row[-1] for row in table.rows] == ["", "1.50x", "", "1.25x"]
    assert {len(row) for row in table.rows} == {len(table.header)}
