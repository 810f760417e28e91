"""TrainConfig: every choice of a training run, its presets, its command line. Imports no torch: --help is instant."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from xiangxin_fast.errors import InputError, one_line_complaints


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain a Phi model, or train a checkpoint further, on token shards made by train/prepare.py.

    Example: python train/run.py --preset demo --data demo/shards --out runs/first --lr 1e-3

    On eight GPUs: torchrun --nproc_per_node=8 --max-restarts=3 train/run.py --preset xiangxin-3b --data DIR --out DIR

    What a run would need, without one: python train/run.py --plan --help

    The run directory gets config.json, environment.json, metrics.jsonl (one line per step), events.jsonl (skipped
    updates, spikes, saves, ...), tb/ (TensorBoard), checkpoints/ and, at the end, model/: a Hugging Face directory. The
    same command again goes on where it stopped, on any number of GPUs; Ctrl-C or SIGTERM finishes the steps under way
    and saves first (torchrun kills 30 s later: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 lets it). On several nodes all must
    see --data and --out.
    """

    preset: Literal["demo", "xiangxin-3b"]
    """Shape of the model and the defaults of the options below (shown: xiangxin-3b's, unless --preset was given)."""
    data: Path
    """Directory of token shards (manifest.json, tokenizer.json, *.bin), or a JSON file that mixes some beside it:
    {"phases": [{"from_sample": 0, "sources": {"zh": 0.9, "code": 0.1}}, ...]}, weights being shares of the samples."""
    out: Path
    """Run directory; made when it does not exist."""
    init_from: Path | None = None
    """Hugging Face directory whose weights and shape to start from; dropout settings in it are ignored."""
    resume: str = "auto"
    """'auto': the newest valid checkpoint of --out; 'never': start anew, --out must hold none; or a checkpoint. Where
    torchrun starts the ranks again, they go on from the newest that they have written, whichever it is."""
    seed: int = 1
    """Decides the initial weights and the order of the samples."""

    context: int = 2048
    """Tokens per sequence."""
    batch: int = 512
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int = 8
    """Sequences per forward and backward of a rank; gradients accumulate until --batch is full."""
    segment_ids: bool = True
    """Attention stays inside a document when several share a sequence."""

    steps: int = 143_000
    """Optimizer steps of the whole run."""
    minutes: float | None = None
    """Time limit of the whole run. The schedule then follows whichever of steps and time is further on, so the learning
    rate still comes down; such a run depends on the machine's speed and does not repeat bit for bit."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_floor: float = 0.1
    """The schedule ends at this fraction of --lr."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the rate comes down: along half a cosine, or (wsd) only in the last --decay of the run."""
    decay: float = 0.2
    """Fraction of the run over which wsd lowers the rate; to train on later, go on from a checkpoint before it."""
    warmup: float = 0.01
    """Fraction of the run over which the learning rate rises linearly."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    weight_decay: float = 0.1
    """AdamW's weight decay; on matrices only."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down."""

    validate_every: int = 250
    """Steps between validation losses; there is always one after the last step."""
    validation_samples: int = 512
    """Sequences of the validation split per validation loss, at most."""
    save_every: int = 500
    """Steps between checkpoints; there is always one after the last step."""
    keep: int = 3
    """Newest checkpoints kept; at least 2, so that a damaged one is never the only one."""

    replicas: int | None = None
    """Copies of the model, each spread over ranks / replicas; by default one for each node, or one."""
    reshard: bool = False
    """Free a block's gathered parameters after its forward: less memory, once more communication."""
    timeout: float = 600.0
    """Seconds without progress after which the run ends and names the rank that it waited for."""
    max_skipped: int = 5
    """Updates in a row left out, since loss or gradient were not finite, after which the run ends."""
    spike: Literal["off", "log", "rewind"] = "log"
    """What to do about a loss that jumps and stays: log it, or also go back to the checkpoint before and leave out the
    samples from there on; events.jsonl names them."""
    check_replicas: int = 1000
    """Steps between comparisons of the replicas' parameters, bit by bit, where there are several."""

    def __post_init__(self):
        for name in (
            "context",
            "batch",
            "micro_batch",
            "steps",
            "validate_every",
            "validation_samples",
            "save_every",
            "max_skipped",
            "check_replicas",
        ):
            _expect(getattr(self, name) >= 1, f"--{_flag(name)} of at least 1", getattr(self, name))
        _expect(
            self.batch % self.micro_batch == 0, f"--batch divisible by --micro-batch {self.micro_batch}", self.batch
        )
        _expect(self.minutes is None or self.minutes > 0, "--minutes above 0", self.minutes)
        _expect(self.replicas is None or self.replicas >= 1, "--replicas of at least 1", self.replicas)
        _expect(0 < self.decay <= 1, "--decay in 0..1, 0 excluded", self.decay)
        for name in ("lr", "clip", "timeout"):
            _expect(getattr(self, name) > 0, f"--{_flag(name)} above 0", getattr(self, name))
        for name in ("lr_floor", "warmup"):
            _expect(0 <= getattr(self, name) <= 1, f"--{_flag(name)} in 0..1", getattr(self, name))
        for name in ("beta1", "beta2"):
            _expect(0 <= getattr(self, name) < 1, f"--{_flag(name)} in 0..1, 1 excluded", getattr(self, name))
        _expect(self.weight_decay >= 0, "--weight-decay of at least 0", self.weight_decay)
        _expect(self.seed >= 0, "--seed of at least 0", self.seed)
        _expect(self.keep >= 2, "--keep of at least 2", self.keep)

    def to_json(self) -> dict:
        """The fields as JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


# xiangxin-3b: 143,000 steps of 512 x 2048 tokens are 150e9 tokens. Rates of 1.6e-4 (GPT-3 2.7B) to 3e-4 are usual at
# this size and a batch of a million tokens; betas, decay and clip are GPT-3's (arXiv:2005.14165, appendix B).
# demo: two cores see half a million tokens in its minutes: a small batch for many steps, a high rate, a low floor, and
# a longer memory in beta2 against the noise of 512 tokens. The model is wide and shallow: at a sixth of the size, two
# layers ended 0.26 nats below four after equal time, and beta2 0.99 ended 0.09 below 0.95 after equal tokens.
PRESETS: dict[str, dict] = {
    "xiangxin-3b": {},
    "demo": {
        "context": 256,
        "batch": 2,
        "micro_batch": 2,
        "steps": 3400,
        "minutes": 4.6,
        "lr": 1.5e-3,
        "lr_floor": 0.02,
        "warmup": 0.05,
        "beta2": 0.99,
        "validate_every": 200,
        "validation_samples": 32,
        "save_every": 300,
    },
}


def _flag(field: str) -> str:
    return field.replace("_", "-")


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"training: expected {expected}, got {got}")


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration a command line asks for; InputError (one line, with the near match) where it does not fit."""
    named = re.search(r"--preset[ =](\S+)", " ".join(arguments))
    preset = PRESETS.get(named[1], {}) if named else {}
    default = TrainConfig(tyro.MISSING, tyro.MISSING, tyro.MISSING, **preset)
    with one_line_complaints():
        return tyro.cli(TrainConfig, prog="python train/run.py", default=default, args=list(arguments))
