"""Training checkpoints: written whole or not at all, and every byte checked before any is used.

    step-00000200/
        shard-*.safetensors   parameters and AdamW's moments: torch.distributed.checkpoint, safetensors storage
        state.json            step, position in the data, ...; name, dtype and shape of every tensor
        manifest.json         size and sha256 of each of the files above; sha256 of all that it says

A checkpoint is written under another name, fsynced, and renamed: a directory called step-N is complete unless its files
were damaged later, which the manifest shows. None of the three formats can hold code, and none of torch's own would
notice a flipped bit. Every rank writes its parts and hashes its files; rank 0 does the rest. Any number of ranks reads
what any other wrote. All of them must see the directory: on several nodes, a shared file system.
"""

import hashlib
import json
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import read_json, sync, write_json

from .failpoints import reach
from .parallel import Team

FORMAT = "xiangxin-fast training checkpoint 2"
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")
FILE_BYTES = 4 << 30  # of tensors, over all ranks: the writer holds one file's bytes in memory on top of its tensors
SPARE = 1.1  # free space wanted, in sizes of the checkpoint
ALONE = Team()

# A remark that there is one process, where there is. Not catch_warnings: checkpoints are written in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Damaged(InputError):
    """A checkpoint is not what was written; the message says what is wrong with which file."""


def save(directory: Path, tensors: dict[str, Tensor], state: dict, team: Team = ALONE) -> Path:
    """Writes directory/step-<state["step"]>, durably; returns its path. After a crash it is there whole or not at all.

    `tensors` go to safetensors, `state` (JSON values) to state.json; every rank of `team` calls this with its parts and
    the same state. Where one rank cannot write, all raise InputError or OSError and nothing is left: the disk is full
    or too full to begin, or a checkpoint of that step is there (who goes on from an older one sets it aside first).
    """
    final = directory / f"step-{state['step']:08d}"
    partial = final.with_name(f"{final.name}.partial")
    try:
        team.first(lambda: _begin(partial, sum(t.numel() * t.element_size() for t in tensors.values())))
        reach("begun", team.rank)
        _write(partial, tensors, team)
        entries = team.together(lambda: _synced_entries(partial, team))
        reach("shards_synced", team.rank)
        files = {name: entry for part in entries for name, entry in part.items()}
        team.first(lambda: _complete(partial, final, state | {"tensors": _description(tensors)}, files))
    except (InputError, OSError):
        if team.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    reach("renamed", team.rank)
    return final


def _begin(partial: Path, size: int) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    if (free := shutil.disk_usage(partial.parent).free) < SPARE * size:
        raise InputError(f"{partial.parent}: expected {SPARE * size / 1e9:.1f} GB free, got {free / 1e9:.1f}")
    partial.mkdir()


def _write(partial: Path, tensors: dict[str, Tensor], team: Team) -> None:
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        files[name] = 1 + size // FILE_BYTES
    writer = dcp.HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)
    # Its copies ahead, of tensors that are on the host already, would wait for the GPU every 10 MB: for training.
    writer.per_thread_copy_ahead = 0
    try:
        dcp.save(tensors, storage_writer=writer, process_group=team.group, no_dist=team.group is None)
    except CheckpointException as error:
        raise InputError(_reason(error)) from None


def _reason(error: CheckpointException) -> str:
    """The first failure of torch.distributed.checkpoint's, in a line."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {' '.join(str(failure).split())}"


def _synced_entries(partial: Path, team: Team) -> dict[str, dict]:
    """Name -> size and sha256 of this rank's files, now on the disk."""
    reach("shards_written", team.rank)
    entries = {}
    for path in sorted(partial.glob(f"shard-{team.rank + 1:05d}-*.safetensors")):
        sync(path)
        entries[path.name] = _entry(path)
    return entries


def _complete(partial: Path, final: Path, state: dict, files: dict[str, dict]) -> None:
    write_json(partial / STATE, state)
    files[STATE] = _entry(partial / STATE)
    reach("before_manifest", 0)
    manifest = {"format": FORMAT, "step": state["step"], "files": files}
    write_json(partial / MANIFEST, manifest | {"sha256": _sha256_of(manifest)})
    sync(partial)
    reach("before_rename", 0)
    partial.rename(final)
    reach("before_sync", 0)
    sync(final.parent)


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify(path: Path) -> dict:
    """The state of a checkpoint whose every byte is as written; Damaged says which file is not, and how."""
    try:
        return _verified_state(path)
    except (InputError, OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: {error}") from None


def _verified_state(path: Path) -> dict:
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{MANIFEST}: expected format {FORMAT!r}, got {manifest.get('format')!r}")
    if (path / MANIFEST).read_bytes() != (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode():
        raise InputError(f"{MANIFEST}: expected it as it was written, got other spacing")
    given = manifest.pop("sha256", None)
    if (digest := _sha256_of(manifest)) != given:
        raise InputError(f"{MANIFEST}: expected sha256 {given} as it says itself, got {digest}")
    if NAME.fullmatch(path.name) and step_of(path) != manifest["step"]:
        raise InputError(f"{MANIFEST}: expected step {step_of(path)}, got {manifest['step']}")
    expected, found = {MANIFEST, *manifest["files"]}, {entry.name for entry in path.iterdir()}
    for name in sorted(expected ^ found):
        raise InputError(f"{name}: missing" if name in expected else f"{name}: no file of this checkpoint")
    for name, entry in manifest["files"].items():
        if (size := (path / name).stat().st_size) != entry["bytes"]:
            raise InputError(f"{name}: expected {entry['bytes']} bytes, got {size}")
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        digests = pool.map(_sha256, [path / name for name in manifest["files"]])
        for (name, entry), digest in zip(manifest["files"].items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise InputError(f"{name}: expected sha256 {entry['sha256']}, got {digest}")
    return read_json(path / STATE)


def load(path: Path, state: dict, tensors: dict[str, Tensor], team: Team = ALONE) -> None:
    """Reads a verified checkpoint into `tensors`, in place. InputError naming the first tensor that does not fit."""
    written, expected = state["tensors"], _description(tensors)
    for name in sorted(written.keys() | expected.keys()):
        if written.get(name) != expected.get(name):
            raise InputError(f"{path}: expected {name} {expected.get(name)}, got {written.get(name)}")
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=team.group, no_dist=team.group is None)
    except CheckpointException as error:
        raise InputError(f"{path}: {_reason(error)}") from None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(path.name)[1])


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory by name, newest first, valid or not."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def newest_valid(directory: Path, before: int | None = None) -> tuple[Path | None, dict, list[Damaged]]:
    """The newest valid checkpoint (or None), its state, and for each newer one the reason why it is rejected.

    One with infinities or NaN in its tensors is none to go on from. `before`: only of earlier steps than this.
    """
    rejected = []
    for path in checkpoints(directory):
        if before is not None and step_of(path) >= before:
            continue
        try:
            state = verify(path)
            if not state.get("finite", True):
                raise Damaged(f"{path}: expected finite tensors, got others when it was written")
            return path, state, rejected
        except Damaged as reason:
            rejected.append(reason)
    return None, {}, rejected


def set_aside(path: Path) -> Path:
    """Renames a checkpoint that the run no longer follows: it neither counts nor comes back. `prune` keeps one."""
    aside = path.with_name(f"{path.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, the newest finite one and the newest that was set aside.

    Also what an interrupted save left.
    """
    present = checkpoints(directory)
    finite = next((path for path in present if _is_finite(path)), None)
    old = [path for path in present[keep:] if path != finite]
    aside = sorted(directory.glob("step-*.aside"))
    for path in (*old, *aside[:-1], *directory.glob("step-*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def _is_finite(path: Path) -> bool:
    try:
        return read_json(path / STATE)["finite"] is True
    except (InputError, KeyError):
        return False


def _description(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def _sha256_of(value: dict) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
