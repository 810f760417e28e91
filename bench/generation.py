"""Prefill and decode, in bf16 and with rounded weights, beside transformers' `generate` on the same weights.

The measuring is that of `python -m xiangxin_fast.generate --benchmark`. A decode step must read every weight but the
embedding and the filled part of the cache; the share of the copy bandwidth counts these bytes and no others.
"""

import functools
from dataclasses import replace

from xiangxin_fast.benchmark import Contender, Measured, measure, ours, random_model, transformers
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi
from xiangxin_fast.quantization import quantize_model

from .case import layer_weights
from .hugging_face import causal_lm
from .measure import Timing, assert_alive
from .runner import reason_of

ROUNDS = 20
ROUNDED = ("int8", "int4")


def prefill_flops(config: PhiConfig, tokens: int) -> float:
    """FLOPs to the first token of a prompt: matrix products, causal half of the attention, the head for one token."""
    scores = 2.0 * config.channels * tokens**2 * config.layers
    return 2.0 * tokens * config.layers * layer_weights(config) + scores + 2.0 * config.vocab * config.channels


class Contenders:
    """Our model in bf16 and rounded, and transformers' on the same weights; made when first asked for."""

    def __init__(self, work, rows: int):
        self._work, self._rows = work, rows

    @functools.cached_property
    def plain(self) -> dict[str, Contender]:
        """In bf16; without transformers where it is absent."""
        model = self._model()
        found = {}
        try:
            hf = causal_lm(model).eval().requires_grad_(False)
            found["transformers"] = transformers(hf, model.config)
        except Exception as error:  # whatever ails it, ours is measured
            self._work.emit({"kind": "skip", "provider": "transformers", "reason": reason_of(error)})
            assert_alive(self._work.device)
        return {"ours": ours(model, self._rows)} | found

    @functools.cached_property
    def rounded(self) -> dict[str, Contender]:
        return {f"ours, {kind}": ours(quantize_model(self._model(), kind), self._rows) for kind in ROUNDED}

    def _model(self) -> Phi:
        config = self._work.shape.config
        if self._work.dry_run:  # the tiny shape has odd widths, and weights of 4 bits come in groups
            config = replace(config, channels=160, heads=2, mlp_hidden=320)
        return random_model(config, self._work.device, self._work.dtype)


def _measured(work, contenders: dict[str, Contender], share: float, **size) -> dict[str, Measured]:
    rounds, seconds = (1, 0.0) if work.dry_run else (ROUNDS, work.left * share)
    found, failed = measure(contenders, **size, rounds=rounds, seconds=seconds)
    for name, reason in failed.items():
        work.emit({"kind": "error", "provider": name, "item": str(size), "reason": reason[:500]})
    assert_alive(work.device)
    return found


def _record(provider: str, what: str, rows: int, seconds: list[float], tokens: int) -> dict:
    timing = Timing.of([1e3 * value for value in seconds])
    record = {"kind": "generate", "provider": provider, "what": what, "rows": rows}
    record |= {"ms": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}
    return record | {"tokens_per_s": tokens / timing.median * 1e3}


def bench_prefill(work, contenders: Contenders) -> None:
    """Seconds to the first token of a long prompt."""
    tokens = 9 if work.dry_run else 1920
    found = _measured(work, contenders.plain, 0.15, rows=1, prompt_tokens=tokens, new_tokens=1)
    for name, measured in found.items():
        record = _record(name, f"prefill of {tokens}", 1, [turn.first for turn in measured.turns], tokens)
        if work.ceilings:
            reached = prefill_flops(work.shape.config, tokens) / measured.first.median
            record["percent"] = 100 * reached / work.ceilings.matmul_flops_per_s
        work.emit(record)


def bench_decode(work, contenders: Contenders, rows: int) -> None:
    """Seconds of a decode step of `rows` sequences; with rounded weights too for one and a few."""
    prompt, new_tokens = (5, 3) if work.dry_run else (512, 64)
    who = contenders.plain | (contenders.rounded if rows <= 8 else {})
    found = _measured(work, who, 0.3, rows=rows, prompt_tokens=prompt, new_tokens=new_tokens)
    for name, measured in found.items():
        steps = [turn.step for turn in measured.turns]
        record = _record(name, f"decode after {prompt}", rows, steps, rows)
        if work.ceilings:
            record["percent"] = 100 * measured.bytes_per_s(who[name]) / work.ceilings.copy_bytes_per_s
        work.emit(record)
