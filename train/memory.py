"""The memory one rank needs for a training step, traced on tensors that have shapes and no storage.

The model is sharded over a process group of which only this rank exists, and makes the gradients of a batch as a run
does; torch's FSDPMemTracker follows every storage. Under TRITON_INTERPRET=1 tensors on a CPU take the kernels' way,
whose fake implementations allocate and keep what the kernels do. AdamW's moments are added by arithmetic. The layers
being alike, each part is affine in their number (a test holds that to the byte), so that two short models are traced;
with --reshard it is not, and all are.

Not seen: what CUDA, NCCL and cuBLAS take for themselves, and fragmentation. `python train/plan.py` starts this file.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import init_device_mesh
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from train import parallel
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi

PARAMETERS = "parameters, fp32, this rank's shard"
MOMENTS = "AdamW's moments, fp32, this rank's shard"
SHARDED_GRADIENTS = "gradients, fp32, this rank's shard"
GATHERED = "parameters gathered in bf16"
ACCUMULATED = "gradients of earlier micro-batches, fp32, whole"
SAVED = "saved for the backward"
WORKING = "working memory of the backward"
TRACED_LAYERS = (2, 3)


class _Training(Phi):
    """Phi whose forward is the loss: the tracker watches forwards alone."""

    def forward(self, tokens, targets, segment_ids):
        return Phi.loss(self, tokens, targets, segment_ids, reduction="sum")


def trace(config: PhiConfig, T: int, micro_batch: int, accumulate: bool, reshard: bool = False) -> dict[str, int]:
    """Bytes by part at the peak of a batch of one micro-batch of [micro_batch, T], or of two. In a `fake_group`."""
    return snapshots(config, T, micro_batch, accumulate, reshard)["peak"]


def snapshots(
    config: PhiConfig, T: int, micro_batch: int, accumulate: bool, reshard: bool = False
) -> dict[str, dict[str, int]]:
    """Bytes by part at the "peak", as `trace` gives them, and at the end of the last "forward"."""
    size, accumulated = torch.distributed.get_world_size(), 0
    ranks = parallel.Ranks(size=size, mesh=init_device_mesh("cpu", (size,)))
    with FakeTensorMode():
        model = parallel.shard(_Training(config, "cpu", torch.float32), ranks, torch.bfloat16, reshard=reshard)
        moments = 2 * sum(parallel.local(p).nbytes for p in model.parameters())
        batch = [torch.zeros(micro_batch, T, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)]
        tracker = FSDPMemTracker(model)
        tracker.track_inputs(tuple(batch))
        with tracker:
            for last in (False, True) if accumulate else (True,):
                tracker.reset_mod_stats()
                parallel.sum_gradients_now(model, last)
                loss = model(*batch)
                forward = tracker.get_tracker_snapshot("current")
                loss.backward()
                if not last:
                    accumulated = _of(tracker.get_tracker_snapshot("current"))["Temp"]
        peak = tracker.get_tracker_snapshot("peak")

    def parts(snapshot: dict) -> dict[str, int]:
        found = _of(snapshot)
        named = {
            PARAMETERS: found["Sharded Param"],
            MOMENTS: moments,
            SHARDED_GRADIENTS: found["Sharded Grad"],
            GATHERED: found["Unsharded Param"],
            ACCUMULATED: accumulated,
            SAVED: found["Activation"],
        }
        return named | {WORKING: found["Total"] + moments - sum(named.values())}

    return {"forward": parts(forward), "peak": parts(peak)}


def _of(snapshot: dict) -> dict[str, int]:
    (parts,) = snapshot.values()
    return {getattr(kind, "value", kind): size for kind, size in parts.items()}


@functools.cache
def predict(config: PhiConfig, T: int, micro_batch: int, accumulate: bool, reshard: bool = False) -> dict[str, int]:
    """`trace` of all the layers: from those of two short models, unless blocks are resharded.

    The peak of those comes at one place of the backward with few layers and at another with many.
    """
    few, more = TRACED_LAYERS
    if reshard or config.layers <= more:
        return trace(config, T, micro_batch, accumulate, reshard)
    small, large = (trace(replace(config, layers=n), T, micro_batch, accumulate, reshard) for n in TRACED_LAYERS)
    return {part: small[part] + (config.layers - few) // (more - few) * (large[part] - small[part]) for part in small}


def largest_micro_batch(
    config: PhiConfig, T: int, most: int, accumulate: bool, room: int, reshard: bool = False
) -> int:
    """The most sequences, up to `most`, whose step is predicted to fit `room` bytes; 0 where not even one does."""
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if sum(predict(config, T, middle, accumulate, reshard).values()) <= room:
            fits = middle
        else:
            too_many = middle
    return fits


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of `ranks`, of which this process is the first and the others do not exist."""
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Reads {"model", "ranks", "T", "micro_batch", "most", "accumulate", "room", "reshard"}; prints JSON."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("train/memory.py: expected TRITON_INTERPRET=1, which puts tensors without a GPU on the kernels' way")
    asked = json.load(sys.stdin)
    arguments = PhiConfig(**asked["model"]), asked["T"]
    with fake_group(asked["ranks"]):
        parts = predict(*arguments, asked["micro_batch"], asked["accumulate"], asked["reshard"])
        largest = largest_micro_batch(*arguments, asked["most"], asked["accumulate"], asked["room"], asked["reshard"])
    print(json.dumps({"parts": parts, "largest_micro_batch": largest}))


if __name__ == "__main__":
    main()
