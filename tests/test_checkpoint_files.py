"""Every damage to every file of a checkpoint is noticed and named, and the checkpoint before it is used."""

import dataclasses
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

from tests import rank_jobs, ranks
from tests.training import config_of, make_place
from train import checkpoint, saver
from train.config import TrainConfig
from train.loop import train
from train.parallel import ALONE
from xiangxin_fast import strict_files
from xiangxin_fast.errors import InputError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def two_ranks(place, tmp_path_factory) -> TrainConfig:
    """A finished run of two ranks with checkpoints of steps 5 and 10; tests change only copies."""
    config = config_of(place, tmp_path_factory.mktemp("two") / "run", micro_batch=1, steps=10)
    ranks.run(2, rank_jobs.trained, config)
    return config


def with_hole(content: bytes, start: int) -> bytes:
    """512 bytes of zeros from `start` on: a block of a disk that was never written."""
    end = min(len(content), start + 512)
    return content[:start] + bytes(end - start) + content[end:]


def damages(content: bytes, older: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of a damaged file (None: absent), for each way it can be damaged."""
    draw = random.Random(len(content))
    yield "absent", None
    yield "empty", b""
    for point in sorted({point * len(content) // 16 for point in range(1, 16)} | {len(content) - 1}):
        yield f"cut at {point}", content[:point]
    yield "grown", content + b"\0"
    starts = (draw.randrange(max(1, len(content) - 512)) for _ in range(1000))
    yield "a hole", next(holed for start in starts if (holed := with_hole(content, start)) != content)
    for _ in range(64):
        bit = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)
    yield "an older one", older


@pytest.mark.parametrize("name", ["shard 1", "shard 2", checkpoint.STATE, checkpoint.MANIFEST])
def test_every_damage_of_every_file_is_named_and_the_one_before_is_used(two_ranks, tmp_path, name):
    """Findings of the field: DCP, torch.save and safetensors load one flipped bit, or 512 zeros, without a word."""
    folder = shutil.copytree(two_ranks.out / "checkpoints", tmp_path / "checkpoints")
    newest, before = checkpoint.checkpoints(folder)[:2]
    shards = sorted(path.name for path in newest.glob("*.safetensors"))
    file = newest / (shards[int(name[-1]) - 1] if name.startswith("shard") else name)
    content, older = file.read_bytes(), (before / file.name).read_bytes()
    count = 0
    for damage, damaged in damages(content, older):
        assert damaged != content, damage
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        path, state, rejected = checkpoint.newest_valid(folder)
        assert (path, state["step"]) == (before, 5), damage
        assert str(newest) in str(rejected[0]), damage
        assert f"{file.name}: " in str(rejected[0]), damage
        assert "\n" not in str(rejected[0])
        count += 1
    assert count >= 84
    file.write_bytes(content)
    assert checkpoint.newest_valid(folder)[0] == newest


def test_run_goes_on_from_the_one_before_and_says_why(two_ranks, tmp_path):
    """Rank 0 decides for all (incident: xtuner#1852, ranks that picked different checkpoints)."""
    out = shutil.copytree(two_ranks.out, tmp_path / "run")
    (out / "checkpoints" / "step-00000010" / checkpoint.STATE).write_bytes(b"{}")
    config = dataclasses.replace(two_ranks, out=out)
    ranks.run(2, rank_jobs.trained, config)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (rejected,) = (event for event in events if event["event"] == "rejected")
    assert "step-00000010: state.json: expected" in rejected["reason"]
    starts = [event for event in events if event["event"] == "start"]
    assert starts[1]["checkpoint"].endswith("step-00000005")


def test_no_file_of_a_checkpoint_can_hold_code(two_ranks):
    """DCP's own .metadata is a pickle, and is run as one when it is read."""
    for path in checkpoint.checkpoints(two_ranks.out / "checkpoints"):
        assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_snapshot_is_what_the_tensors_were_when_the_save_began(place, tmp_path):
    """Incidents: Lightning#21079, prime-rl#3109, Megatron-LM#2288 (tensors of a later step), NVRx#376 (moments of one),
    NeMo-RL#3312 (tensors of later saves in the first), Megatron-Bridge#3267 (a later step number). Hashes of all
    tensors at that moment are those on the disk, though training went on for a dozen steps before the first byte."""
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=40, save_every=20, validate_every=40)
    log = tmp_path / "hashes"
    ranks.run(2, rank_jobs.with_late_writes, config, log)
    begun = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((step, rank) for step, rank, _ in begun) == [(20, 0), (20, 1), (40, 0), (40, 1)]
    for step, rank, digests in begun:
        path = config.out / "checkpoints" / f"step-{step:08d}"
        assert checkpoint.verify(path)["step"] == step
        (file,) = path.glob(f"shard-{rank + 1:05d}-*.safetensors")
        written = {name: rank_jobs.digest(tensor) for name, tensor in load_file(file).items()}
        assert written == {name: digests[name] for name in written}
        assert len(written) == len(digests)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: may_write.wait(30) and save(*arguments))
    writer = saver.Saver(tmp_path, 2, ALONE)
    tensors = {"model.w": torch.ones(3)}
    writer.begin(tensors, {"step": 1, "finite": True})
    tensors["model.w"].zero_()
    assert writer.outcome() is None
    assert checkpoint.checkpoints(tmp_path) == []
    may_write.set()
    assert writer.outcome(wait=True) == (1, None)
    (file,) = (tmp_path / "step-00000001").glob("*.safetensors")
    assert load_file(file)["model.w"].tolist() == [1, 1, 1]


def test_everything_is_on_the_disk_before_a_name_says_that_it_is(tmp_path, monkeypatch):
    """Incident: NVRx#359, fsync of a file whose last bytes had not left the process. Files are synced at their full
    size, a directory after the last change in it, and only then comes the next name."""
    done, sizes, sync = [], [], checkpoint.sync
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(path):
        sizes.clear()
        sync(path)
        assert sizes == [path.stat().st_size]
        done.append(f"sync {path.name}")

    def noting(action):
        def renamed(old, new):
            action(old, new)
            done.append(f"{Path(old).name} -> {Path(new).name}")

        return renamed

    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), sizes.append(os.fstat(handle).st_size)))
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    for module in (checkpoint, strict_files):
        monkeypatch.setattr(module, "sync", synced)
    checkpoint.save(tmp_path / "run", {"model.w": torch.ones(3)}, {"step": 1})
    assert done == [
        "sync shard-00001-model-00001-of-00001.safetensors",
        "sync state.json.partial",
        "state.json.partial -> state.json",
        "sync manifest.json.partial",
        "manifest.json.partial -> manifest.json",
        "sync step-00000001.partial",
        "step-00000001.partial -> step-00000001",
        "sync run",
    ]


def test_writing_a_checkpoint_never_waits_for_the_gpu(tmp_path, monkeypatch):
    """Beside one, torch's writer would copy ahead and synchronize the stream that training is on, every 10 MB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *_, **__: pytest.fail("it waits for the GPU"))
    path = checkpoint.save(tmp_path, {"model.w": torch.ones(3)}, {"step": 1})
    assert checkpoint.verify(path)["step"] == 1


def test_of_what_was_set_aside_the_newest_stays(tmp_path):
    """Each holds 33 GB of a real run."""
    for step in range(1, 6):
        save_empty(tmp_path, step, finite=True)
    for step in (3, 4, 5):
        checkpoint.set_aside(tmp_path / f"step-{step:08d}")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002", "step-00000005.aside"]


def save_empty(folder: Path, step: int, finite: bool) -> None:
    checkpoint.save(folder, {"model.w": torch.ones(3)}, {"step": step, "finite": finite})


def names(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


def test_the_last_finite_checkpoint_is_never_deleted_and_the_one_to_go_on_from(tmp_path):
    """Incident: pocket-tts#262, where keeping the last three deleted every healthy checkpoint after a NaN."""
    for step in range(1, 8):
        save_empty(tmp_path, step, finite=step <= 2)
        checkpoint.prune(tmp_path, keep=3)
    assert names(tmp_path) == [7, 6, 5, 2]
    path, _, rejected = checkpoint.newest_valid(tmp_path)
    assert checkpoint.step_of(path) == 2
    assert all("expected finite tensors" in str(reason) for reason in rejected)
    assert len(rejected) == 3


def test_many_tensors_go_to_several_files_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    tensors = {f"model.{n}": torch.full((100,), float(n)) for n in range(7)}
    path = checkpoint.save(tmp_path, tensors, {"step": 1})
    assert len(list(path.glob("*.safetensors"))) == 3
    back = {name: torch.zeros(100) for name in tensors}
    checkpoint.load(path, checkpoint.verify(path), back)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_file_that_vanishes_while_it_is_read_is_one_line(tmp_path):
    path = checkpoint.save(tmp_path, {"model.w": torch.ones(3)}, {"step": 1})
    state = checkpoint.verify(path)
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="step-00000001: rank 0: ") as error:
        checkpoint.load(path, state, {"model.w": torch.ones(3)})
    assert "\n" not in str(error.value)


def test_retention_keeps_what_it_says(place, tmp_path):
    config = config_of(place, tmp_path / "run", save_every=2, keep=2)
    assert train(config).finished
    assert names(config.out / "checkpoints") == [20, 18]
