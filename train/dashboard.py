"""A run on the terminal: a panel that redraws itself; where there is no terminal to draw on, a line every few seconds.

A sink of train/metrics.py like any other: it is given records and events, and when it fails, training goes on without.
"""

import math
import time
from datetime import datetime, timedelta

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .gpus import GIB, gpu_called
from .metrics import RunInfo

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
REDRAW_SECONDS = 0.5  # between drawings of the panel, which take a few milliseconds
SMOOTHING = 0.9  # of the loss and the speed shown; what is written is as measured
SHOWN = ("save_failed", "rejected", "skip", "spike", "rewind", "replicas")  # events worth a line
SPARKS, ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
SPLIT = {"data": "data", "forward_backward": "forward, backward", "optimizer": "optimizer", "other": "other"}


class Curve:
    """A value over a whole run as `width` to 2 `width` means of equally many records each."""

    def __init__(self, width: int = 40):
        self._width, self._stride, self._means, self._part = width, 1, [], []

    def add(self, value: float) -> None:
        """Values that are not finite are left out: they would flatten the rest."""
        if not math.isfinite(value):
            return
        self._part.append(value)
        if len(self._part) < self._stride:
            return
        self._means.append(sum(self._part) / self._stride)
        self._part = []
        if len(self._means) == 2 * self._width:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stride *= 2

    def sparkline(self, sparks: str = SPARKS) -> str:
        """One character for each of the last `width` means, from the lowest of them to the highest."""
        shown = self._means[-self._width :]
        low, high = min(shown, default=0.0), max(shown, default=0.0)
        step = (high - low) / len(sparks)
        return "".join(sparks[min(int((value - low) / step), len(sparks) - 1) if step else 0] for value in shown)


class Dashboard:
    """Progress, loss, speed, utilisation, the split of a step, memory and the time left, of the whole run."""

    recovers = False

    def __init__(self, info: RunInfo):
        self.info, self.console = info, info.console
        self._record, self._val, self._loss, self._rate, self._skipped = {}, None, None, None, 0
        self._curves = {name: Curve() for name in ("loss", "grad_norm", "tokens_per_second")}
        self._event, self._shown_at = "", -math.inf
        gpu = gpu_called(info.device)
        self._room = gpu and gpu.memory
        self._flops = gpu and gpu.flops * info.ranks
        self._live = None
        if self.console.is_interactive:  # not on a dumb terminal, where a panel would show nothing until the end
            # Drawn by whoever writes: an error in a thread of rich's would not reach the guard around the sinks.
            self._live = Live(self.render(), console=self.console, auto_refresh=False)
            self._live.start()

    def write(self, record: dict) -> None:
        self._record = self._record | record
        self._val = record.get("val_loss", self._val)
        self._skipped += int(record.get("skipped", 0))
        if "loss" in record:
            for name, curve in self._curves.items():
                curve.add(record[name])
            self._loss = _smoothed(self._loss, record["loss"])
            self._rate = _smoothed(self._rate, record["tokens_per_second"])
        if "val_loss" in record or time.monotonic() - self._shown_at >= (
            REDRAW_SECONDS if self._live else PLAIN_SECONDS
        ):
            self._shown_at = time.monotonic()
            self._show()

    def _show(self) -> None:
        if self._live is None:
            self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)
            return
        try:
            self._live.update(self.render(), refresh=True)
        except Exception:
            self._live.stop()  # or the terminal stays without a cursor for the rest of the run
            raise

    def event(self, event: dict) -> None:
        if event["event"] not in SHOWN:
            return
        details = (f"{name} {value}" for name, value in event.items() if name not in ("event", "step", "time"))
        self._event = ": ".join(filter(None, (f"step {event['step']:,}: {event['event']}", ", ".join(details))))
        self.console.print(self._event, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            self._live.stop()

    def utilization(self) -> tuple[float, float] | None:
        """MFU with the causal half of the attention counted and with all of it; None where the peak is not known."""
        if self._rate is None or not self._flops:
            return None
        causal, full = self.info.model.flops_per_token(self.info.config.context)
        return causal * self._rate / self._flops, full * self._rate / self._flops

    def line(self) -> str:
        """The newest state as plain text."""
        parts = [f"{self._record['progress']:4.0%}  step {self._record['step']:,}"]
        parts += [f"loss {self._loss:.3f}"] if self._loss is not None else []
        parts += [f"val {self._val:.3f}"] if self._val is not None else []
        parts += [f"{self._rate:,.0f} tokens/s"] if self._rate is not None else []
        if (mfu := self.utilization()) is not None:
            parts.append(f"MFU {mfu[0]:.1%} causal {mfu[1]:.1%} full")
        parts += [f"epoch {self._record['epoch']:.2f}"] if "epoch" in self._record else []
        parts += [f"ETA {_duration(self._record['eta_seconds'])}"] if "eta_seconds" in self._record else []
        return " | ".join(parts)

    def render(self) -> Panel:
        """The newest state as a panel."""
        record, config = self._record, self.info.config
        where = f"{self.info.ranks} x {self.info.device}" if self.info.ranks > 1 else self.info.device
        title = f"{self.info.run.name} | {config.preset} | {where}"
        if "progress" not in record:
            return Panel("waiting for the first step", title=Text(title), title_align="left")
        sparks = ASCII_SPARKS if self.console.options.ascii_only else SPARKS
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column(justify="right")
        rows.add_column()
        if self._loss is not None:
            val = "" if self._val is None else f"  validation {self._val:.4f}"
            rows.add_row("loss", f"{self._loss:.4f}", Text(self._curves["loss"].sparkline(sparks) + val))
            norm = self._curves["grad_norm"].sparkline(sparks)
            rows.add_row("gradient norm", f"{record['grad_norm']:.3f}", Text(f"{norm}  lr {record['lr']:.2e}"))
            rows.add_row("tokens/s", f"{self._rate:,.0f}", Text(self._curves["tokens_per_second"].sparkline(sparks)))
            if (mfu := self.utilization()) is not None:
                rows.add_row("MFU", f"{mfu[0]:.1%}", f"with causal attention counted, {mfu[1]:.1%} with full")
            rows.add_row("step", f"{record['step_seconds']:.3g} s", Text(self._split()))
            room = f"of {self._room / GIB:.1f} GiB, peak of a rank" if self._room else "peak of a rank"
            rows.add_row("memory", f"{record['memory_bytes'] / GIB:.2f} GiB", room)
        if self._skipped or self._event:
            rows.add_row("trouble", f"{self._skipped} skipped", Text(self._event))
        bar = Table.grid(padding=(0, 2))
        done = f"{record['progress']:.1%}  step {record['step']:,} of {config.steps:,}"
        done += f"  {record['tokens']:,} tokens" if "tokens" in record else ""
        done += f"  epoch {record['epoch']:.2f}" if "epoch" in record else ""
        bar.add_row(ProgressBar(total=1.0, completed=record["progress"], width=24), done, self._end())
        return Panel(Group(bar, rows), title=Text(title), title_align="left")

    def _split(self) -> str:
        """Where the time of the newest step went."""
        whole = self._record["step_seconds"]
        found = {label: self._record.get(f"{name}_seconds") for name, label in SPLIT.items()}
        return "  ".join(f"{label} {seconds / whole:.1%}" for label, seconds in found.items() if seconds is not None)

    def _end(self) -> str:
        if "eta_seconds" not in self._record:
            return ""
        left = self._record["eta_seconds"]
        return f"ETA {_duration(left)}, {datetime.now() + timedelta(seconds=left):%b %d %H:%M}"


def _duration(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86_400)
    return f"{days} d {rest // 3600} h" if days else str(timedelta(seconds=rest))


def _smoothed(old: float | None, new: float) -> float:
    if old is None or not math.isfinite(old):
        return new
    return SMOOTHING * old + (1 - SMOOTHING) * new if math.isfinite(new) else old
