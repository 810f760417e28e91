"""Prefill and decode beside transformers' `generate`, on the same weights, greedy, in turns.

A decode step's time is the difference between a long and a short generation over the tokens between them; what a step
must read is every weight but the embedding and the filled part of the cache.
"""

import functools

import torch
from torch import nn

from xiangxin_fast.generator import Generator
from xiangxin_fast.model import Phi

from .case import Unavailable, layer_weights
from .hugging_face import causal_lm
from .measure import Turn, interleaved
from .train_step import random_model


def _ours(generator: Generator, prompts: list[list[int]], new_tokens: int) -> Turn:
    def turn(start) -> None:
        start()
        out = generator.generate(prompts, max_new_tokens=new_tokens, temperature=0, stop_ids=())
        assert all(len(tokens) == new_tokens for tokens in out)

    return turn


def _transformers(hf: nn.Module, prompts: list[list[int]], new_tokens: int, **options) -> Turn:
    tokens = torch.tensor(prompts, device=hf.device)
    mask = torch.ones_like(tokens)

    def turn(start) -> None:
        start()
        out = hf.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        assert out.shape[1] == tokens.shape[1] + new_tokens

    return turn


def _bytes_per_step(model: Phi, rows: int, positions: float) -> float:
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.embed.numel()
    cache = 2 * config.layers * config.channels * rows * positions
    return model.embed.element_size() * (weights + cache)


def _prefill_flops(work, tokens: int) -> float:
    config = work.shape.config
    scores = 2.0 * config.channels * tokens**2 * config.layers
    return 2.0 * tokens * config.layers * layer_weights(config) + scores + 2.0 * config.vocab * config.channels


class Pair:
    """Our model and transformers' on the same weights, made when first asked for; `hf` is None where it is absent."""

    def __init__(self, work):
        self._work = work

    @functools.cached_property
    def ours(self) -> Phi:
        return random_model(self._work.shape.config, self._work.device, self._work.dtype).requires_grad_(False)

    @functools.cached_property
    def hf(self) -> nn.Module | None:
        try:
            hf = causal_lm(self.ours).eval().requires_grad_(False)
        except Unavailable as error:
            self._work.emit({"kind": "skip", "provider": "transformers", "reason": str(error)})
            return None
        hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
        return hf


def _prompts(work, rows: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(work.shape.config.vocab, (rows, tokens), generator=generator).tolist()


def _timed(work, turns: dict[str, Turn], share: float) -> dict:
    seconds = 0.0 if work.dry_run else work.left * share
    timings, failed = interleaved(turns, work.device, seconds, flush=False)
    for name, reason in failed.items():
        work.emit({"kind": "error", "item": name, "reason": reason[:500]})
    return timings


def bench_prefill(work, pair: Pair) -> None:
    """Seconds to the first token of a long prompt."""
    tokens = 9 if work.dry_run else 1920
    prompts = _prompts(work, 1, tokens)
    turns = {"ours": _ours(Generator(pair.ours), prompts, 1)}
    if pair.hf is not None:
        turns["transformers"] = _transformers(pair.hf, prompts, 1)
    for name, timing in _timed(work, turns, 0.15).items():
        record = {"kind": "generate", "provider": name, "what": f"prefill of {tokens}", "rows": 1}
        record |= {"ms": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}
        record["tokens_per_s"] = tokens / timing.median * 1e3
        if work.ceilings:
            reached = _prefill_flops(work, tokens) / timing.median * 1e3
            record["percent"] = 100 * reached / work.ceilings.matmul_flops_per_s
        work.emit(record)


def bench_decode(work, pair: Pair, rows: int) -> None:
    """Seconds of a decode step of `rows` sequences."""
    prompt, short, long = (5, 1, 3) if work.dry_run else (512, 1, 33)
    prompts = _prompts(work, rows, prompt)
    generator = Generator(pair.ours, rows=rows)
    turns = {}
    for new_tokens in (short, long):
        turns[f"ours {new_tokens}"] = _ours(generator, prompts, new_tokens)
        if pair.hf is not None:
            turns[f"transformers {new_tokens}"] = _transformers(pair.hf, prompts, new_tokens)
    timings = _timed(work, turns, 0.25)
    for name in ("ours", "transformers"):
        brief, full = timings.get(f"{name} {short}"), timings.get(f"{name} {long}")
        if not brief or not full:
            continue
        steps = long - short
        spread = [(a - b) / steps for a, b in ((full.p20, brief.median), (full.p80, brief.median))]
        per_step = (full.median - brief.median) / steps
        record = {"kind": "generate", "provider": name, "what": f"decode after {prompt}", "rows": rows}
        record |= {"ms": per_step, "p20": spread[0], "p80": spread[1], "rounds": full.rounds}
        if per_step > 0:
            record["tokens_per_s"] = rows / per_step * 1e3
            if work.ceilings:
                moved = _bytes_per_step(pair.ours, rows, prompt + (short + long) / 2) / per_step * 1e3
                record["percent"] = 100 * moved / work.ceilings.copy_bytes_per_s
        work.emit(record)
