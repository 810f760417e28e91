"""Timings as pictures: one figure per op, bars of what each provider reaches and the roofline they stand under."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .tables import OURS, of_kind

OURS_COLOUR, PEER_COLOUR = "#c8102e", "#8899aa"


def _speed(record: dict, compute_bound: bool) -> float:
    return record["tflops"] if compute_bound else record["gbs"]


def _bars(axes: Axes, times: list[dict], compute_bound: bool) -> None:
    labels = [f"{r['provider']}, {r['mode']}" for r in times]
    colours = [OURS_COLOUR if r["provider"] == OURS else PEER_COLOUR for r in times]
    values = [_speed(r, compute_bound) for r in times]
    # Times spread by p20..p80; a speed is the inverse, so its bar reaches from p80's to p20's.
    low = [v * (1 - r["ms"] / r["p80"]) for v, r in zip(values, times, strict=True)]
    high = [v * (r["ms"] / r["p20"] - 1) for v, r in zip(values, times, strict=True)]
    axes.barh(labels, values, xerr=[low, high], color=colours, height=0.7, error_kw={"elinewidth": 0.8})
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("TFLOP/s" if compute_bound else "GB/s")
    axes.bar_label(axes.containers[-1], fmt="%.3g", padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)


def _roofline(axes: Axes, times: list[dict], ceilings: dict) -> None:
    copy, matmul = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    intensities = [r["tflops"] * 1e3 / r["gbs"] for r in times]
    reach = [min([*intensities, matmul / copy]) / 4, max([*intensities, matmul / copy]) * 4]
    axes.plot(
        [reach[0], matmul / copy, reach[1]], [reach[0] * copy / 1e12, matmul / 1e12, matmul / 1e12], color="black"
    )
    for r, intensity in zip(times, intensities, strict=True):
        axes.plot(
            intensity, r["tflops"], "o", color=OURS_COLOUR if r["provider"] == OURS else PEER_COLOUR, markersize=4
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("measured ceilings", fontsize=8)


def plot_op(op: str, records: list[dict], path: Path, source: str = "") -> bool:
    """Draws the op's timings among `records` into the PNG at `path`; False when there are none.

    `source`, kept as text in the file, says what it was drawn from.
    """
    times = [r for r in of_kind(records, "time") if r["op"] == op]
    ceilings = of_kind(records, "ceilings")
    if not times:
        return False
    device = next((r["device"] for r in of_kind(records, "environment")), "")
    compute_bound = not ceilings or _is_compute_bound(times[0], ceilings[0])
    panels = 2 if ceilings else 1
    size = (11, 1.6 + 0.26 * len(times))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, width_ratios=[3, 2][:panels])
    _bars(axes[0, 0], times, compute_bound)
    if ceilings:
        _roofline(axes[0, 1], times, ceilings[0])
    figure.suptitle(f"{op}, {times[0]['shape']}, {times[0]['dtype']}, {device}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None, "Source": source})
    plt.close(figure)
    return True


def _is_compute_bound(record: dict, ceilings: dict) -> bool:
    balance = ceilings["matmul_flops_per_s"] / ceilings["copy_bytes_per_s"]
    return record["tflops"] * 1e3 / record["gbs"] > balance
