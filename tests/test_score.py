"""Scores of given tokens against transformers, window by window."""

import math

import pytest
import torch

from tests.hf import fuse, oracle
from tests.numerics import assert_no_worse_than_torch
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.score import token_logprobs

CONFIG = PhiConfig(vocab=131, channels=160, layers=2, heads=2, rotary_dim=32, mlp_hidden=500, context=24)


@pytest.fixture(scope="module")
def hf():
    return oracle(CONFIG)


@pytest.fixture(scope="module")
def model(hf):
    return fuse(CONFIG, hf.state_dict())


def hf_logprobs(hf, sequences: list[list[int]], valid_ids: int = CONFIG.vocab) -> torch.Tensor:
    """transformers' log-probability of the last token of each sequence given the others, in its dtype."""
    found = []
    for tokens in sequences:
        with torch.no_grad():
            logits = hf(torch.tensor([tokens[:-1]])).logits[0, -1, :valid_ids]
        found.append(logits.log_softmax(-1)[tokens[-1]])
    return torch.stack(found)


def assert_scores(model, hf, tokens: list[int], sequences: list[list[int]], **options) -> None:
    """The scores of `tokens` are those of the last token of each of `sequences`."""
    found = token_logprobs(model, tokens, **options)
    valid_ids = options.get("valid_ids") or CONFIG.vocab
    plain = hf_logprobs(hf, sequences, valid_ids)
    exact = hf_logprobs(oracle(CONFIG).double(), sequences, valid_ids)
    assert found.dtype == torch.float32
    assert_no_worse_than_torch(found, plain, exact, what="score.logprobs")


def draw(length: int, below: int = CONFIG.vocab) -> list[int]:
    return torch.randint(below, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("valid_ids", [None, 100])
def test_each_token_given_all_before_it(hf, model, valid_ids):
    tokens = draw(CONFIG.context + 1, below=100)
    sequences = [tokens[: t + 1] for t in range(1, len(tokens))]
    assert_scores(model, hf, tokens, sequences, valid_ids=valid_ids)


@pytest.mark.parametrize("stride", [1, 7, 24, None])
@pytest.mark.parametrize("length", [26, 37, 60])
def test_longer_than_the_context(hf, model, stride, length):
    """Each token sees what its window holds: the first window that reaches it, with context + 1 - stride or more."""
    tokens, context = draw(length), CONFIG.context
    step = stride or context // 2
    begins = [max(0, math.ceil((t - context) / step)) * step for t in range(1, length)]
    assert all(min(t, context + 1 - step) <= t - begin <= context for t, begin in enumerate(begins, 1))
    assert_scores(model, hf, tokens, [tokens[begin : t + 1] for t, begin in enumerate(begins, 1)], stride=stride)


def test_one_token_has_no_score(model):
    assert token_logprobs(model, [5]).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "expected tokens"),
        ([1, 131], {}, r"expected ids in 0\.\.130, got 1\.\.131"),
        ([-1, 1], {}, r"expected ids in 0\.\.130, got -1\.\.1"),
        ([1, 50], {"valid_ids": 50}, r"expected ids in 0\.\.49"),
        ([1, 2], {"stride": 25}, r"stride: expected a whole number in 1\.\.24 .*, got 25"),
        ([1, 2], {"stride": 0}, "stride: expected"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokens, options, message):
    with pytest.raises(InputError, match=message):
        token_logprobs(model, tokens, **options)
