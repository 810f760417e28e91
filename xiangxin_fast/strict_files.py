"""Files that may come from anyone, read strictly, and files that must survive a crash, written durably.

Every fault is an InputError of one line naming the file. No torch here: the tokenizer and train/prepare.py do without.
"""

import json
import os
from pathlib import Path

from .errors import InputError

MIB = 1 << 20


def parse_json(data: bytes, where: str) -> dict:
    """The JSON object in `data`. InputError on anything else, on a key given twice, and on NaN and Infinity."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.100} twice")
        return dict(pairs)

    def refuse(constant: str):
        raise ValueError(f"the constant {constant}")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise InputError(f"{where}: expected strict JSON, got nesting without end") from None
    except ValueError as error:
        raise InputError(f"{where}: expected strict JSON, got {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    if len(data) > limit:
        raise InputError(f"{path}: expected at most {limit} bytes, got more")
    return data


def read_json(path: Path, limit: int = MIB) -> dict:
    """The JSON object in a file of at most `limit` bytes."""
    return parse_json(read_bytes(path, limit), str(path))


def write_json(path: Path, value: dict) -> None:
    """Writes `value` so that after a crash `path` holds either what it held before or all of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Returns once a file's content, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_of(directory: Path, name: str) -> Path:
    """The regular file `name` of a model directory; links may lead nowhere but into the Hugging Face cache's blobs/."""
    path = directory / name
    if not path.is_file():
        raise InputError(f"{directory}: expected a file {name}, got none")
    root, target = directory.resolve(), path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if target.parent not in homes:
        raise InputError(f"{path}: expected a file of this directory, got a link to {target}")
    return path
