"""Cached = uncached: logits of every decode step against the same row of a whole forward pass, by the numerics rule."""

import dataclasses

import pytest
import torch

from bench.numerics import compare
from tests.hf import random_model
from tests.numerics import assert_no_worse_than_torch
from tests.op_contract import assert_same_bits
from tests.test_generate import PHI_2, prompts_of
from xiangxin_fast.kv_cache import KVCache
from xiangxin_fast.model import Phi


def cached_logits(model: Phi, tokens: torch.Tensor, prefilled: int, together: int) -> torch.Tensor:
    """Logits [T - prefilled + 1, V] of tokens [T]: from the end of the prefill on, `together` rows to a step.

    The cache's row is its second, between others full of NaN.
    """
    cache = KVCache.allocate(model.config, 3, len(tokens), dtype=model.embed.dtype)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    logits = [model.prefill(tokens[None, :prefilled], cache.rows(1, 2))]
    for positions in torch.arange(prefilled, len(tokens)).split(together):
        logits.append(model.decode(tokens[positions], cache, positions, torch.ones_like(positions)))
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [257, pytest.param(2048, marks=pytest.mark.slow)])
class TestCachedIsUncached:
    def test_at_every_position(self, dtype, context):
        """One row to a step, and four: positions past a multiple of the chunk and of every vector, to the last one."""
        model = random_model(dataclasses.replace(PHI_2, context=context), dtype)
        tokens = torch.tensor(prompts_of(PHI_2, context)[0])
        with torch.no_grad():
            plain = model(tokens[None])[0, 4:]
            exact = random_model(model.config).to(dtype).double()(tokens[None])[0, 4:]
        one = cached_logits(model, tokens, 5, 1)
        assert_no_worse_than_torch(one.to(dtype), plain, exact, what="generate.logits")
        assert_same_bits([cached_logits(model, tokens, 5, 4)], [one], what="four positions in one step")


@pytest.mark.parametrize("wrong", ["position", "slot", "key of its own"])
def test_a_wrong_cache_would_be_noticed(wrong, monkeypatch):
    """The inverse: each of what a decode step may get wrong breaks the rule."""
    model = random_model(PHI_2)
    tokens = torch.tensor(prompts_of(PHI_2, 33)[0])
    with torch.no_grad():
        plain, exact = model(tokens[None])[0, 4:], random_model(PHI_2).double()(tokens[None])[0, 4:]
    decode = Phi.decode

    def mistaken(self, tokens, cache, positions, slots):
        if wrong == "position":
            return decode(self, tokens, cache, positions - 1, slots)
        if wrong == "slot":
            if positions == 5:
                cache.k[:, 0], cache.v[:, 0] = cache.k[:, 1] * 1.01, cache.v[:, 1]
            return decode(self, tokens, cache, positions, slots - 1)
        logits = decode(self, tokens, cache, positions, slots)
        cache.k[:, 1, positions] *= 1.01
        return logits

    monkeypatch.setattr(Phi, "decode", mistaken)
    logits = cached_logits(model, tokens, 5, 1)
    assert logits.isfinite().all()
    assert not compare(logits, plain, exact).passed


def test_logits_bit_for_bit_beside_anything():
    """A row alone, last of four, and in another slot; the same bits with one token changed do not come."""
    model = random_model(PHI_2)
    needle, *others = prompts_of(PHI_2, 20, 50, 2, 31)

    def run(prompts: list[list[int]], row: int) -> torch.Tensor:
        cache = KVCache.allocate(PHI_2, len(prompts), PHI_2.context, dtype=torch.float32)
        slots = torch.arange(len(prompts)).flip(0)
        logits = []
        for i, prompt in enumerate(prompts):
            first = model.prefill(torch.tensor([prompt]), cache.rows(int(slots[i]), int(slots[i]) + 1))
            logits += [first] if i == row else []
        for step in range(6):
            tokens = torch.tensor([(7 * step + i * (i != row)) % PHI_2.vocab for i in range(len(prompts))])
            positions = torch.tensor([len(prompt) + step for prompt in prompts])
            logits.append(model.decode(tokens, cache, positions, slots)[row : row + 1])
        return torch.cat(logits)

    alone = run([needle], 0)
    assert_same_bits([run([*others, needle], 3)], [alone], what="last of four")
    assert_same_bits([run([others[0], needle, others[1]], 1)], [alone], what="between others")
    with pytest.raises(AssertionError, match="differs in"):
        assert_same_bits([run([[*needle[:-1], (needle[-1] + 1) % PHI_2.vocab]], 0)], [alone], what="another prompt")
