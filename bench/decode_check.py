"""What decode claims and no CPU can show: kernels of rounded weights, rows that do not know their company, graphs."""

from dataclasses import replace

import torch
from torch import Tensor
from xiangxin_kernels import (
    QuantizedWeight,
    _host,
    decode_block,
    decode_block_ref,
    decode_head,
    decode_head_ref,
    dequantize,
    quantize,
)

from xiangxin_fast import decode_batch
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.generator import Generator
from xiangxin_fast.quantization import quantize_model

from .case import Unavailable
from .numerics import Comparison, compare
from .train_step import random_model

KINDS = {"bfloat16": None, "int8": 8, "int4": 4}
ROWS = (1, 3, 8, 17, 32)  # of both kernels, whole and not
LAYERS = 3


def _config(work) -> PhiConfig:
    """The section's shape in a few layers; where that is tiny, wide enough for groups of 32."""
    config = work.shape.config
    return replace(config, channels=96, mlp_hidden=96) if work.dry_run else replace(config, layers=LAYERS)


class _Layer:
    """A layer and the head for ROWS[-1] rows, each at a position of its own; weights rounded to `bits`, or bf16."""

    def __init__(self, work, bits: int | None):
        config, device = _config(work), work.device
        C, F, self.heads = config.channels, config.mlp_hidden, config.heads
        random = torch.Generator(device).manual_seed(1)

        def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + std * torch.randn(shape, device=device, generator=random)).to(work.dtype)

        def weight(rows: int, columns: int) -> Tensor | QuantizedWeight:
            plain = draw(rows, columns, std=config.init_std)
            return quantize(plain, bits) if bits else plain

        n, S = ROWS[-1], min(config.context, 700)
        self.x = draw(n, C)
        self.norm = (draw(C, std=0.1, mean=1), draw(C, std=0.1))
        self.block = [weight(3 * C + F, C), draw(3 * C + F), weight(C, C + F), draw(2, C)]
        self.head = [weight(config.vocab, C), draw(config.vocab)]
        angles = torch.rand(S, config.rotary_dim // 2, device=device, generator=random) * 6
        self.rotary = (angles.cos(), angles.sin())
        self.caches = tuple(draw(n, S, self.heads, C // self.heads) for _ in "kv")
        self.positions = torch.arange(n, device=device) * (S - 1) // (n - 1)

    def run(self, rows: slice, block=decode_block, head=decode_head, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x after the layer, its keys and values, and the logits, of these rows alone; in `dtype` of plain numbers."""

        def cast(value):
            if dtype is None or not isinstance(value, Tensor | QuantizedWeight):
                return value
            return dequantize(value, dtype) if isinstance(value, QuantizedWeight) else value.to(dtype)

        x, k, v = (cast(t[rows].clone()) for t in (self.x, *self.caches))
        norm, at = [cast(t) for t in self.norm], self.positions[rows]
        y = block(x, *norm, *map(cast, self.block), *map(cast, self.rotary), k, v, at, heads=self.heads)
        place = torch.arange(len(at), device=at.device), at
        return [y, k[place], v[place], head(x, *norm, *map(cast, self.head))]


def _emit(work, what: str, kind: str, shape: str, found: dict) -> None:
    work.emit({"kind": "check", "op": what, "provider": "ours", "shape": shape, "dtype": kind} | found)


def _refuse_interpreter() -> None:
    if _host.INTERPRET:
        raise Unavailable("equal bits need a GPU: bits of the interpreter's products, numpy's, depend on the shape")


def check_rounded(work) -> None:
    """The kernels of int8 and int4 weights against the numbers those stand for, in fp64, by the numerics rule."""
    for kind in ("int8", "int4"):
        layer = _Layer(work, KINDS[kind])
        for n in ROWS:
            runs = [layer.run(slice(n))]
            runs += [layer.run(slice(n), decode_block_ref, decode_head_ref, d) for d in (work.dtype, torch.float64)]
            names = ("out", "k", "v", "logits")
            verdict: dict[str, Comparison] = {
                name: compare(actual.to(plain.dtype), plain, exact)
                for name, actual, plain, exact in zip(names, *runs, strict=True)
            }
            tensor, worst = max(verdict.items(), key=lambda item: item[1].ratio)
            found = {"passed": all(c.passed for c in verdict.values()), "tensor": tensor, "worst": worst.worst}
            _emit(work, "decode", kind, f"B={n}", found | {"ratio": worst.ratio, "criterion": worst.criterion})


def check_rows_alone(work) -> None:
    """Each row's bits among others, in every number of rows, are those that it has alone."""
    _refuse_interpreter()
    for kind, bits in KINDS.items():
        layer = _Layer(work, bits)
        alone = [torch.cat(parts) for parts in zip(*(layer.run(slice(i, i + 1)) for i in range(ROWS[-1])), strict=True)]
        for n in ROWS[1:]:
            rows = slice(ROWS[-1] - n, ROWS[-1])
            differ = sum(int((t != a[rows]).sum()) for t, a in zip(layer.run(rows), alone, strict=True))
            _emit(work, "rows alone", kind, f"B={n}", _bits(differ))


def check_graphs(work) -> None:
    """Completions from captured steps, drafts included, are those of steps that are not, bit for bit."""
    _refuse_interpreter()
    config, random = _config(work), torch.Generator().manual_seed(1)
    prompts = [torch.randint(config.vocab, (n,), generator=random).tolist() for n in (3, 9, 1, 12, 5)]
    options = {"max_new_tokens": 4 if work.dry_run else 48, "seed": 1, "top_k": 40, "stop_ids": ()}
    for kind in KINDS:
        model = random_model(config, work.device, work.dtype).eval().requires_grad_(False)
        model = quantize_model(model, kind) if KINDS[kind] else model
        captured = Generator(model, rows=4).complete(prompts, lookup=2, **options)
        captures, decode_batch.CAPTURES = decode_batch.CAPTURES, set()
        try:
            eager = Generator(model, rows=4).complete(prompts, **options)
        finally:
            decode_batch.CAPTURES = captures
        differ = sum(a != b for c, e in zip(captured, eager, strict=True) for a, b in _pairs(c, e))
        _emit(work, "graphs", kind, f"{len(prompts)} prompts", _bits(differ))


def _pairs(captured, eager) -> list[tuple]:
    both = zip(captured.tokens + captured.logprobs, eager.tokens + eager.logprobs, strict=False)
    return [*both, (len(captured.tokens), len(eager.tokens))]


def _bits(differ: int) -> dict:
    about = {"tensor": "bits", "ratio": float(differ), "criterion": "equal", "worst": f"{differ} numbers differ"}
    return {"passed": differ == 0} | about
