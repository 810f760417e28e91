"""Drafts, and that verifying them changes neither completions nor their distribution."""

import itertools

import pytest
import torch

from tests.chi_square import assert_distributed
from tests.hf import random_model
from tests.test_generate import PHI_2, prompts_of
from xiangxin_fast import decode_batch
from xiangxin_fast.generator import LAG, Generator
from xiangxin_fast.model import Phi
from xiangxin_fast.prompt_lookup import draft


@pytest.fixture(scope="module")
def model() -> Phi:
    return random_model(PHI_2)


class TestDraft:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ([1, 2, 3, 7, 8, 9, 1, 2, 3], [7, 8, 9, 1]),
            ([5, 2, 3, 7, 1, 2, 3, 8, 8, 1, 2, 3], [8, 8, 1, 2]),  # the latest of two as long
            ([1, 2, 3, 7, 9, 2, 3, 8, 9, 1, 2, 3], [7, 9, 2, 3]),  # an earlier one, for it is longer
            ([1, 2, 1, 3, 1], [3, 1, 3, 1]),  # one token, and its period goes on
            ([4, 4], [4, 4, 4, 4]),
            ([1, 5, 1, 6, 2, 1], [6, 2, 1, 6]),  # before the first token there is none, nor what stands beyond the end
            ([1, 2, 3], None),
            ([3], None),
        ],
    )
    def test_is_what_followed_the_last_tokens_before(self, text, expected):
        for beyond in {0, *text}:
            drafts, found = draft(torch.tensor([text + 4 * [beyond]]), torch.tensor([len(text)]), 4)
            assert found.tolist() == [expected is not None]
            if expected:
                assert drafts.tolist() == [expected]

    def test_rows_are_drafted_apart(self):
        history = torch.tensor([[1, 2, 1, 0], [3, 3, 1, 0], [1, 2, 3, 0]])
        drafts, found = draft(history, torch.tensor([3, 2, 3]), 2)
        assert found.tolist() == [True, True, False]
        assert drafts[:2].tolist() == [[2, 1], [3, 3]]


# A repeated passage, so that drafts are tried, and what a random model makes of it, so that many are wrong.
PROMPTS = [passage * 3 for passage in prompts_of(PHI_2, 5, 9, 2, 7)]
OPTIONS = {
    "greedy": {"temperature": 0},
    "greedy with a penalty": {"temperature": 0, "repetition_penalty": 1.05},
    "sampled": {"top_k": 3, "temperature": 0.5, "seed": 2},
    "sampled with everything": {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.02, "seed": 3},
}


@pytest.mark.parametrize("lookup", [1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_completions_are_the_same_bit_for_bit(model, options, lookup):
    """Log-probabilities included: draws are keyed by sample and step, so an accepted token is the one drawn there."""
    expected = Generator(model).complete(PROMPTS, max_length=50, **options)
    stream = Generator(model, rows=3).stream(PROMPTS, max_length=50, lookup=lookup, **options)
    steps = list(stream)
    for sample, completion in enumerate(expected):
        of = [step for step in steps if step.sample == sample]
        assert [step.token for step in of] == completion.tokens
        assert [step.logprob for step in of] == completion.logprobs
        assert of[-1].finish_reason == completion.finish_reason
    assert 0 < stream.accepted < stream.drafted


def test_the_distribution_is_the_models(model):
    """Chi-square of three tokens of four ids: the later two are verified drafts, or what took a wrong one's place."""
    prompt, ids, samples = [0, 1, 2, 3, 1, 0], 4, 800
    stream = Generator(model, valid_ids=ids).stream([prompt] * samples, max_new_tokens=3, lookup=2, seed=11)
    drawn: list[list[int]] = [[] for _ in range(samples)]
    for step in stream:
        drawn[step.sample].append(step.token)
    assert samples / 10 < stream.accepted < stream.drafted

    texts = list(itertools.product(range(ids), repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text] for text in texts]))[:, len(prompt) - 1 : -1, :ids]
    probabilities = logits.softmax(-1).gather(2, torch.tensor(texts)[:, :, None]).prod(1)[:, 0]
    counts = torch.tensor([drawn.count(list(text)) for text in texts])
    assert_distributed(counts, probabilities * samples)


def test_a_draft_taken_for_true_would_be_noticed(model, monkeypatch):
    """The inverse: drafts that nobody verified make other completions."""
    expected = Generator(model).generate(PROMPTS, max_length=50, temperature=0)
    emit = decode_batch.DecodeBatch._emit

    def believing(batch, rows, logits, tokens, repeated, drafted):
        forced = torch.full_like(logits, -1e9)
        following = torch.cat([tokens[:, 1:], logits.argmax(-1).view(tokens.shape)[:, -1:]], 1)
        return emit(batch, rows, forced.scatter_(1, following.flatten()[:, None], 1.0), tokens, repeated, drafted)

    monkeypatch.setattr(decode_batch.DecodeBatch, "_emit", believing)
    assert Generator(model).generate(PROMPTS, max_length=50, temperature=0, lookup=3) != expected


def test_nothing_found_is_nothing_drafted(model):
    prompt = [1, 2, 3]
    new = Generator(model).generate([prompt], max_new_tokens=3, temperature=0)[0]
    assert len({*prompt, *new[:2]}) == 5
    stream = Generator(model).stream([prompt], max_new_tokens=3, temperature=0, lookup=4)
    assert [step.token for step in stream] == new
    assert (stream.drafted, stream.accepted) == (0, 0)


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize(("limit", "lookup"), [*itertools.product([16, 17, 18, 19, 64], [1, 4])])
def test_drafts_past_the_end_are_not_run(limit, lookup, lag, monkeypatch):
    """A loop, where every draft is right: the last step has fewer places than drafts, and what a host that runs ahead
    launches after it has none, at the context's end too.
    """
    monkeypatch.setitem(LAG, "cpu", lag)
    model = random_model(PHI_2)
    with torch.no_grad():
        model.head_w.zero_(), model.head_b.zero_()
        model.head_b[7] = 1.0
    stream = Generator(model).stream([[7] * 15], max_length=limit, temperature=0, lookup=lookup)
    steps = list(stream)
    assert [step.token for step in steps] == [7] * (limit - 15)
    assert steps[-1].finish_reason == ("context" if limit == 64 else "length")
    assert stream.drafted == stream.accepted == limit - 15 - 1 - -(-(limit - 16) // (1 + lookup))


def test_what_a_step_has_after_an_end_is_thrown_away():
    """Stopped among tokens of one step, all of them right drafts."""
    model = random_model(PHI_2)
    with torch.no_grad():
        model.head_w.zero_(), model.head_b.zero_()
        model.head_b[7] = 1.0
    stream = Generator(model).stream([[7] * 15], temperature=0, lookup=4)
    tokens = []
    for step in stream:
        tokens.append(step.token)
        if len(tokens) == 3:
            stream.stop(0)
    assert tokens == [7] * 3
