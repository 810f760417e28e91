"""The training loop: samples -> loss -> gradients -> AdamW, with validation, checkpoints and exact resume.

A run is a pure function of its configuration and its data: there is no dropout and no random number after the initial
weights, so the state is the parameters, AdamW's moments and the counters of Position. With the same versions, ranks and
number of threads a resumed run gives the same bits as one that was never interrupted, unless --minutes drives the
schedule. On any number of ranks it takes the same samples.

Within a step the host does not wait for the device. What it needs to know of a step (loss, norm, whether some rank is
asked to stop, rank 0's clock) it reads after it has launched the next, and all ranks decide by the same numbers.
"""

import gc
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from xiangxin_fast.checkpoint import load_pretrained, save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi
from xiangxin_fast.strict_files import write_json
from xiangxin_fast.tokenizer import Tokenizer

from . import parallel
from .config import TrainConfig
from .dashboard import Dashboard
from .data import IGNORED, Batch, Samples
from .guards import MOST_UNSAVED, PATIENCE, NotSaved
from .metrics import JsonLines, RunInfo, RunLog, TensorBoard, environment, read_metrics, terminal
from .mixture import HeldOut, Mixture
from .optim import Optimizer, learning_rate
from .parallel import ALONE, Ranks
from .resume import resume, rewind
from .saver import Saver
from .signals import stop_signals
from .stopwatch import Stopwatch
from .watchdog import RankLost, Watchdog

UNSETTLED = 1  # steps launched whose numbers the host has not read
MAX_REWINDS = 3  # to one checkpoint: more of the samples after it cannot be the reason


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    finished: bool  # False: interrupted and saved; the same call goes on
    model: Path  # the Hugging Face directory, there once the run is finished
    rank: int = 0  # of this process: the first speaks for all


def train(config: TrainConfig) -> Outcome:
    """Runs, or goes on with, the run that `config` describes, until its end or a SIGINT or SIGTERM.

    Under torchrun each rank calls it. Raises InputError where data, weights, checkpoint and configuration do not fit
    together, losses are not finite, or a checkpoint that must be written cannot; RankLost where another rank is gone.
    """
    ranks = parallel.join(config.timeout, config.replicas)
    watchdog = Watchdog(ranks, config.timeout)
    watchdog.start()
    with stop_signals() as stop:  # to the end: when a rank has died, torchrun signals those who are to say which
        try:
            outcome = _Run(config, ranks, watchdog, stop).go()
        except torch.OutOfMemoryError as error:
            shortage = _out_of_memory(error, config, ranks)
            shortage.to_tell = parallel.first_to_say(RankLost.__name__, ranks.store)  # the others would tell it, too
            watchdog.leave(f"{type(shortage).__name__}: {shortage}")
            raise shortage from None
        except BaseException as error:
            lost = watchdog.explain() if isinstance(error, RuntimeError) else None
            watchdog.leave(str(lost) if lost else f"{type(error).__name__}: {' '.join(str(error).split())}")
            if isinstance(lost or error, RankLost):
                (lost or error).to_tell = parallel.first_to_say(RankLost.__name__, ranks.store)
            elif isinstance(error, InputError):
                error.to_tell = parallel.first_to_say(str(error), ranks.store)
            if lost:
                raise lost from error
            raise
        watchdog.leave()
        parallel.leave(ranks)
    return outcome


def _out_of_memory(error: torch.OutOfMemoryError, config: TrainConfig, ranks: Ranks) -> InputError:
    sentences = " ".join(str(error).split()).split(". ")
    return InputError(
        f"training: expected room for --micro-batch {config.micro_batch} on rank {ranks.rank}, got: "
        f"{'. '.join(sentences[:2])}: lower --micro-batch{'' if config.reshard else ' or give --reshard'}; "
        "python train/run.py --plan predicts what fits"
    )


@dataclass(frozen=True)
class _Step:
    """A step that was launched: what is known of it at once, and what the device will have written."""

    step: int
    sample: int  # the first of its batch
    tokens: int  # seen, its own included
    lr: float
    reports: Tensor  # [ranks, 5] on the host: loss, squared norm, whether to stop, whether saving fails, seconds
    marks: tuple  # of the stopwatch: start, samples there, gradients there, updated
    ready: Callable[[], None]  # waits until `reports` is written


class _Run:
    """One run, from where it stands to its end."""

    def __init__(self, config: TrainConfig, ranks: Ranks, watchdog: Watchdog, stop: threading.Event):
        self.config, self.ranks, self.watchdog, self.stop_wanted = config, ranks, watchdog, stop
        if config.batch % (config.micro_batch * ranks.size):
            raise InputError(
                f"training: expected --batch divisible by --micro-batch {config.micro_batch} x {ranks.size} ranks, "
                f"got {config.batch}"
            )
        self.console = terminal(ranks.rank)
        self.data, self.held_out = (kind(config.data, config.context, config.seed) for kind in (Mixture, HeldOut))
        self.tokenizer = Tokenizer.load(self.data.tokenizer_directory)
        self.order = self.data.description()
        with watchdog.patient():
            model = build_model(config, self.tokenizer, ranks.device)
            self.shape = model.config
            self.model = parallel.shard(model, ranks, reshard=config.reshard)
            self.optimizer = Optimizer(self.model, config)
            start = resume(config, self.order, self.optimizer.tensors(), ranks.saving, self.console)
        self.stopwatch = Stopwatch(ranks.device)
        self._stand_at(start.position)
        if ranks.rank == 0:
            config.out.mkdir(parents=True, exist_ok=True)
            write_json(config.out / "config.json", {"training": config.to_json(), "model": asdict(self.shape)})
            write_json(config.out / "environment.json", environment())
        self._open_log()
        for reason in start.rejected:
            self.log.event("rejected", self.position.step, reason=reason)
        path = start.path and str(start.path)
        self.log.event(
            "start", self.position.step, ranks=ranks.size, checkpoint=path, sample=self.position.sample,
            epochs=self.data.epochs(self.position.sample),
        )  # fmt: skip
        self.saver = Saver(config.out / "checkpoints", config.keep, ranks, watchdog.progress)
        self.saved = self.position.step  # where the newest checkpoint was begun
        self.unsaved = 0  # in a row
        self.stopping = False  # as all ranks know
        self.rewinds: list[int] = []

    def go(self) -> Outcome:
        """Trains until the end, or until some rank is asked to stop."""
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection may come in any step and stop the host for long: they are made between steps
        try:
            with closing(self):
                return self._loop()
        finally:
            gc.enable()
            gc.unfreeze()

    def close(self) -> None:
        """Ends the reader and the sinks."""
        self.batches.close()
        self.log.close()

    def _loop(self) -> Outcome:
        config, out = self.config, self.config.out / "model"
        while True:
            step, progress = self.position.step, self.position.progress(config)
            saves = step % config.save_every == 0 or progress == 1 or self.stopping
            validates = (step % config.validate_every == 0 or progress == 1) and step not in self.validated
            compares = self.ranks.replicas > 1 and step % config.check_replicas == 0
            if (saves or validates or compares) and self._settle():
                continue  # what was settled may have changed where the run stands
            if compares:
                self._compare_replicas()
            if saves:
                self._save()  # before the validation, which may fail
            if self.stopping:
                self._finish_saving()
                self.log.event("stop", step)
                return Outcome(step, False, out, self.ranks.rank)
            if validates:
                self.stopping = not self._validate(progress)
                continue
            if progress == 1:
                break
            self._launch()
            self._settle(UNSETTLED)
            self._report_saving()
            self.watchdog.progress()
        self._finish_saving()
        with self.watchdog.patient():
            self._export(out)
        self.log.event("finish", step, epochs=self.data.epochs(self.position.sample))
        return Outcome(step, True, out, self.ranks.rank)

    def _stand_at(self, position) -> None:
        """Makes `position`, whose tensors are there, the one to go on from."""
        config, size = self.config, self.config.batch // self.ranks.size
        self.position, self.optimizer.updates = position, position.updates
        self.unsettled: deque[_Step] = deque()
        last = position.sample + (config.steps - position.step) * config.batch
        self.batches = self.data.batches(position.sample + self.ranks.rank * size, size, last, config.batch)
        self.begun = time.monotonic() - position.seconds
        self.ended = self.stopwatch.mark()  # the last step, and what is not part of any

    def _open_log(self) -> None:
        config, step = self.config, self.position.step
        info = RunInfo(
            config.out, step, config, self.shape, self.ranks.size, parallel.device_name(self.ranks), self.console
        )
        validated = (r["step"] for r in read_metrics(config.out) if "val_loss" in r and r["step"] <= step)
        self.validated = set(self.ranks.control.first(lambda: list(validated)))
        self.log = RunLog(info, (JsonLines, TensorBoard, Dashboard) if self.ranks.rank == 0 else ())

    def _launch(self) -> None:
        """Makes the next step, as far as the host is concerned."""
        config, ranks, position = self.config, self.ranks, self.position
        lr = learning_rate(position.progress(config, step=1), config)
        marks = [self.stopwatch.mark()]
        batch = next(self.batches)
        marks.append(self.stopwatch.mark())
        loss = accumulate_gradients(self.model, batch, config, ranks)
        marks.append(self.stopwatch.mark())
        clock = time.monotonic() - self.begun
        known = torch.tensor([self.stop_wanted.is_set(), self.unsaved >= MOST_UNSAVED, clock], dtype=torch.float64)
        known = parallel.to_device(known, ranks.device)
        mine = torch.cat([loss.double()[None], self.optimizer.squared_norm()[None], known])
        reports = ranks.gather(mine)
        norm = (reports[:, 1].sum() / ranks.replicas).sqrt()
        self.optimizer.step(lr, norm, reports[:, :2].isfinite().all())
        marks.append(self.stopwatch.mark())
        position.step += 1
        position.tokens += config.batch * config.context
        host, ready = self.stopwatch.fetch(reports)
        self.unsettled.append(_Step(position.step, position.sample, position.tokens, lr, host, tuple(marks), ready))
        position.sample += config.batch

    def _settle(self, leave: int = 0) -> bool:
        """Reads what came of the launched steps, the last `leave` left out; whether there were any."""
        count = len(self.unsettled) - leave
        for _ in range(count):
            if self.unsettled:
                self._settle_one(self.unsettled.popleft())
        return count > 0

    def _settle_one(self, step: _Step) -> None:
        config, position = self.config, self.position
        step.ready()
        losses, squares, stops, unsaved, clocks = step.reports.T.tolist()
        loss, norm = sum(losses), math.sqrt(sum(squares) / self.ranks.replicas)
        self.stopping |= any(stops)
        position.seconds = clocks[0]
        seconds, self.ended = self.stopwatch.seconds(self.ended, step.marks[-1]), step.marks[-1]
        data, gradients, update = (self.stopwatch.seconds(a, b) for a, b in pairwise(step.marks))
        progress = position.progress(config)
        skipped = not math.isfinite(loss + norm)
        self.log.write(
            {
                "step": step.step, "loss": loss, "grad_norm": norm, "lr": step.lr, "skipped": int(skipped),
                "tokens": step.tokens, "epoch": step.sample / len(self.data), "progress": progress,
                "tokens_per_second": config.batch * config.context / seconds,
                "seconds": position.seconds, "eta_seconds": position.seconds * (1 / progress - 1),
                "step_seconds": seconds, "data_seconds": data, "forward_backward_seconds": gradients,
                "optimizer_seconds": update, "other_seconds": max(0.0, seconds - data - gradients - update),
                "memory_bytes": self.stopwatch.memory(),
            }
        )  # fmt: skip
        samples = [step.sample, step.sample + config.batch]
        if skipped:
            ranks, parts = ([r for r, x in enumerate(values) if not math.isfinite(x)] for values in (losses, squares))
            self.log.event("skip", step.step, loss=loss, grad_norm=norm, samples=samples, ranks=ranks, parts=parts)
        if any(unsaved):
            self._report_saving(wait=True)
            raise NotSaved(
                f"{config.out / 'checkpoints'}: expected a checkpoint to be written, got {MOST_UNSAVED} failures in a "
                f"row, the last: {self.failure}; the same command goes on from the newest that is there"
            )
        if position.guards.judge(step.step, loss, norm, config.max_skipped) and config.spike != "off":
            self.log.event("spike", step.step, loss=loss, samples=samples)
            if config.spike == "rewind":
                self._rewind(step.step)

    def _rewind(self, step: int) -> None:
        """Goes back to the checkpoint before the spike that was complete at `step`, and on without those samples."""
        self._report_saving(wait=True)
        left, seconds = self.position.sample, self.position.seconds
        with self.watchdog.patient():
            tensors, team = self.optimizer.tensors(), self.ranks.saving
            start = rewind(self.config, step - PATIENCE + 1, tensors, team, self.console)
        if start is None:
            self.log.event("rewind", step, failure="no checkpoint from before")
            return
        if self.rewinds.count(start.position.step) == MAX_REWINDS:
            raise InputError(
                f"training: expected a loss without spikes, got one at step {step} again after {MAX_REWINDS} rewinds "
                f"to {start.path}, each without more samples: go on from an earlier checkpoint or with a lower --lr"
            )
        self.rewinds.append(start.position.step)
        samples = [start.position.sample, left]
        self.log.event("rewind", step, to_step=start.position.step, samples_left_out=samples)
        self.close()
        self._stand_at(replace(start.position, sample=left, seconds=seconds))
        self._open_log()
        self.saved = self.position.step

    def _compare_replicas(self) -> None:
        if different := parallel.disagreeing_ranks(self.optimizer.parts(), self.ranks):
            self.log.event("replicas", self.position.step, ranks=different)
            raise InputError(
                f"training: expected equal parameters in all replicas, got others at step {self.position.step} among "
                f"the ranks {different}: a GPU or its memory is at fault; go on from the newest checkpoint without it"
            )

    def _save(self) -> None:
        """Begins a checkpoint of this step, unless there is one."""
        self._report_saving(wait=True)
        if self.saved == self.position.step:
            return
        gc.collect()
        config, position = self.config, self.position
        position.updates = self.optimizer.updates
        state = position.to_json() | {
            "seed": config.seed, "context": config.context, "data": self.order, "config": config.to_json(),
            "ranks": self.ranks.size, "finite": all(self.ranks.control.gather(self.optimizer.all_finite())),
        }  # fmt: skip
        self.saver.begin(self.optimizer.tensors(), state)
        self.saved = position.step
        self.ended = self.stopwatch.mark()

    def _report_saving(self, wait: bool = False) -> None:
        """Logs how a checkpoint came out, once that is known; training goes on whichever."""
        if outcome := self.saver.outcome(wait):
            step, self.failure = outcome
            if self.failure is None:
                self.unsaved = 0
                self.log.event("save", step)
            else:
                self.saved = -1
                self.unsaved += 1
                self.log.event("save_failed", step, reason=self.failure)

    def _finish_saving(self) -> None:
        """Waits for the last checkpoint. InputError where it could not be written."""
        self._report_saving(wait=True)
        if self.saved != self.position.step:
            raise NotSaved(f"{self.config.out / 'checkpoints'}: step {self.position.step} not saved: {self.failure}")

    def _validate(self, progress: float) -> bool:
        """Logs the validation loss of this step; whether that came to its end, which a signal may cut short."""
        gc.collect()
        team, position = self.ranks.control, self.position

        def interrupted() -> bool:
            self.watchdog.progress()
            return team.any(self.stop_wanted.is_set())

        loss = evaluate(self.model, self.held_out, self.config, self.ranks, interrupted)
        if loss is None:
            return False
        self.validated.add(position.step)
        self.log.write({"step": position.step, "val_loss": loss, "tokens": position.tokens, "progress": progress})
        self.ended = self.stopwatch.mark()
        return True

    def _export(self, directory: Path) -> None:
        tensors = parallel.gathered(self.model, self.ranks)
        if self.ranks.rank == 0:
            whole = Phi(self.shape, "meta")
            for name, tensor in tensors.items():
                owner, _, attribute = name.rpartition(".")
                setattr(whole.get_submodule(owner), attribute, torch.nn.Parameter(tensor))
            if self.shape.tied_head:
                whole.head_w = whole.embed
            save_pretrained(whole, directory, self.tokenizer)
        self.ranks.saving.gather(None)  # nobody leaves while rank 0 still writes


def build_model(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Phi:
    """The model to start from, in fp32: that of --init-from, or the preset's shape with fresh weights.

    InputError where it has too few tokens or positions, or was made with another tokenizer.
    """
    if config.init_from is None:
        shape = PhiConfig.from_preset(config.preset)
        shape = replace(shape, bos_id=tokenizer.eos_id, eos_id=tokenizer.eos_id)
        model, source = Phi(shape, device, torch.float32).init_weights(config.seed), f"preset {config.preset}"
    else:
        model, source = load_pretrained(config.init_from, device, torch.float32).train(), str(config.init_from)
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


def accumulate_gradients(model: Phi, batch: Batch, config: TrainConfig, ranks: Ranks = ALONE) -> Tensor:
    """Adds to the gradients those of the global batch's loss; returns this rank's part of the loss, in nats per token.

    `batch` is this rank's part, taken micro-batch by micro-batch. The loss is the mean over all valid targets of all
    ranks, however they are spread: the mean of the ranks' or micro-batches' means would weigh the targets of those with
    few too much.
    """
    mine = parallel.to_device(torch.tensor(int((batch[1] != IGNORED).sum())), ranks.device)
    valid = parallel.sum_over_ranks(mine, ranks).clamp(min=1)
    total = torch.zeros((), device=ranks.device)
    for first in range(0, len(batch[0]), config.micro_batch):
        part = tuple(array[first : first + config.micro_batch] for array in batch)
        parallel.sum_gradients_now(model, first + config.micro_batch >= len(batch[0]))
        loss = _summed_loss(model, part, config.segment_ids, ranks) / valid
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: Phi,
    held_out: Samples,
    config: TrainConfig,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """The loss, in nats per token, over the same --validation-samples samples (or all there are) every time.

    Each rank takes its part of them; `interrupted`, asked before each micro-batch, ends it early with None.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # losses, valid targets
    samples = min(config.validation_samples, len(held_out))
    for first in range(0, samples, config.micro_batch * ranks.size):
        if interrupted():
            return None
        mine = first + ranks.rank * config.micro_batch
        tokens, targets, segment_ids = held_out.batch(min(mine, samples - 1), min(config.micro_batch, samples - first))
        targets[max(0, samples - mine) :] = IGNORED  # a forward takes all ranks, those whose samples are used up too
        sums[0] += _summed_loss(model, (tokens, targets, segment_ids), config.segment_ids, ranks)
        sums[1] += int((targets != IGNORED).sum())
    parallel.forget_gathered(model)
    loss, valid = parallel.sum_over_ranks(sums, ranks).tolist()
    return loss / max(1.0, valid)


def _summed_loss(model: Phi, batch: Batch, mask_documents: bool, ranks: Ranks) -> Tensor:
    tokens, targets, segment_ids = (parallel.to_device(torch.from_numpy(array), ranks.device) for array in batch)
    if not mask_documents or (batch[2] == batch[2][:, :1]).all():  # one document per row: plain causal attention
        segment_ids = None
    return model.loss(tokens, targets, segment_ids, reduction="sum")
