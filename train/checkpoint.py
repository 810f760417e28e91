"""Training checkpoints: written whole or not at all, and every byte checked before any is used.

    step-00000200/
        shard-*.safetensors   parameters and AdamW's moments: torch.distributed.checkpoint, safetensors storage
        state.json            step, position in the data, ...; name, dtype and shape of every tensor
        manifest.json         size and sha256 of each of the files above

A checkpoint is written under another name, fsynced, and renamed: a directory called step-N is complete unless its files
were damaged later, which the manifest shows. None of the three formats can hold code, and none of torch's own would
notice a flipped bit.
"""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import read_json, sync, write_json

FORMAT = "xiangxin-fast training checkpoint 1"
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")


class Damaged(InputError):
    """A checkpoint is not what was written; the message says what is wrong with which file."""


def save(directory: Path, tensors: dict[str, Tensor], state: dict) -> Path:
    """Writes directory/step-<state["step"]>, durably; returns its path. After a crash it is there whole or not at all.

    `tensors` go to safetensors, `state` (JSON values) to state.json. OSError where the disk is full, or one of that
    step is there: who goes on from an older one sets the newer aside first.
    """
    final = directory / f"step-{state['step']:08d}"
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _single_process():
        dcp.save(
            tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True), no_dist=True
        )
    write_json(partial / STATE, state | {"tensors": _description(tensors)})
    files = {}
    for path in sorted(partial.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(partial / MANIFEST, {"format": FORMAT, "files": files})
    sync(partial)
    partial.rename(final)
    sync(directory)
    return final


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
    if (path / MANIFEST).read_text(encoding="utf-8") != json.dumps(manifest, indent=2, ensure_ascii=False) + "\n":
        raise InputError(f"{MANIFEST}: expected it as it was written, got other spacing")
    expected, found = {MANIFEST, *manifest["files"]}, {entry.name for entry in path.iterdir()}
    for name in sorted(expected ^ found):
        raise InputError(f"{name}: missing" if name in expected else f"{name}: no file of this checkpoint")
    for name, entry in manifest["files"].items():
        if (size := (path / name).stat().st_size) != entry["bytes"]:
            raise InputError(f"{name}: expected {entry['bytes']} bytes, got {size}")
        if (digest := _sha256(path / name)) != entry["sha256"]:
            raise InputError(f"{name}: expected sha256 {entry['sha256']}, got {digest}")
    state = read_json(path / STATE)
    if NAME.fullmatch(path.name) and step_of(path) != state["step"]:
        raise InputError(f"{STATE}: expected step {step_of(path)}, got {state['step']}")
    return state


def load(path: Path, state: dict, tensors: dict[str, Tensor]) -> None:
    """Reads a verified checkpoint into `tensors`, in place. InputError naming the first tensor that does not fit."""
    written, expected = state["tensors"], _description(tensors)
    for name in sorted(written.keys() | expected.keys()):
        if written.get(name) != expected.get(name):
            raise InputError(f"{path}: expected {name} {expected.get(name)}, got {written.get(name)}")
    with _single_process():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(path.name)[1])


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory by name, newest first, valid or not."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def newest_valid(directory: Path) -> tuple[Path | None, dict, list[Damaged]]:
    """The newest valid checkpoint (or None), its state, and for each newer one the reason why it is rejected."""
    rejected = []
    for path in checkpoints(directory):
        try:
            return path, verify(path), rejected
        except Damaged as reason:
            rejected.append(reason)
    return None, {}, rejected


def set_aside(path: Path) -> Path:
    """Renames a checkpoint that the run no longer follows: it neither counts nor comes back, and nothing is lost."""
    aside = path.with_name(f"{path.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and what an interrupted save left."""
    for path in (*checkpoints(directory)[keep:], *directory.glob("step-*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def _description(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _single_process() -> warnings.catch_warnings:
    """Silences torch.distributed.checkpoint's remark that there is one process: there is."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
