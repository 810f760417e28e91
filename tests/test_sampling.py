"""The samplers against transformers', the draw against its distribution, and the keys that a draw depends on."""

import itertools
import math

import numpy as np
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

from tests.chi_square import assert_distributed
from xiangxin_fast import sampling as sampling_file
from xiangxin_fast.errors import InputError
from xiangxin_fast.sampling import (
    Sampling,
    choose,
    draw_key,
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


def processed(values: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    return process(values, sampling, sampling.numbers(), seen)


def draw(values: torch.Tensor, sampling: Sampling, draws: list[tuple[int, int]]) -> torch.Tensor:
    """One token for each row of processed logits; draws: (sample, step) of each."""
    keys = torch.tensor([draw_key(sampling.seed, (), sample) for sample, _ in draws])
    return choose(values, sampling, keys, torch.tensor([step for _, step in draws]))


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

    def test_top_p_is_the_same_in_any_order_of_addition(self, monkeypatch):
        """That of a GPU depends on the rows beside. Each p here is a border in the order of a CPU."""
        values = logits(1, seed=2)
        borders = values.sort().values.softmax(-1).cumsum(-1)[0, ::7].tolist()
        expected, plain = [keep_top_p(values, 1 - border) for border in borders], torch.Tensor.cumsum
        monkeypatch.setattr(torch.Tensor, "cumsum", lambda t, dim: t.sum(dim) - plain(t.flip(dim), dim).flip(dim) + t)
        for border, kept in zip(borders, expected, strict=True):
            assert torch.equal(keep_top_p(values, 1 - border), kept)

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
        actual = processed(values, Sampling(**options), seen[:3])
        assert torch.equal(actual.isneginf(), expected.isneginf())
        torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-9)


class TestNoise:
    def test_is_the_hash_in_whole_numbers(self):
        """int64 tensors wrap around as Python's numbers do modulo 2^64, and both shift arithmetically."""

        def signed(x: int) -> int:
            return (x + 2**63) % 2**64 - 2**63

        def expected(key: int, step: int, token: int) -> float:
            x = signed(key + step * 0x9E3779B97F4A7C15 + token * 0xD1B54A32D192ED03)
            x = signed((x ^ x >> 30) * 0xBF58476D1CE4E5B9)
            x = signed((x ^ x >> 27) * 0x94D049BB133111EB)
            return -math.log(-math.log(x * (2.0**-64 * (1 - 2.0**-52)) + 0.5))

        keys, steps = [draw_key(5, (), 0), draw_key(2**64 - 1, [7] * 2048, 10**6), 2**63 - 1], [0, 2047, 3]
        actual = gumbel(torch.tensor(keys), torch.tensor(steps), 300)
        for row in range(3):
            wanted = [expected(keys[row], steps[row], token) for token in range(300)]
            torch.testing.assert_close(actual[row], torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)

    def test_is_finite_at_the_largest_and_the_smallest_hash(self, monkeypatch):
        """An infinite one, added to the -inf of a removed token, would be NaN, which argmax takes."""
        largest = 2**63 - 1
        for shift in (27, 30):  # undone
            y = largest
            for _ in range(3):
                largest = y ^ largest >> shift
        monkeypatch.setattr(sampling_file, "_MIX_1", 1)
        for sign, expected in ((1, -math.log(2.0**-53)), (-1, -math.log(53 * math.log(2)))):
            monkeypatch.setattr(sampling_file, "_MIX_2", sign)
            noise = gumbel(torch.tensor([largest]), torch.tensor([0]), 1).item()
            assert abs(noise - expected) < 1e-6

    @pytest.mark.parametrize("along", ["tokens", "steps", "samples", "seeds", "prompts"])
    def test_uniform_and_no_neighbour_tells_of_the_next(self, along):
        """exp(-exp(-noise)) in the order of one of the counters: values in 256 bins, successive pairs in 16 x 16; and
        its bits further behind, which a weak finaliser leaves in order.
        """
        n = 65_536
        zeros, counter = torch.zeros(n, dtype=torch.int64), torch.arange(n)
        if along == "tokens":
            noise = gumbel(torch.tensor([draw_key(0, (), 0)]), zeros[:1], n)[0]
        elif along == "steps":
            noise = gumbel(zeros + draw_key(0, (), 0), counter, 1)[:, 0]
        else:
            key_of = {
                "samples": lambda i: draw_key(0, [5], i),
                "seeds": lambda i: draw_key(i, [5], 0),
                "prompts": lambda i: draw_key(0, [i], 0),
            }
            keys = list(map(key_of[along], range(n)))
            noise = gumbel(torch.tensor(keys), zeros, 1)[:, 0]
        uniform = (-(-noise).exp()).exp()
        for digits in (uniform, uniform * 2**12 % 1, uniform * 2**24 % 1):
            assert_distributed(torch.bincount((digits * 256).long(), minlength=256), torch.full((256,), n / 256))
            coarse = (digits * 16).long()
            pairs = coarse[:-1] * 16 + coarse[1:]
            assert_distributed(torch.bincount(pairs, minlength=256), torch.full((256,), (n - 1) / 256))

    def test_every_bit_of_the_input_moves_every_bit_that_decides(self):
        """Avalanche: each of the first 32 bits of the result flips half the time, whichever bit of the key does."""
        n = 4000
        keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(0))

        def bits(keys: torch.Tensor) -> torch.Tensor:
            uniform = (-(-gumbel(keys, torch.zeros_like(keys), 1)).exp()).exp()
            return (uniform * 2**32).long() >> torch.arange(32) & 1

        before = bits(keys)
        for bit in range(64):
            flipped = (before ^ bits(keys ^ (1 << bit if bit < 63 else -(2**63)))).double().mean(0)
            assert (flipped - 0.5).abs().max() < 0.05, bit  # 6 standard deviations

    def test_keys_of_different_samples_seeds_and_prompts_differ(self):
        prompts = ([], [1], [11], [1, 1], [1, 11], [11, 1])
        keys = {draw_key(*of) for of in itertools.product(range(40), prompts, range(40))}
        assert len(keys) == 40 * len(prompts) * 40

    def test_a_key_is_of_the_ids_whatever_holds_them(self):
        assert draw_key(1, torch.tensor([3, 5]), 0) == draw_key(1, np.array([3, 5]), 0) == draw_key(1, (3, 5), 0)

    def test_counters_do_not_meet_within_a_sample(self):
        """No two (step, token) of a context of 2048 and a vocabulary of 51,200 are the same hash input."""
        steps = torch.arange(-2047, 2048) * sampling_file._STEP
        tokens = torch.arange(-51_199, 51_200) * sampling_file._TOKEN
        assert steps[torch.isin(steps, tokens)].tolist() == [0]

    @pytest.mark.gpu
    def test_is_the_same_on_a_gpu(self):
        """But for two logarithms: libraries may round each 2 eps of its value apart, and the first moves the second."""
        keys, steps = torch.tensor([draw_key(0, (), i) for i in range(8)]), torch.arange(8)
        apart = 4 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(
            gumbel(keys.cuda(), steps.cuda(), 5000).cpu(), gumbel(keys, steps, 5000), rtol=apart, atol=apart
        )


class TestDraw:
    def test_frequencies_are_the_probabilities(self):
        V, n = 50, 20_000
        sampling = Sampling(top_k=20, seed=7)
        values = processed(logits(2, V, seed=3)[:1], sampling)
        expected = values.softmax(-1)[0] * n
        assert (expected > 0).sum() == 20
        drawn = draw(values.expand(n, V), sampling, [(i // 100, i % 100) for i in range(n)])
        assert_distributed(torch.bincount(drawn, minlength=V), expected)

    def test_steps_and_samples_are_independent_draws(self):
        """Successive steps of a sample, and one step of successive samples, give pairs as likely as their parts."""
        V, n = 4, 20_000
        values = processed(logits(2, V, seed=3)[:1], Sampling())
        probabilities = values.softmax(-1)[0].double()
        for draws in ([(0, i) for i in range(n)], [(i, 0) for i in range(n)]):
            drawn = draw(values.expand(n, V), Sampling(), draws)
            pairs = torch.bincount(drawn[:-1] * V + drawn[1:], minlength=V * V)
            assert_distributed(pairs, torch.outer(probabilities, probabilities) * (n - 1))

    def test_depends_on_seed_sample_and_step_alone(self):
        values, draws = processed(logits(), Sampling(seed=5)), [(0, 3), (1, 0), (7, 2), (0, 4)]
        together = draw(values, Sampling(seed=5), draws)
        for row, of_row in enumerate(draws):
            assert draw(values[row : row + 1], Sampling(seed=5), [of_row]).item() == together[row].item()
        assert not torch.equal(together, draw(values, Sampling(seed=6), draws))

    def test_removed_tokens_are_never_drawn(self):
        values = torch.full((2000, 500), -math.inf)
        values[:, 3] = 1.0
        assert draw(values, Sampling(), [(i, 0) for i in range(2000)]).unique().tolist() == [3]

    @pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4])
    def test_small_temperatures_end_in_the_greedy_choice(self, temperature):
        values = logits()[:3] * 1e4
        sampling = Sampling(temperature=temperature, top_k=50, top_p=0.9, min_p=0.1)
        assert torch.equal(draw(processed(values, sampling), sampling, [(0, 0)] * 3), values.argmax(-1))

    def test_greedy_takes_the_first_of_equals(self):
        values = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        greedy = Sampling(temperature=0)
        assert draw(processed(values, greedy), greedy, [(0, 0)]).tolist() == [1]


def test_samplings_of_a_kind_run_the_same_operations_and_others_do_not():
    """A captured graph serves all Samplings of its kind: their values come from device memory."""
    base = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
    others = {"temperature": 1.3, "top_p": 0.5, "min_p": 0.3, "repetition_penalty": 2.0}
    seen = torch.zeros(4, 500, dtype=torch.bool).index_fill_(1, torch.arange(50), True)
    one, other = Sampling(**base), Sampling(**base | others, seed=9)
    assert one.kind == other.kind
    captured = process(logits(), one, other.numbers(), seen)
    assert torch.equal(captured, processed(logits(), other, seen))
    assert not torch.equal(captured, processed(logits(), one, seen))
    neutral = {"temperature": 0.0, "top_k": 41, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    kinds = {one.kind} | {Sampling(**base | {name: value}).kind for name, value in neutral.items()}
    assert len(kinds) == 6


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
