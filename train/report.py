"""Draws what one or more runs did: `python train/report.py RUN... --out curves.png`, and the same as one HTML file."""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import base64
import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import tyro

from train.metrics import EVENTS, METRICS, read_lines
from xiangxin_fast.errors import InputError, exits_cleanly, one_line_complaints

CURVES = (
    ("loss", "loss, nats per token"),
    ("tokens_per_second", "tokens/s, all ranks"),
    ("grad_norm", "gradient norm"),
)
MARKED = ("skip", "spike", "rewind")  # events that are drawn
SETTINGS = ("preset", "steps", "batch", "micro_batch", "context", "lr", "seed", "data")


@dataclass(frozen=True)
class Run:
    """What a run directory holds of its past."""

    path: Path
    steps: list[dict]  # the records of optimizer steps
    held_out: list[dict]  # those of validations
    events: list[dict]
    settings: dict
    environment: dict

    @staticmethod
    def read(path: Path) -> "Run":
        """InputError where there is no training step on record."""
        records = read_lines(path / METRICS)
        steps = [record for record in records if "loss" in record]
        if not steps:
            raise InputError(f"{path / METRICS}: expected the metrics of a run, got no training step")
        held_out = [record for record in records if "val_loss" in record]
        settings, environment = (_object(path / name) for name in ("config.json", "environment.json"))
        return Run(path, steps, held_out, read_lines(path / EVENTS), settings.get("training", {}), environment)

    def summary(self) -> dict[str, str]:
        """The run in a column of a table."""
        last, few = self.steps[-1], self.steps[-max(1, len(self.steps) // 50) :]
        best = min(self.held_out, key=lambda record: record["val_loss"], default=None)
        rates = [r["tokens_per_second"] for r in self.steps]
        found = {name: self.settings.get(name) for name in SETTINGS}
        found |= {
            "step": f"{last['step']:,}",
            "tokens": f"{last['tokens']:,}",
            "epochs": f"{last['epoch']:.3f}",
            "time": str(timedelta(seconds=round(last["seconds"]))),
            f"training loss, last {len(few)} steps": f"{_mean([r['loss'] for r in few]):.4f}",
            "validation loss, last": f"{self.held_out[-1]['val_loss']:.4f}" if self.held_out else None,
            "validation loss, best": f"{best['val_loss']:.4f} at step {best['step']:,}" if best else None,
            "tokens/s, median": f"{statistics.median(rates):,.0f}",
            "updates skipped": str(sum(int(r.get("skipped", 0)) for r in self.steps)),
        }
        found |= {name: self.environment.get(name) for name in ("gpu", "cpu", "torch", "triton", "commit")}
        return {name: "" if value is None else str(value) for name, value in found.items()}


def _object(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def draw_curves(runs: Sequence[Run], out: Path) -> None:
    """Writes a PNG: loss (validation dashed), speed and gradient norm over the tokens seen, for each run.

    Faint: as measured; strong: the running mean. Skipped updates, spikes and rewinds are marked on the loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(CURVES), figsize=(9, 10), dpi=120, sharex=True, height_ratios=(2, 1, 1))
    for number, run in enumerate(runs):
        tokens, colour = [record["tokens"] for record in run.steps], f"C{number}"
        for panel, (name, _) in zip(panels, CURVES, strict=True):
            values = [record[name] for record in run.steps]
            panel.plot(tokens, values, color=colour, alpha=0.2, linewidth=0.8)
            panel.plot(tokens, _running_mean(values), color=colour, label=run.path.name)
        points = [record["tokens"] for record in run.held_out], [record["val_loss"] for record in run.held_out]
        style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": "--"}
        panels[0].plot(*points, **style, label=f"{run.path.name}: validation")
        seen = {record["step"]: record["tokens"] for record in run.steps}
        for event in run.events:
            if event["event"] in MARKED and event["step"] in seen:
                panels[0].axvline(seen[event["step"]], color=colour, linewidth=0.8, linestyle=":")
    for panel, (_, label) in zip(panels, CURVES, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].set_yscale("log")
    panels[-1].set_xlabel("tokens")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(out)
    pyplot.close(figure)


def _running_mean(values: list[float]) -> list[float]:
    """Each value as the mean of itself and the up to 2% of the run before it."""
    width = max(1, len(values) // 50)
    return [_mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; background: white }
table { border-collapse: collapse; margin: 0 0 2rem }
th, td { padding: .25rem .9rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
td { font-variant-numeric: tabular-nums }
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def write_html(runs: Sequence[Run], picture: Path, out: Path) -> None:
    """Writes one file that needs no other and no network: the picture, and tables of what the runs were and reached."""
    summaries = [run.summary() for run in runs]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    rows = [[name, *(summary.get(name, "") for summary in summaries)] for name in names]
    steps = sorted({record["step"] for run in runs for record in run.held_out})
    losses = [{record["step"]: f"{record['val_loss']:.4f}" for record in run.held_out} for run in runs]
    events = [
        (run.path.name, event["step"], event["event"], event["time"], _details(event))
        for run in runs
        for event in run.events
    ]
    columns = [run.path.name for run in runs]
    image = base64.b64encode(picture.read_bytes()).decode()
    body = [
        "<h1>Training runs</h1>",
        f'<img alt="loss, tokens per second and gradient norm over tokens" src="data:image/png;base64,{image}">',
        "<h2>Runs</h2>",
        _table(["", *columns], rows),
        "<h2>Validation loss, nats per token</h2>",
        _table(["step", *columns], [[f"{step:,}", *(found.get(step, "") for found in losses)] for step in steps]),
        "<h2>Events</h2>",
        _table(["run", "step", "event", "time", "details"], events),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(", ".join(columns))}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
    out.write_text(page, encoding="utf-8")


def _details(event: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "step", "time"))


@dataclass(frozen=True)
class Options:
    """Draw loss, speed and gradient norm of training runs, as a PNG and as an HTML file with tables."""

    runs: tyro.conf.Positional[list[Path]]
    """Run directories of train/run.py."""
    out: Path = Path("curves.png")
    """PNG to write; the HTML file goes beside it, under the same name."""


@exits_cleanly
def main() -> None:
    """The command line; prints the names of what it wrote."""
    with one_line_complaints():
        options = tyro.cli(Options, prog="python train/report.py")
    if not options.runs:
        raise InputError("report: expected at least one run directory, got none")
    if options.out.suffix != ".png":
        raise InputError(f"report: expected --out to end in .png, got {options.out}")
    runs, page = [Run.read(path) for path in options.runs], options.out.with_suffix(".html")
    try:
        draw_curves(runs, options.out)
        write_html(runs, options.out, page)
    except OSError as error:
        raise InputError(f"report: expected to write {options.out} and {page.name}, got: {error}") from error
    print(f"{options.out}\n{page}")


if __name__ == "__main__":
    main()
