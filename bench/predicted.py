"""The README's predictions, from train/plan.py and bench/results/ alone: `python -m bench.predicted` writes them."""

from pathlib import Path

from train import plan
from xiangxin_fast.errors import exits_cleanly

from .report import README, RESULTS, fill
from .tables import Table

BLOCK = "predicted"
COMMAND = "python -m bench.predicted"


def predicted_block(results: Path = RESULTS) -> str:
    """A pretraining run on eight GPUs of every kind that the planner knows, at both ends of what it predicts."""
    asked = plan.Plan()
    rows = []
    for name in plan.GPUS:
        whole = sum(plan.step(plan.Plan(gpu=name), results).values(), plan.NOTHING)
        for end in ("expected", "best"):
            speed = plan.speed(plan.Plan(gpu=name), getattr(whole, end))
            rate, causal, full = f"{speed.tokens_per_second:,.0f}", f"{speed.mfu_causal:.0%}", f"{speed.mfu_full:.0%}"
            rows.append((f"8 x {name}", end.replace("best", "at best"), rate, causal, full, f"{speed.days:.1f}"))
    title = f"{asked.preset}, {asked.tokens / 1e9:.0f}e9 tokens in steps of {asked.batch} x {asked.context}, predicted"
    header = ("GPUs", "", "tokens/s per GPU", "MFU, causal half", "MFU, full attention", "days")
    model = (
        "Predicted by the model at the head of [train/plan.py](train/plan.py): the datasheets' rates and the kernels'\n"
        f"machine code as [static.json](bench/results/static.json) has it.\n{plan.LEFT_OUT}"
    )
    return f"{Table(title, header, rows).markdown()}\n\n{model}"


def updated(readme: str, results: Path = RESULTS) -> str:
    """The README with the block as the results have it."""
    return fill(readme, BLOCK, predicted_block(results))


@exits_cleanly
def main() -> None:
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
