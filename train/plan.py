"""What a training run would need, before a GPU is rented: `python train/run.py --plan --help`.

Memory is traced (train/memory.py). Time is a model, printed part by part in two columns and called predicted:
  expected   cuBLAS's products at the rate that bench.static expects of the best Triton product, which cuBLAS is known
             to exceed; kernels as it expects from their machine code (bench/results/static.json); other traffic at the
             share of the bandwidth that it expects of LayerNorm; communication hidden by nothing
  at best    products at the best rate published for the GPU, kernels and traffic at their bounds, communication hidden
             altogether
Neither knows of clocks under sustained load, gaps between launches, loading or saving. Where bench/results holds a
measured forward and backward of this model on such a GPU, that stands in place of the expected one.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.gpus import GIB, GPUS, Gpu, gpu_called
from xiangxin_fast.config import PRESETS, PhiConfig
from xiangxin_fast.errors import InputError, exits_cleanly, one_line_complaints

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
GPUS_PER_NODE = 8
LEFT_OUT = "Left out: clocks under sustained load, gaps between launches, loading, saving. Expect less, not more."
LINK_SHARE = 0.8  # of one direction of NVLink: nccl-tests reach about 235 of an A100's 300 GB/s
DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """Predict memory, speed, days and cost of a training run, without training.

    Example: python train/run.py --plan --gpu A800-80G --gpus 8 --micro-batch 8 --tokens 150e9
    """

    preset: Literal[tuple(PRESETS)] = "xiangxin-3b"
    """Shape of the model."""
    gpu: Literal[tuple(GPUS)] = "A800-80G"
    """Kind of GPU."""
    gpus: int = 8
    """How many of them."""
    context: int = 2048
    """Tokens per sequence."""
    batch: int = 512
    """Sequences per optimizer step, of all GPUs together."""
    micro_batch: int = 8
    """Sequences per forward and backward of one GPU."""
    tokens: float = 150e9
    """Tokens to train on, over all epochs."""
    price: float | None = None
    """Price of one GPU for one hour, in any currency; without it no cost is shown."""
    link: float | None = None
    """GB/s that each GPU sends to other nodes while it receives as many; for more than 8 GPUs."""
    reshard: bool = False
    """Free a block's gathered parameters after its forward, as train/run.py --reshard does."""
    reserve: float = 6.0
    """GiB of each GPU that are left to CUDA, NCCL, cuBLAS and fragmentation, none of which is traced."""

    def __post_init__(self):
        for name in ("gpus", "context", "batch", "micro_batch", "tokens", "price", "link", "reserve"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"plan: expected --{name.replace('_', '-')} above 0, got {value}")
        if self.batch % (self.gpus * self.micro_batch):
            raise InputError(
                f"plan: expected --batch divisible by {self.gpus} GPUs x {self.micro_batch}, got {self.batch}"
            )
        if self.context > (most := self.model.context):
            raise InputError(f"plan: expected --context of at most {most}, got {self.context}")
        if self.gpus > GPUS_PER_NODE and self.gpus % GPUS_PER_NODE:
            raise InputError(f"plan: expected whole nodes of {GPUS_PER_NODE} GPUs, got {self.gpus}")
        if (self.gpus > GPUS_PER_NODE) != (self.link is not None):
            raise InputError(
                f"plan: expected --link with more than {GPUS_PER_NODE} GPUs alone, got {self.gpus} GPUs and {self.link}"
            )

    @property
    def model(self) -> PhiConfig:
        return PhiConfig.from_preset(self.preset)

    @property
    def micro_batches(self) -> int:
        """Of one rank, per optimizer step."""
        return self.batch // (self.gpus * self.micro_batch)

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the parameters: those of a node."""
        return min(self.gpus, GPUS_PER_NODE)


@dataclass(frozen=True)
class Span:
    """Seconds of one part of a step, at the two ends of what is predicted."""

    expected: float
    best: float

    def __mul__(self, times: float) -> "Span":
        return Span(self.expected * times, self.best * times)

    def __add__(self, other: "Span") -> "Span":
        return Span(self.expected + other.expected, self.best + other.best)


NOTHING = Span(0.0, 0.0)


class Kernels:
    """How near to the roofline kernels come on one architecture, by bench/results/static.json."""

    def __init__(self, gpu: Gpu, results: Path):
        rows = json.loads((results / "static.json").read_text(encoding="utf-8"))["rows"]
        self.gpu = gpu
        self._rows = {row["case"]: row for row in rows if row["arch"] == gpu.arch and row["dtype"] == "bf16"}

    def _span(self, case: str, floor: float) -> Span:
        row = self._rows[case]
        return Span(floor * row["estimate_us"] / row["floor_us"], floor * row["bound_us"] / row["floor_us"])

    def product(self, flops: float) -> Span:
        """A product by cuBLAS."""
        floor = flops / self.gpu.flops
        expected = min(self._span(case, floor).expected for case in self._rows if case in _PRODUCTS)
        return Span(expected, flops / self.gpu.best_product)

    def arithmetic(self, case: str, flops: float) -> Span:
        """A kernel of that case whose floor is its FLOPs."""
        return self._span(case, flops / self.gpu.flops)

    def traffic(self, moved: float, case: str = "layer_norm/fwd") -> Span:
        """A kernel of that case whose floor is the bytes it moves."""
        return self._span(case, moved / self.gpu.bandwidth)


_PRODUCTS = ("gemm/bias", "gemm/rotary", "gemm/gelu", "gemm/dgelu", "gemm/residual")
LOGITS_BYTES = 256 * 2**20  # of a chunk of linear_cross_entropy


def forward_backward(config: PhiConfig, B: int, T: int, kernels: Kernels) -> dict[str, Span]:
    """One micro-batch of [B, T]: every product and every pass over memory of the kernels' way, in bf16."""
    C, F, V, H, L = config.channels, config.mlp_hidden, config.vocab, config.heads, config.layers
    N = B * T
    causal, full = config.flops_per_token(T)
    pairs = B * H * T * (T + 1) / 2
    attention = sum(
        (
            kernels.arithmetic(f"attention/{part}", 2 * products * pairs * config.head_dim)
            for part, products in (("fwd", 2), ("bwd_dq", 3), ("bwd_dkv", 4))
        ),
        kernels.traffic(4 * N * C),  # delta
    )
    pointwise = (
        kernels.traffic(4 * N * C, "layer_norm/fwd") * 2  # the backward makes LN(x) again
        + kernels.traffic(8 * N * C, "layer_norm/bwd")
        + kernels.traffic(8 * N * config.rotary_dim * H, "gemm/after_cublas_rotary")
        + kernels.traffic(4 * N * F, "gemm/after_cublas_gelu")
        + kernels.traffic(8 * N * F, "gemm/after_cublas_dgelu")
        + kernels.traffic(6 * N * C, "gemm/after_cublas_residual")
        + kernels.traffic(2 * N * C)  # column sums of dy: b_out's gradient; b_in's come out of other kernels
    )
    chunks = math.ceil(2 * N * V / LOGITS_BYTES)
    head = (
        kernels.traffic(4 * N * V, "cross_entropy/bwd")
        + kernels.traffic(2 * N * V)  # the bias's gradient
        + kernels.traffic(8 * V * C * chunks + 6 * V * C + 4 * N * C)  # the weight's in fp32, then both rounded
    )
    return {
        "matrix products": kernels.product((2 * causal - full) * N),
        "attention": attention * L,
        "LayerNorm, rotary, GELU, residual, bias": pointwise * L,
        "cross-entropy": head,
        "embedding": kernels.traffic(6 * N * C + 2 * V * C),
    }


def step(plan: Plan, results: Path = RESULTS) -> dict[str, Span]:
    """Seconds of one optimizer step on every rank, part by part."""
    kernels = Kernels(GPUS[plan.gpu], results)
    P, share = plan.model.parameters, plan.model.parameters / plan.shards
    times = plan.micro_batches
    parts = {
        name: span * times
        for name, span in forward_backward(plan.model, plan.micro_batch, plan.context, kernels).items()
    }
    if (found := measured(plan, results)) is not None:
        best = sum(parts.values(), NOTHING).best
        parts = {"forward and backward, measured": Span(found * times, min(best, found * times))}
    if times > 1:
        parts["gradients added up in fp32"] = kernels.traffic(10 * P * times)
    # p, m, v read and written, the gradient read; clipping reads it and writes it anew
    parts["AdamW and clipping"] = kernels.traffic((28 + 12) * share)
    # Once a step, parameters are gathered in bf16 and gradients scattered in fp32; nodes add up each shard of them.
    # With --reshard each backward gathers anew: what it leaves gathered serves the next forward.
    gathered = 1 + times if plan.reshard else 1
    if plan.gpus > 1:
        parts["NVLink"] = Span((2 * gathered + 4) * (P - share) / (GPUS[plan.gpu].nvlink / 2 * LINK_SHARE), 0.0)
    if plan.link is not None:
        nodes = plan.gpus // GPUS_PER_NODE
        parts["between nodes"] = Span(2 * 4 * share * (nodes - 1) / nodes / (plan.link * 1e9), 0.0)
    return parts


def measured(plan: Plan, results: Path) -> float | None:
    """Seconds of one micro-batch's forward and backward as measured on such a GPU, by the newest run; None without."""
    found = []
    for path in results.glob("gpu-*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        environment = next((r for r in records if r.get("kind") == "environment"), {})
        for record in records:
            if (
                record.get("kind") == "train"
                and record["provider"] == "ours"
                and record["T"] == plan.context
                and plan.model == PhiConfig.from_preset("phi-2")  # the only shape that bench.gpu trains
                and gpu_called(environment["device"]) is GPUS[plan.gpu]
            ):
                seconds = record["forward_backward_ms"] / 1e3 * plan.micro_batch / record["micro_batch"]
                found.append((environment["date"], seconds))
    return max(found)[1] if found else None


def memory(plan: Plan) -> dict:
    """{"parts": bytes by part, "largest_micro_batch"} of one rank, from train/memory.py in a process of its own."""
    asked = {
        "model": dataclasses.asdict(plan.model),
        "ranks": plan.shards,
        "T": plan.context,
        "micro_batch": plan.micro_batch,
        "most": plan.batch // plan.gpus,
        "accumulate": plan.micro_batches > 1,
        "reshard": plan.reshard,
        "room": int(GPUS[plan.gpu].memory - plan.reserve * GIB),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory.py"))],
        input=json.dumps(asked),
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"plan: memory was not traced:\n{done.stderr}")
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Speed:
    """Where a step of so many seconds leads."""

    seconds: float  # of one step
    tokens_per_second: float  # of one GPU
    mfu_causal: float  # of the datasheet's rate
    mfu_full: float
    days: float


def speed(plan: Plan, seconds: float) -> Speed:
    """Speed of a run whose steps take `seconds`."""
    rate = plan.batch * plan.context / seconds / plan.gpus
    causal, full = (flops * rate / GPUS[plan.gpu].flops for flops in plan.model.flops_per_token(plan.context))
    return Speed(seconds, rate, causal, full, plan.tokens / (rate * plan.gpus) / DAY)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=True)


def _memory_table(plan: Plan, found: dict) -> Table:
    total, room = sum(found["parts"].values()), GPUS[plan.gpu].memory - plan.reserve * GIB
    table = _table(f"Memory of a rank, micro-batch {plan.micro_batch} x {plan.context}, traced")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in found["parts"].items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("peak", f"{total / GIB:.2f}")
    fits = "fits" if total <= room else "DOES NOT FIT"
    table.add_row(f"{fits} {GPUS[plan.gpu].memory / GIB:.1f} less --reserve {plan.reserve:g}", f"{room / GIB:.2f}")
    table.add_row(
        f"largest micro-batch that fits, of {plan.batch // plan.gpus} sequences a rank",
        str(found["largest_micro_batch"]),
    )
    return table


def _time_table(plan: Plan, parts: dict[str, Span]) -> Table:
    table = _table(
        f"One step of {plan.batch} x {plan.context} tokens, {plan.micro_batches} micro-batches a rank, predicted"
    )
    table.add_column("part")
    for name in ("expected ms", "at best ms"):
        table.add_column(name, justify="right")
    for part, span in parts.items():
        table.add_row(part, f"{span.expected * 1e3:,.1f}", f"{span.best * 1e3:,.1f}")
    whole = sum(parts.values(), NOTHING)
    table.add_section()
    table.add_row("step", f"{whole.expected * 1e3:,.1f}", f"{whole.best * 1e3:,.1f}")
    ends = [speed(plan, seconds) for seconds in (whole.expected, whole.best)]

    def row(name: str, form: str, values: Sequence[float]) -> None:
        table.add_row(name, *(form.format(value) for value in values))

    table.add_section()
    row("tokens/s per GPU", "{:,.0f}", [end.tokens_per_second for end in ends])
    row("MFU, causal half of the attention", "{:.1%}", [end.mfu_causal for end in ends])
    row("MFU, full attention", "{:.1%}", [end.mfu_full for end in ends])
    row(f"days for {plan.tokens:.3g} tokens", "{:.1f}", [end.days for end in ends])
    if plan.price is not None:
        row(f"cost at {plan.price:g} per GPU-hour", "{:,.0f}", [e.days * 24 * plan.gpus * plan.price for e in ends])
    return table


def claim() -> str:
    """The model card's claim of Xiangxin-3B, in the same terms as the prediction."""
    card = Plan(preset="xiangxin-3b", gpu="A800-80G", gpus=8, tokens=150e9)
    rate = card.tokens / (14 * DAY * card.gpus)
    claimed = speed(card, card.batch * card.context / (rate * card.gpus))
    peak, phi_2 = GPUS[card.gpu].flops, 1.4e12 / (14 * DAY * 96)  # tokens and GPUs of Phi-2's model card
    microsoft = phi_2 * card.model.flops_per_token(card.context)[1] / peak
    return (
        f"Xiangxin-3B's model card claims 150e9 tokens in 14 days on 8 x A800: {rate:,.0f} tokens/s per GPU, "
        f"{claimed.mfu_causal:.0%} of peak with causal attention counted, {claimed.mfu_full:.0%} with full attention. "
        f"The best pure product published for an A100 is {GPUS[card.gpu].best_product / peak:.0%} of it; whole steps "
        "published at this size and length: 62.1% (llm-foundry, 2.65 B), 65.7% (FlashAttention-2, 2.7 B), and about "
        f"{microsoft:.0%} by the round figures of Microsoft's card of Phi-2 itself (full attention counted)."
    )


def show(plan: Plan, console: Console) -> None:
    """Prints the whole plan."""
    causal, full = plan.model.flops_per_token(plan.context)
    console.print(
        f"{plan.preset}: {plan.model.parameters:,} parameters; {causal / 1e9:.2f} GFLOP per token of "
        f"{plan.context} with the causal half of the attention, {full / 1e9:.2f} with full attention",
        highlight=False,
    )
    console.print(f"{plan.gpus} x {plan.gpu}, predicted; nothing here was measured but what says so\n", highlight=False)
    with console.status("tracing one rank's memory"):
        found = memory(plan)
    console.print(_memory_table(plan, found), "")
    console.print(_time_table(plan, step(plan)))
    console.print(f"{LEFT_OUT}\n", highlight=False)
    console.print(claim(), highlight=False)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python train/run.py --plan`."""
    with one_line_complaints():
        plan = tyro.cli(Plan, prog="python train/run.py --plan", args=arguments)
    show(plan, Console(width=None if sys.stdout.isatty() else 110))


if __name__ == "__main__":
    main()
