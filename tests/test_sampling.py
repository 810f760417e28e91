"""The samplers against transformers', the draw against its distribution, and the keys that a draw depends on."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xiangxin_fast.errors import InputError
from xiangxin_fast.sampling import (
    Sampling,
    choose,
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process,
)


def logits(rows: int = 4, V: int = 500, seed: int = 0) -> torch.Tensor:
    """Random logits; the last row is rounded coarsely, so that many tie."""
    values = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3
    values[-1] = values[-1].round()
    return values


NO_IDS = torch.zeros(4, 1, dtype=torch.int64)


class TestAgainstTransformers:
    @pytest.mark.parametrize("k", [1, 2, 50, 499, 500, 1000])
    def test_top_k(self, k):
        assert torch.equal(keep_top_k(logits(), k), TopKLogitsWarper(k)(NO_IDS, logits()))

    @pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
    def test_top_p(self, p):
        actual, expected = keep_top_p(logits(), p), TopPLogitsWarper(p)(NO_IDS, logits())
        assert torch.equal(actual[:3], expected[:3])
        # Which of equals at the border it keeps, transformers leaves to an unstable sort; how many, it does not.
        assert torch.equal(actual[3].sort().values, expected[3].sort().values)

    def test_top_p_keeps_the_higher_ids_of_equals(self):
        kept = keep_top_p(torch.zeros(1, 8), 0.5).isfinite()
        assert kept.tolist() == [[False] * 4 + [True] * 4]

    @pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
    def test_min_p(self, p):
        assert torch.equal(keep_min_p(logits(), p), MinPLogitsWarper(p)(NO_IDS, logits()))

    @pytest.mark.parametrize("penalty", [0.5, 1.3])
    def test_repetition_penalty(self, penalty):
        ids = torch.randint(500, (4, 80), generator=torch.Generator().manual_seed(1))
        seen = torch.zeros(4, 500, dtype=torch.bool).scatter(1, ids, True)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
        assert torch.equal(penalize_repetition(logits(), seen, penalty), expected)

    # Each of these would keep other tokens, or weigh them otherwise, if two neighbours in the order were exchanged.
    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.8, "temperature": 0.6},
            {"temperature": 2.0, "top_p": 0.8},
            {"temperature": 2.0, "min_p": 0.2},
            {"top_k": 40, "top_p": 0.7},
            {"top_p": 0.4, "min_p": 0.3},
            {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 60, "top_p": 0.9, "min_p": 0.05},
        ],
    )
    def test_all_in_order(self, options):
        ids = torch.randint(500, (4, 80), generator=torch.Generator().manual_seed(1))
        seen = torch.zeros(4, 500, dtype=torch.bool).scatter(1, ids, True)
        chain = LogitsProcessorList()
        if "repetition_penalty" in options:
            chain.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
        for name, warper in (
            ("temperature", TemperatureLogitsWarper),
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
        ):
            if name in options:
                chain.append(warper(options[name]))
        values = logits()[:3]  # without the ties: our logits are shifted, which may round a tie at the border otherwise
        expected = chain(ids[:3], values)
        actual = process(values, Sampling(**options), 500, seen[:3])
        assert torch.equal(actual.isneginf(), expected.isneginf())
        torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-9)


class TestDraw:
    def test_frequencies_are_the_probabilities(self):
        """Chi-square of 20,000 draws: a right sampler fails at p = 1e-6, and the seed is fixed."""
        V, n = 50, 20_000
        values = logits(2, V, seed=3)[:1]
        sampling = Sampling(top_k=20, seed=7)
        processed = process(values, sampling, V)
        expected = processed.softmax(-1)[0].double() * n
        drawn = choose(processed.expand(n, V), sampling, [(i // 100, i % 100) for i in range(n)])
        counts = torch.bincount(drawn, minlength=V).double()
        kept = expected > 0
        assert kept.sum() == 20
        assert counts[~kept].sum() == 0
        degrees = int(kept.sum()) - 1
        statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
        # Wilson and Hilferty's normal approximation of the chi-square quantile at 4.75 standard deviations.
        limit = degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3
        assert statistic < limit

    def test_steps_and_samples_are_independent_draws(self):
        """Neighbouring keys give unrelated noise: the correlation of n pairs lies within 5 / sqrt(n)."""
        n = 20_000
        first = gumbel(0, 0, 0, n)
        for other in (gumbel(0, 0, 1, n), gumbel(0, 1, 0, n), gumbel(1, 0, 0, n)):
            correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
            assert abs(float(correlation)) < 5 / math.sqrt(n)

    def test_depends_on_seed_sample_and_step_alone(self):
        processed, draws = process(logits(), Sampling(seed=5), 500), [(0, 3), (1, 0), (7, 2), (0, 4)]
        together = choose(processed, Sampling(seed=5), draws)
        for row, draw in enumerate(draws):
            assert choose(processed[row : row + 1], Sampling(seed=5), [draw]).item() == together[row].item()
        other_seed = choose(processed, Sampling(seed=6), draws)
        assert not torch.equal(together, other_seed)

    def test_removed_tokens_are_never_drawn_even_by_infinite_noise(self, monkeypatch):
        """A zero exponential makes infinite noise, and infinity minus infinity is what argmax would take: NaN."""
        infinite = torch.full((500,), math.inf, dtype=torch.float64)
        infinite[3] = 0.0
        monkeypatch.setattr("xiangxin_fast.sampling.gumbel", lambda *key: infinite)
        values = torch.full((1, 500), -math.inf)
        values[0, 3] = 1.0
        assert choose(values, Sampling(), [(0, 0)]).tolist() == [3]

    @pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
    def test_ids_without_a_token_are_never_chosen(self, temperature):
        values = logits()
        values[:, 400:] = 100.0
        for step in range(20):
            sampling = Sampling(temperature=temperature)
            assert choose(process(values, sampling, 400), sampling, [(row, step) for row in range(4)]).max() < 400

    @pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4])
    def test_small_temperatures_end_in_the_greedy_choice(self, temperature):
        values = logits()[:3] * 1e4
        sampling = Sampling(temperature=temperature, top_k=50, top_p=0.9, min_p=0.1)
        assert torch.equal(choose(process(values, sampling, 500), sampling, [(0, 0)] * 3), values.argmax(-1))

    def test_greedy_takes_the_first_of_equals(self):
        values = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        assert choose(process(values, Sampling(temperature=0), 4), Sampling(temperature=0), [(0, 0)]).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k: expected a whole number >= 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and up to 1, got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number > 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
