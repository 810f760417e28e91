"""Draws the loss curves of one or more runs: `python train/report.py RUN... --out curves.png`."""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import tyro

from train.metrics import METRICS, read_metrics
from xiangxin_fast.errors import InputError, exits_cleanly


def loss_curves(runs: list[Path], out: Path) -> None:
    """Writes a PNG: training loss per step (faint), its running mean, and validation losses, in nats per token.

    The abscissa is tokens seen, so that runs with other batches compare. InputError where a run has no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for number, run in enumerate(runs):
        records = read_metrics(run)
        steps = [record for record in records if "loss" in record]
        if not steps:
            raise InputError(f"{run / METRICS}: expected the metrics of a run, got no training step")
        tokens = {0: 0} | {record["step"]: record["tokens"] for record in steps}
        losses, colour = [record["loss"] for record in steps], f"C{number}"
        axes.plot([r["tokens"] for r in steps], losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot([r["tokens"] for r in steps], _running_mean(losses), color=colour, label=f"{run.name}: training")
        held_out = [record for record in records if "val_loss" in record]
        axes.plot(
            [tokens[r["step"]] for r in held_out],
            [r["val_loss"] for r in held_out],
            color=colour,
            marker="o",
            markersize=4,
            linestyle="--",
            label=f"{run.name}: validation",
        )
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)
    pyplot.close(figure)


def _running_mean(values: list[float]) -> list[float]:
    """Each value as the mean of itself and the up to 2% of the run before it."""
    width = max(1, len(values) // 50)
    return [sum(part := values[max(0, i + 1 - width) : i + 1]) / len(part) for i in range(len(values))]


@exits_cleanly
def main(runs: tyro.conf.Positional[list[Path]], /, out: Path = Path("curves.png")) -> None:
    """Draw the loss curves of training runs.

    Args:
        runs: run directories of train/run.py
        out: PNG to write
    """
    if not runs:
        raise InputError("expected at least one run directory")
    loss_curves(runs, out)
    print(out)


if __name__ == "__main__":
    tyro.cli(main, prog="python train/report.py")
