"""Curves of runs: what is read, drawn and written, and that the HTML file needs nothing else."""

import base64
import json
import math
import sys
from html.parser import HTMLParser

import pytest
from matplotlib import pyplot

from train import report
from train.report import Run, draw_curves, write_html
from xiangxin_fast.errors import InputError

HOSTILE = "<script>alert(1)</script>"


def make_run(path, steps: int = 100, **settings):
    """A run directory as train/run.py leaves it, one loss of which is not finite and the last line of which is torn."""
    path.mkdir()
    lines = []
    for step in range(1, steps + 1):
        loss = math.nan if step == 7 else 10 / step
        record = {"step": step, "loss": loss, "grad_norm": 1 / step, "skipped": int(step == 7), "tokens": 512 * step}
        record |= {"epoch": step / 50, "seconds": 2.0 * step, "tokens_per_second": 256.0 + step % 2}
        lines.append(record)
        if step % 50 == 0:
            lines.append({"step": step, "val_loss": 11 / step, "tokens": 512 * step, "progress": step / steps})
    events = [{"event": "skip", "step": 7, "time": "2026-01-02T03:04:05", "loss": HOSTILE}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (path / "config.json").write_text(json.dumps({"training": {"preset": "demo", "lr": 1e-3, **settings}}))
    (path / "environment.json").write_text(json.dumps({"cpu": "a <cpu>", "gpu": None, "commit": "abc"}))
    return path


class Page(HTMLParser):
    """The tables of a page as lists of rows, and every address it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.addresses, self.tags, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = tag

    def handle_endtag(self, tag):
        self._cell = None if tag == self._cell else self._cell

    def handle_data(self, data):
        if self._cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, kept open."""
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    monkeypatch.undo()
    for figure in kept:
        pyplot.close(figure)


def test_curves_show_every_run_over_its_tokens(tmp_path, figures):
    runs = [Run.read(make_run(tmp_path / "one")), Run.read(make_run(tmp_path / "two", steps=50))]
    draw_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loss, speed, norm = figures[0].axes
    measured, smooth, held_out, skip = loss.lines[:4]
    assert list(measured.get_xdata()) == [512 * step for step in range(1, 101)]
    assert measured.get_ydata()[4] == 2.0
    assert list(held_out.get_xdata()) == [25_600, 51_200]
    assert list(held_out.get_ydata()) == [11 / 50, 11 / 100]
    assert list(skip.get_xdata()) == [512 * 7, 512 * 7]
    assert smooth.get_ydata()[6] == pytest.approx(10 / 6), "a value that is not finite leaves the mean of the others"
    assert [text.get_text() for text in loss.get_legend().get_texts()][0::2] == ["one", "two"]
    assert speed.lines[0].get_ydata()[0] == 257.0
    assert norm.get_yscale() == "log"


def test_the_html_file_is_whole_by_itself_and_runs_nothing(tmp_path):
    runs = [Run.read(make_run(tmp_path / "one", data=HOSTILE)), Run.read(make_run(tmp_path / "<b>two", steps=50))]
    picture, out = tmp_path / "curves.png", tmp_path / "curves.html"
    draw_curves(runs, picture)
    write_html(runs, picture, out)
    page = Page(out.read_text(encoding="utf-8"))
    (address,) = page.addresses
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert "http" not in out.read_text().replace(address, "")
    assert not {"script", "b", "link", "iframe"} & set(page.tags)
    about, losses, events = page.tables
    assert about[0] == ["", "one", "<b>two"]
    found = {row[0]: row[1:] for row in about}
    assert found["data"] == [HOSTILE, ""]
    assert found["tokens"] == ["51,200", "25,600"]
    assert found["updates skipped"] == ["1", "1"]
    assert found["validation loss, best"] == ["0.1100 at step 100", "0.2200 at step 50"]
    assert found["training loss, last 2 steps"] == [f"{(10 / 99 + 10 / 100) / 2:.4f}", ""]
    assert losses[1:] == [["50", "0.2200", "0.2200"], ["100", "0.1100", ""]]
    assert events[1] == ["one", "7", "skip", "2026-01-02T03:04:05", f"loss {HOSTILE}"]


def test_a_directory_without_a_step_on_record_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected the metrics of a run"):
        Run.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["RUN", "--owt", "x.png"], "perhaps you meant --out"),
        (["RUN", "--out", "x.svg"], "--out to end in .png"),
        (["RUN", "--out", "absent/x.png"], "expected to write"),
        ([], "at least one run directory"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    run = str(make_run(tmp_path / "one"))
    monkeypatch.setattr(sys, "argv", ["report.py", *(run if word == "RUN" else word for word in arguments)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main()
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert complaint in shown
    assert shown.count("\n") == 1


def test_the_command_writes_both_files(tmp_path, monkeypatch, capsys):
    run, out = make_run(tmp_path / "one"), tmp_path / "r.png"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(out)])
    report.main()
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "r.html")]
    assert (tmp_path / "r.html").stat().st_size > out.stat().st_size > 0
