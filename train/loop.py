"""The training loop: samples -> loss -> gradients -> AdamW, with validation, checkpoints and exact resume.

A run is a pure function of its configuration and its data: there is no dropout and no random number after the initial
weights, so the state is the parameters, AdamW's moments and the counters of Position. With the same versions and number
of threads a resumed run gives the same bits as one that was never interrupted, unless --minutes drives the schedule.
"""

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from xiangxin_fast.checkpoint import load_pretrained, save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi
from xiangxin_fast.strict_files import write_json
from xiangxin_fast.tokenizer import Tokenizer

from . import checkpoint, parallel
from .config import TrainConfig
from .data import IGNORED, Batch, TokenDataset
from .metrics import Display, JsonLines, RunInfo, RunLog, TensorBoard, environment, read_metrics, terminal
from .optim import adamw, learning_rate, named_tensors, set_step


@dataclass
class Position:
    """How far a run is; beside the tensors, all that a checkpoint keeps."""

    step: int = 0  # optimizer steps made
    sample: int = 0  # global index of the next sample
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # spent in the loop, over all starts of the run

    def progress(self, config: TrainConfig, step: int = 0) -> float:
        """The part of the run, 0..1, that lies behind `step` steps after this position."""
        elapsed = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max((self.step + step) / config.steps, elapsed))


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    finished: bool  # False: interrupted and saved; the same call goes on
    model: Path  # the Hugging Face directory, there once the run is finished


def train(config: TrainConfig) -> Outcome:
    """Runs, or goes on with, the run that `config` describes, until its end or a SIGINT or SIGTERM.

    Raises InputError where data, weights, checkpoint and configuration do not fit together, or a loss is not finite.
    """
    device, console = parallel.join(), terminal()
    data = TokenDataset(config.data, "train", config.context, config.seed)
    held_out = TokenDataset(config.data, "validation", config.context, config.seed)
    tokenizer = Tokenizer.load(config.data)
    model = build_model(config, tokenizer, device)
    optimizer = adamw(model, config)
    tensors = named_tensors(model, optimizer)
    folder = config.out / "checkpoints"
    position = _resume(config, folder, tensors, console)
    set_step(optimizer, position.step)

    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "config.json", {"training": config.to_json(), "model": asdict(model.config)})
    write_json(config.out / "environment.json", environment())
    kept = [record for record in read_metrics(config.out) if record["step"] <= position.step]
    validated = {record["step"] for record in kept if "val_loss" in record}
    info = RunInfo(config.out, position.step, config, model.config, 1, str(device), console)
    log = RunLog(info, (JsonLines, TensorBoard, Display))
    saved = position.step
    begun = time.monotonic() - position.seconds

    def save() -> None:
        nonlocal saved
        if saved != position.step:
            checkpoint.save(folder, tensors, asdict(position) | _order(config) | {"config": config.to_json()})
            checkpoint.prune(folder, config.keep)
            saved = position.step

    batches = data.batches(position.sample, config.batch, config.steps * config.batch)
    with _stop_signals() as stop, closing(batches), closing(log):
        while True:
            position.seconds = time.monotonic() - begun
            progress = position.progress(config)
            if position.step % config.save_every == 0 or progress == 1 or stop.is_set():
                save()  # before the validation, which may fail
            if stop.is_set():
                return Outcome(position.step, False, config.out / "model")
            if (position.step % config.validate_every == 0 or progress == 1) and position.step not in validated:
                record = {"step": position.step, "val_loss": evaluate(model, held_out, config)}
                log.write(record | {"tokens": position.tokens, "progress": progress})
            if progress == 1:
                break
            lr = learning_rate(position.progress(config, step=1), config)
            record = {"step": position.step + 1} | _update(model, optimizer, next(batches), lr, config)
            position.step += 1
            position.sample += config.batch
            position.tokens += config.batch * config.context
            position.seconds = time.monotonic() - begun
            progress = position.progress(config)
            record |= {
                "tokens": position.tokens,
                "epoch": position.sample / len(data),
                "seconds": position.seconds,
                "eta_seconds": position.seconds * (1 / progress - 1),
                "progress": progress,
            }
            log.write(record)
        save_pretrained(model, config.out / "model", tokenizer)
    return Outcome(position.step, True, config.out / "model")


def build_model(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Phi:
    """The model to start from, in fp32: that of --init-from, or the preset's shape with fresh weights.

    InputError where it has too few tokens or positions, or was made with another tokenizer.
    """
    if config.init_from is None:
        shape = PhiConfig.from_preset(config.preset)
        shape = replace(shape, bos_id=tokenizer.eos_id, eos_id=tokenizer.eos_id)
        model, source = Phi(shape, device, torch.float32).init_weights(config.seed), f"preset {config.preset}"
    else:
        model, source = load_pretrained(config.init_from, device, torch.float32), str(config.init_from)
        if (config.init_from / "tokenizer.json").exists():
            if (found := Tokenizer.load(config.init_from).sha256) != tokenizer.sha256:
                raise InputError(f"{source}: expected the tokenizer of {config.data}, {tokenizer.sha256}, got {found}")
    if len(tokenizer) > model.config.vocab:
        raise InputError(
            f"{config.data}: expected at most {model.config.vocab} tokens ({source}), got {len(tokenizer)}"
        )
    if config.context > model.config.context:
        raise InputError(f"{source}: expected --context of at most {model.config.context}, got {config.context}")
    return model


def accumulate_gradients(model: Phi, batch: Batch, config: TrainConfig) -> Tensor:
    """Adds to the gradients those of the batch's loss, micro-batch by micro-batch; returns the loss, in nats per token.

    The loss is the mean over all valid targets of the batch, however they are spread over micro-batches.
    """
    valid = max(1, int((batch[1] != IGNORED).sum()))
    total = torch.zeros((), device=model.embed.device)
    for first in range(0, len(batch[0]), config.micro_batch):
        part = tuple(array[first : first + config.micro_batch] for array in batch)
        loss = _summed_loss(model, part, config.segment_ids) / valid
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model: Phi, held_out: TokenDataset, config: TrainConfig) -> float:
    """The loss, in nats per token, over the same --validation-samples samples (or all there are) every time."""
    total, valid, samples = 0.0, 0, min(config.validation_samples, len(held_out))
    for first in range(0, samples, config.micro_batch):
        batch = held_out.batch(first, min(config.micro_batch, samples - first))
        total += _summed_loss(model, batch, config.segment_ids).item()
        valid += int((batch[1] != IGNORED).sum())
    return total / max(1, valid)


def _summed_loss(model: Phi, batch: Batch, mask_documents: bool) -> Tensor:
    tokens, targets, segment_ids = (torch.from_numpy(array).to(model.embed.device) for array in batch)
    if not mask_documents or (batch[2] == batch[2][:, :1]).all():  # one document per row: plain causal attention
        segment_ids = None
    return model.loss(tokens, targets, segment_ids, reduction="sum")


def _update(model: Phi, optimizer: torch.optim.AdamW, batch: Batch, lr: float, config: TrainConfig) -> dict:
    """One optimizer step; returns its record. InputError, before any weight changes, where a gradient is not finite."""
    begun = time.perf_counter()
    loss = accumulate_gradients(model, batch, config).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if not math.isfinite(loss + norm):
        raise InputError(
            f"training: expected a finite loss and gradient, got loss {loss}, gradient norm {norm}: "
            "the newest checkpoint is from before; go on with a lower --lr"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    rate = batch[0].size / (time.perf_counter() - begun)
    return {"loss": loss, "grad_norm": norm, "lr": lr, "tokens_per_second": rate}


def _order(config: TrainConfig) -> dict:
    """What decides which tokens a sample index stands for: a resumed run must agree on it."""
    manifest = hashlib.sha256((config.data / "manifest.json").read_bytes()).hexdigest()
    return {"data": manifest, "seed": config.seed, "context": config.context}


def _resume(config: TrainConfig, folder: Path, tensors: dict[str, Tensor], console: Console) -> Position:
    """Reads the checkpoint that --resume asks for into `tensors`; the position it stands at, or the start."""
    present = checkpoint.checkpoints(folder)
    if config.resume == "never":
        if present:
            raise InputError(f"{folder}: expected none with --resume never, got {present[0].name}: take another --out")
        return Position()
    if config.resume == "auto":
        path, state, rejected = checkpoint.newest_valid(folder)
        for reason in rejected:
            console.print(f"not used: {reason}", markup=False)
        if path is None and rejected:
            raise InputError(f"{folder}: expected a valid checkpoint, got {len(rejected)} damaged: take another --out")
        if path is None:
            return Position()
    else:
        path = Path(config.resume)
        state = checkpoint.verify(path)
    for name, value in _order(config).items():
        if state[name] != value:
            raise InputError(f"{path}: expected {name} {state[name]} as it was begun with, got {value}")
    checkpoint.load(path, state, tensors)
    for newer in present:
        if checkpoint.step_of(newer) > state["step"]:
            console.print(f"{newer}: renamed to {checkpoint.set_aside(newer).name}", markup=False)
    console.print(f"Going on from {path}", markup=False)
    for name, value in config.to_json().items():
        if name not in ("resume", "data", "out") and (before := state["config"][name]) != value:
            console.print(f"with another {name}: {before} -> {value}", markup=False)
    return Position(**{field.name: state[field.name] for field in fields(Position)})


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event; a second one ends the process at once."""
    stop = threading.Event()

    def handle(number, _frame):
        if stop.is_set():
            os._exit(128 + number)
        stop.set()
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")  # print is not safe in a handler

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
