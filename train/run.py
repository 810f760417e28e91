"""Entry point of training: `python train/run.py --help`, or under `torchrun --nproc_per_node=8 train/run.py`."""

import os
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from train.config import parse
from xiangxin_fast.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    """Trains as the command line says; exit code 0 also when interrupted and saved, 2 where something does not fit."""
    if "--plan" in sys.argv:
        from train import plan

        plan.main([argument for argument in sys.argv[1:] if argument != "--plan"])
        return
    config = parse(sys.argv[1:])
    from train.loop import train  # imports torch, which --help and a mistyped option need not wait for

    try:
        outcome = train(config)
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step: nothing to save")
    if outcome.rank > 0:
        return
    if outcome.finished:
        print(f"Finished at step {outcome.step}: the model is {outcome.model}")
    else:
        command = (
            "the same torchrun command" if "TORCHELASTIC_RUN_ID" in os.environ else shlex.join(["python", *sys.argv])
        )
        print(f"Saved at step {outcome.step}. To go on: {command}")


if __name__ == "__main__":
    main()
