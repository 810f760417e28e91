"""The generator against transformers' `generate`, and samples that must not touch each other."""

import dataclasses
import math
import re

import pytest
import torch
from xiangxin_kernels import layer_norm

import xiangxin_fast.generator as generator_module
import xiangxin_fast.kv_cache as cache_module
import xiangxin_fast.model as model_module
from bench.numerics import ulp
from tests.hf import fuse, oracle, random_model
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.decode_batch import PREFILL_CHUNK
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.kv_cache import KVCache
from xiangxin_fast.model import Phi

PHI_2 = PhiConfig(vocab=131, channels=160, layers=3, heads=2, rotary_dim=32, mlp_hidden=500, context=64)
PHI_1_5 = PhiConfig(vocab=97, channels=128, layers=2, heads=2, rotary_dim=32, mlp_hidden=512, context=48)
TIED = PhiConfig(
    vocab=113, channels=192, layers=2, heads=2, rotary_dim=24, mlp_hidden=300, context=40, tied_head=True, eos_id=5
)


def prompts_of(config: PhiConfig, *lengths: int, seed: int = 0) -> list[list[int]]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab, (length,), generator=noise).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model() -> Phi:
    return random_model(PHI_2)


class TestAgainstTransformers:
    @pytest.mark.parametrize(
        ("config", "penalty"),
        [(PHI_2, 1.0), (PHI_1_5, 1.0), (TIED, 1.0), (TIED, 1.3)],
        ids=["phi-2", "phi-1.5", "tied, with an end of text", "tied, with a penalty"],
    )
    def test_greedy_token_for_token_to_the_contexts_end(self, config, penalty):
        hf = oracle(config)
        ours = Generator(fuse(config, hf.state_dict()))
        prompts = prompts_of(config, 1, 7, 20)
        completions = ours.complete(prompts, temperature=0, repetition_penalty=penalty)
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.tensor([prompt])
            expected = hf.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_length=config.context,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=config.eos_id,
                pad_token_id=0,
            )
            assert completion.tokens == expected[0, len(prompt) :].tolist()
            ended_early = completion.tokens[-1] == config.eos_id
            assert completion.finish_reason == ("stop" if ended_early else "context")

    def test_greedy_in_bf16_parts_only_where_rounding_decides(self):
        """Token for token until the choices differ; there, each is in the other's top 2, and not below the other's own
        choice by more than both may err: twice what the numerics rule allows, from fp64.
        """
        hf = oracle(PHI_2).bfloat16()
        model = fuse(PHI_2, hf.state_dict())
        exact = fuse(PHI_2, hf.state_dict()).double()
        parted = 0
        for prompt in prompts_of(PHI_2, *range(1, 9), seed=1):
            ours = Generator(model).generate([prompt], temperature=0, stop_ids=())[0]
            tokens = torch.tensor([prompt])
            options = {"max_length": PHI_2.context, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            theirs = hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()
            assert len(ours) == len(theirs)
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
            if at is None:
                continue
            parted += 1
            before = torch.tensor([prompt + ours[:at]])
            with torch.no_grad():
                logits = [compute(before)[0, -1].double() for compute in (model, lambda t: hf(t).logits, exact)]
            for values, other in ((logits[0], theirs[at]), (logits[1], ours[at])):
                assert other in values.topk(2).indices
            plain_error = float((logits[1] - logits[2]).abs().max())
            allowed = 2 * (2 * plain_error + ulp(torch.bfloat16, float(logits[2].abs().max())))
            assert abs(float(logits[2][ours[at]] - logits[2][theirs[at]])) <= allowed
        assert 0 < parted < 8


class TestSamplesDoNotTouchEachOther:
    OPTIONS = ({"temperature": 0}, {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.2, "seed": 3})

    @pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled"])
    @pytest.mark.parametrize("rows", [2, 8])
    def test_each_prompt_gets_what_it_gets_alone(self, model, options, rows):
        """They end at different steps: with two rows most join late, and all change places while they run."""
        prompts = prompts_of(PHI_2, 3, 12, 1, 9, 7)
        together = Generator(model, rows=rows).generate(prompts, max_length=14, **options)
        for i, prompt in enumerate(prompts):
            assert Generator(model, rows=1).generate([prompt], max_length=14, **options) == [together[i]]

    def test_a_prompt_given_several_times_gets_the_samples_it_gets_alone(self, model):
        first, second = prompts_of(PHI_2, 5, 5)
        options = {"max_new_tokens": 8, "seed": 1}
        alone = [Generator(model).generate([prompt] * 3, **options) for prompt in (first, second)]
        together = Generator(model, rows=2).generate([first, second, tuple(first), first, second], **options)
        assert [together[i] for i in (0, 2, 3)] == alone[0]
        assert [together[i] for i in (1, 4)] == alone[1][:2]
        assert len({tuple(tokens) for tokens in [*alone[0], *alone[1]]}) == 6

    def test_different_prompts_do_not_draw_the_same_noise(self, model):
        """With a temperature that leaves noise alone, one key for all would give all of them the same tokens."""
        drawn = Generator(model).generate(prompts_of(PHI_2, 3, 12, 1, 9), temperature=1e6, max_new_tokens=8)
        assert len({tuple(tokens) for tokens in drawn}) == 4

    @pytest.mark.parametrize("poison", [math.nan, 1e30])
    def test_unused_cache_may_hold_anything(self, model, poison):
        prompts, options = prompts_of(PHI_2, 3, 12, 1), {"max_length": 30, "seed": 3, "lookup": 2}
        expected = Generator(model).complete(prompts, **options)
        generator = Generator(model)
        generator.generate(prompts, **options)
        generator._idle.cache.k.fill_(poison), generator._idle.cache.v.fill_(poison)
        assert generator.complete(prompts, **options) == expected

    def test_a_product_of_all_rows_at_once_would_be_noticed(self, model, monkeypatch):
        """The inverse: torch's own product sums in another order with more rows, and so do log-probabilities differ."""

        def batched(x, ln_w, ln_b, head_w, head_b, eps):
            return torch.nn.functional.linear(layer_norm(x, ln_w, ln_b, eps), head_w, head_b)

        prompts = prompts_of(PHI_2, 3, 12, 1, 9)
        for patched in (False, True):
            if patched:
                monkeypatch.setattr(model_module, "decode_head", batched)
            together = Generator(model).complete(prompts, temperature=0, max_new_tokens=12)
            alone = [Generator(model).complete([prompt], temperature=0, max_new_tokens=12)[0] for prompt in prompts]
            assert (together != alone) == patched

    def test_prompts_longer_than_a_chunk(self, model, monkeypatch):
        prompts = prompts_of(PHI_2, 33)
        expected = Generator(model).generate(prompts, max_new_tokens=10, temperature=0)
        monkeypatch.setitem(PREFILL_CHUNK, "cpu", 8)
        assert Generator(model).generate(prompts, max_new_tokens=10, temperature=0) == expected

    @pytest.mark.parametrize("lag", [1, 2, 5])
    def test_the_host_may_run_ahead(self, model, monkeypatch, lag):
        """Ends are then learnt late, and what came after them is thrown away."""
        prompts = prompts_of(PHI_2, 3, 12, 1, 9, 7)
        stop = Generator(model).generate(prompts, seed=3, max_length=14)[1][1]
        options = {"seed": 3, "max_length": 14, "stop_ids": [stop], "repetition_penalty": 1.1}
        expected = Generator(model, rows=2).complete(prompts, **options)
        assert {completion.finish_reason for completion in expected} == {"stop", "length"}
        monkeypatch.setitem(generator_module.LAG, "cpu", lag)
        for lookup in (0, 3):
            assert Generator(model, rows=2).complete(prompts, lookup=lookup, **options) == expected


class TestPrefixes:
    """Prompts that begin alike share whole chunks of their prefill, bit for bit."""

    @pytest.fixture
    def prefilled(self, monkeypatch) -> list[tuple[int, int]]:
        """(position, tokens) of every prefill, in chunks of 8."""
        calls, prefill = [], Phi.prefill

        def recorded(model, tokens, cache, q_start=0):
            calls.append((q_start, tokens.shape[1]))
            return prefill(model, tokens, cache, q_start)

        monkeypatch.setattr(Phi, "prefill", recorded)
        monkeypatch.setitem(PREFILL_CHUNK, "cpu", 8)
        return calls

    def test_equal_prompts_are_prefilled_once(self, model, prefilled, monkeypatch):
        prompt = prompts_of(PHI_2, 30)[0]
        together = Generator(model).complete([prompt, prompt, prompt], max_new_tokens=8, seed=1)
        assert prefilled == [(0, 8), (8, 8), (16, 8), (24, 6)]
        monkeypatch.setattr(generator_module._Prefilled, "shared", lambda *_: 0)
        assert Generator(model).complete([prompt, prompt, prompt], max_new_tokens=8, seed=1) == together
        assert together[0].tokens != together[1].tokens

    @pytest.mark.parametrize(
        ("length", "same", "expected"),
        [
            (30, 20, [(16, 8), (24, 6)]),
            (30, 16, [(16, 8), (24, 6)]),
            (30, 15, [(8, 8), (16, 8), (24, 6)]),
            (30, 7, [(0, 8), (8, 8), (16, 8), (24, 6)]),
            (20, 20, [(16, 4)]),  # all of it is there, but not the logits of its end
            (16, 16, [(8, 8)]),
            (40, 30, [(24, 8), (32, 8)]),  # the other's last chunk was not a whole one
        ],
    )
    @pytest.mark.parametrize("rows", [1, 2])
    def test_whole_chunks_are_shared(self, model, prefilled, rows, length, same, expected):
        """With one row the other has ended before, and its place is taken."""
        first, tail = prompts_of(PHI_2, 30, 40)
        tail[same] = (first[same] + 1) % PHI_2.vocab if same < 30 else tail[same]
        second = [*first[:same], *tail[same:length]]
        (alone,) = Generator(model).complete([second], max_new_tokens=8, seed=1)
        prefilled.clear()
        together = Generator(model, rows=rows).complete([first, second], max_new_tokens=8, seed=1)
        assert prefilled[4:] == expected
        assert together[1] == alone

    def test_what_has_been_overwritten_is_not_shared(self, model, prefilled):
        prompt, other = prompts_of(PHI_2, 20, 20)
        Generator(model, rows=1).generate([prompt, other, prompt], max_new_tokens=2)
        assert prefilled == 3 * [(0, 8), (8, 8), (16, 4)]

    def test_nothing_is_shared_across_calls(self, prefilled):
        """The weights may have changed, and nobody tells."""
        model = random_model(PHI_2)
        generator, prompt = Generator(model), prompts_of(PHI_2, 20)[0]
        generator.generate([prompt], temperature=0, max_new_tokens=5)
        with torch.no_grad():
            model.blocks[0].w_in.mul_(1.5)
        changed = generator.generate([prompt], temperature=0, max_new_tokens=5)
        assert changed == Generator(model).generate([prompt], temperature=0, max_new_tokens=5)
        assert prefilled == 3 * [(0, 8), (8, 8), (16, 4)]


class TestEnds:
    def test_reasons(self, model):
        prompt = prompts_of(PHI_2, 10)[0]
        tokens = Generator(model).generate([prompt], max_new_tokens=20, temperature=0)[0]
        stop = next(token for token in tokens if token != tokens[0])
        cases = {
            "stop": {"stop_ids": [stop]},
            "length": {"max_new_tokens": 4},
            "context": {},
        }
        for reason, options in cases.items():
            completion = Generator(model).complete([prompt], temperature=0, **options)[0]
            assert completion.finish_reason == reason
            ends = {"stop": tokens.index(stop) + 1, "length": 4, "context": PHI_2.context - 10}
            assert len(completion.tokens) == ends[reason]

    @pytest.mark.parametrize(("limits", "expected"), [((4, 30), 4), ((30, 14), 4), ((None, 14), 4), ((4, None), 4)])
    def test_the_nearer_limit_counts(self, model, limits, expected):
        new, length = limits
        prompt = prompts_of(PHI_2, 10)[0]
        assert len(Generator(model).generate([prompt], max_new_tokens=new, max_length=length)[0]) == expected

    def test_the_last_position_of_the_context_is_used_and_none_after(self, model):
        prompt = prompts_of(PHI_2, PHI_2.context - 1)[0]
        completion = Generator(model).complete([prompt], temperature=0)[0]
        assert (len(completion.tokens), completion.finish_reason) == (1, "context")

    def test_the_models_end_of_text_ends_unless_told_otherwise(self):
        prompt = prompts_of(TIED, 4)[0]
        free = Generator(random_model(TIED)).generate([prompt], seed=1, stop_ids=())[0]
        assert len(free) == TIED.context - 4
        config = dataclasses.replace(TIED, eos_id=free[10])
        ended = Generator(random_model(config)).generate([prompt], seed=1)[0]
        assert ended == free[: free.index(config.eos_id) + 1]

    def test_no_id_without_a_token(self, model):
        tokens = Generator(model, valid_ids=20).generate([[1], [2]], temperature=100.0, seed=2)
        assert max(map(max, tokens)) < 20

    def test_stream_has_the_same_tokens_as_they_come(self, model):
        prompts = prompts_of(PHI_2, 5, 9, 2)
        stream = Generator(model, rows=2).stream(prompts, max_new_tokens=6, seed=4)
        tokens: list[list[int]] = [[], [], []]
        for step in stream:
            assert (step.finish_reason == "length") == (len(tokens[step.sample]) == 5)
            tokens[step.sample].append(step.token)
        assert tokens == Generator(model).generate(prompts, max_new_tokens=6, seed=4)

    def test_a_stopped_sample_gives_no_more_and_the_others_stay(self, model):
        prompts = prompts_of(PHI_2, 5, 9, 2)
        expected = Generator(model).generate(prompts, max_new_tokens=6, seed=4)
        stream = Generator(model, rows=2).stream(prompts, max_new_tokens=6, seed=4)
        tokens: list[list[int]] = [[], [], []]
        for step in stream:
            tokens[step.sample].append(step.token)
            if len(tokens[0]) == 3:
                stream.stop(0)
        assert tokens == [expected[0][:3], *expected[1:]]

    def test_no_prompts(self, model):
        assert Generator(model).generate([]) == []


class TestMemory:
    def test_is_fixed_after_the_first_call(self, model):
        """Later calls, shorter ones and of other kinds too, find what they need, and leave nothing behind."""
        generator, prompts = Generator(model), prompts_of(PHI_2, 20, 3, 9)

        def kept(**options) -> int:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
                generator.generate(prompts, max_new_tokens=4, **options)
            return sum(event.self_cpu_memory_usage for event in run.events())

        assert kept() > 0
        batch = generator._idle
        assert [kept(seed=1), kept(temperature=0), kept(repetition_penalty=1.1, top_p=0.9)] == [0, 0, 0]
        assert generator._idle is batch

    def test_grows_to_what_a_call_needs_and_stays_there(self, model):
        generator = Generator(model, rows=4)
        sizes = []
        for count, length in ((1, 10), (3, 10), (1, 64), (2, 64), (1, 10)):
            generator.generate([[1]] * count, max_length=length)
            sizes.append((generator._idle.slots, generator._idle.cache.positions))
        assert sizes == [(1, 64), *[(3, 64)] * 4]

    def test_calls_at_the_same_time_do_not_share_a_cache(self, model):
        prompts = prompts_of(PHI_2, 5, 9)
        generator = Generator(model)
        expected = [generator.generate([prompt], max_new_tokens=6, temperature=0)[0] for prompt in prompts]
        streams = [generator.stream([prompt], max_new_tokens=6, temperature=0) for prompt in prompts]
        steps = list(zip(*streams, strict=True))
        assert [[step.token for step in of] for of in zip(*steps, strict=True)] == expected

    def test_moved_weights_get_a_new_batch(self):
        model = random_model(PHI_2)
        generator = Generator(model)
        generator.generate([[1]], max_new_tokens=2)
        batch = generator._idle
        model.bfloat16()
        generator.generate([[1]], max_new_tokens=2)
        assert generator._idle is not batch
        assert generator._idle.cache.k.dtype == torch.bfloat16

    def test_too_little_memory_is_told_with_what_would_fit(self, monkeypatch):
        monkeypatch.setattr(cache_module, "free_bytes", lambda device: 10 * 10**9)
        phi_2 = PhiConfig.from_preset("phi-2")
        with pytest.raises(InputError) as error:
            KVCache.allocate(phi_2, 1 << 20, 1 << 20, dtype=torch.bfloat16, weights=5_559_367_680)
        needs = (
            "need 360287970.19 GB, and about 0.00 GB to compute in, beside 5.56 GB of weights, got 10.00 GB free on cpu"
        )
        assert needs in str(error.value)

        def refuse(shape, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(cache_module.torch, "empty", refuse)
        with pytest.raises(InputError) as error:
            KVCache.allocate(phi_2, 32, 2048, dtype=torch.bfloat16)
        assert "need 21.47 GB" in str(error.value)
        assert "14 rows of 2048 tokens or 32 rows of 928 would fit" in str(error.value)
        with pytest.raises(InputError, match=r"about 1\.00 GB to compute in.*13 rows of 2048 tokens or 32 rows of 832"):
            KVCache.allocate(phi_2, 32, 2048, dtype=torch.bfloat16, working=10**9)
        with pytest.raises(InputError, match="nothing of that size would fit"):
            KVCache.allocate(phi_2, 32, 2048, dtype=torch.bfloat16, working=10**10)

    def test_what_one_call_needs_goes_before_what_all_have_needed(self, model, monkeypatch):
        generator = Generator(model, rows=4)
        generator.generate([[1]] * 3, max_length=10)
        allocate = KVCache.allocate

        def at_most_two_rows(config, rows, positions, **options):
            if rows > 2:
                raise InputError("too much")
            return allocate(config, rows, positions, **options)

        monkeypatch.setattr(generator_module, "LEAST_POSITIONS", 64)
        monkeypatch.setattr(KVCache, "allocate", at_most_two_rows)
        generator._idle.cache = KVCache.allocate(PHI_2, 2, 32)  # of too few positions for what comes
        generator.generate([[1]], max_length=64)
        assert generator._idle.slots == 1
        with pytest.raises(InputError, match="too much"):
            generator.generate([[1]] * 3, max_length=64)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: expected at least one token"),
        ([[1, 131]], {}, "prompt 0: expected ids in 0..130, got 131"),
        ([[-1]], {}, "prompt 0: expected ids in 0..130, got -1"),
        ([[1] * 64], {}, "prompt 0: the model's context is 64 tokens and counts the prompt, which has 64"),
        ([[1] * 9], {"max_length": 9}, "prompt 0: max_length is 9 tokens and counts the prompt, which has 9"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([[1]], {"max_length": -1}, "max_length: expected at least 1, got -1"),
        ([[1]], {"temperature": -1}, "temperature: expected"),
        ([[1]], {"lookup": -1}, "lookup: expected 0..31 tokens, got -1"),
        ([[1]], {"lookup": 32}, "lookup: expected 0..31 tokens, got 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(model, prompts, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Generator(model).stream(prompts, **options)


def test_damaged_weights_are_an_error_and_not_a_text():
    model = random_model(PHI_2)
    with torch.no_grad():
        model.head_w[3, 3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        Generator(model).generate([[1, 2, 3]])


@pytest.mark.parametrize("rows", [0, 33])
def test_more_rows_than_a_step_takes_are_refused(model, rows):
    with pytest.raises(InputError, match=f"rows: expected 1..32 samples to decode together, got {rows}"):
        Generator(model, rows=rows)


def test_fp16_and_foreign_devices_are_refused():
    with pytest.raises(InputError, match="expected bf16 or fp32 to compute in, got fp16"):
        Generator(Phi(PHI_2, dtype=torch.float16)).stream([[1]])
    with pytest.raises(InputError, match="expected a model on cuda or cpu, got one on meta"):
        Generator(Phi(PHI_2, device="meta")).stream([[1]])
