"""The generator against transformers' `generate`, and samples that must not touch each other."""

import dataclasses
import math
import re

import pytest
import torch

import xiangxin_fast.generator as generator_module
from tests.hf import fuse, oracle, random_model
from tests.numerics import assert_no_worse_than_torch
from tests.op_contract import assert_same_bits
from xiangxin_fast.config import PhiConfig
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cached_logits_at_every_position(self, dtype):
        """Prefill in pieces and decode steps against the whole sequence at once, by the numerics rule."""
        model = random_model(PHI_2, dtype)
        tokens = torch.tensor(prompts_of(PHI_2, PHI_2.context))
        with torch.no_grad():
            exact, plain = random_model(PHI_2).to(dtype).double()(tokens), model(tokens)
        cache = KVCache.allocate(PHI_2, 1, PHI_2.context, dtype=dtype)
        logits = [model.prefill(tokens[:, :5], cache), model.prefill(tokens[:, 5:9], cache, 5)]
        for t in range(9, PHI_2.context):
            logits.append(model.decode(tokens[:, t], cache, torch.tensor([t])))
        rows = [4, *range(8, PHI_2.context)]
        assert_no_worse_than_torch(torch.stack(logits, 1), plain[:, rows], exact[:, rows], what="generate.logits")


class TestSamplesDoNotTouchEachOther:
    OPTIONS = ({"temperature": 0}, {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.2, "seed": 3})

    @pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled"])
    @pytest.mark.parametrize("rows", [2, 8])
    def test_each_prompt_gets_what_it_gets_alone(self, model, options, rows):
        """They end at different steps: with two rows most join late, and all change places while they run."""
        prompts = prompts_of(PHI_2, 3, 12, 1, 9, 7)
        together = Generator(model, rows=rows).generate(prompts, max_length=14, **options)
        for i, prompt in enumerate(prompts):
            # Others that end at once stand before it, so that it has the same index.
            alone = Generator(model, rows=1).generate([*[[0]] * i, prompt], max_length=14, **options)
            assert together[i] == alone[i]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_logits_bit_for_bit(self, dtype):
        """Other rows hold other prompts, then NaN: the bits stay. The same bits with one token changed do not."""
        model = random_model(PHI_2, dtype)
        needle, *others = prompts_of(PHI_2, 20, 50, 2, 31)

        def run(prompts: list[list[int]], row: int, poison: float | None = None) -> torch.Tensor:
            cache = KVCache.allocate(PHI_2, len(prompts), PHI_2.context, dtype=dtype)
            if poison is not None:
                cache.k.fill_(poison), cache.v.fill_(poison)
            logits = []
            for i, prompt in enumerate(prompts):
                first = model.prefill(torch.tensor([prompt]), cache.rows(i, i + 1))
                logits += [first] if i == row else []
            for step in range(6):
                tokens = torch.tensor([(7 * step + i * (i != row)) % PHI_2.vocab for i in range(len(prompts))])
                positions = torch.tensor([len(prompt) + step for prompt in prompts])
                logits.append(model.decode(tokens, cache, positions)[row : row + 1])
            return torch.cat(logits)

        alone = run([needle], 0)
        assert_same_bits([run([*others, needle], 3)], [alone], what="last of four")
        assert_same_bits([run([others[0], needle, others[1]], 1, math.nan)], [alone], what="beside NaN")
        changed = [*needle[:-1], (needle[-1] + 1) % PHI_2.vocab]
        with pytest.raises(AssertionError, match="differs in"):
            assert_same_bits([run([changed], 0)], [alone], what="another prompt")

    def test_batched_products_would_fail_that_test(self, model, monkeypatch):
        """The inverse: with torch's own product over all rows, a row's bits do depend on its neighbours."""
        monkeypatch.setattr("xiangxin_kernels.decode.linear_rows", torch.nn.functional.linear)
        prompts = prompts_of(PHI_2, 20, 50, 2, 31)
        cache = KVCache.allocate(PHI_2, 4, PHI_2.context, dtype=torch.float32)
        for i, prompt in enumerate(prompts):
            model.prefill(torch.tensor([prompt]), cache.rows(i, i + 1))
        tokens, positions = torch.arange(4), torch.tensor([len(prompt) for prompt in prompts])
        together = model.decode(tokens, cache, positions)
        alone = model.decode(tokens[:1], cache.rows(0, 1), positions[:1])
        assert not torch.equal(together[:1], alone)

    def test_equal_prompts_are_prefilled_once_and_give_the_same(self, model, monkeypatch):
        prompt = prompts_of(PHI_2, 30)[0]
        lengths = []
        prefill = Phi.prefill
        monkeypatch.setattr(Phi, "prefill", lambda *a, **k: lengths.append(a[1].shape[1]) or prefill(*a, **k))
        together = Generator(model).generate([prompt, prompt, prompt], max_new_tokens=8, seed=1)
        assert lengths == [30]
        monkeypatch.undo()
        apart = Generator(model, rows=1).generate([prompt, prompt, prompt], max_new_tokens=8, seed=1)
        assert together == apart
        assert together[0] != together[1]

    def test_prompts_longer_than_a_chunk(self, model, monkeypatch):
        prompts = prompts_of(PHI_2, 33)
        expected = Generator(model).generate(prompts, max_new_tokens=10, temperature=0)
        monkeypatch.setattr(generator_module, "PREFILL_CHUNK", 8)
        assert Generator(model).generate(prompts, max_new_tokens=10, temperature=0) == expected


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
    def test_a_step_leaves_nothing_behind(self, model):
        """The cache's tensors stay where they are, and a step keeps nothing of what it allocates."""
        cache = KVCache.allocate(PHI_2, 1, PHI_2.context, dtype=torch.float32)
        before = cache.k.data_ptr(), cache.v.data_ptr()

        def kept(position: int) -> int:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
                model.decode(torch.tensor([1]), cache, torch.tensor([position]))
            assert any(event.self_cpu_memory_usage > 0 for event in run.events())
            return sum(event.self_cpu_memory_usage for event in run.events())

        cache.k.zero_(), cache.v.zero_()
        kept(0)  # the rotary tables
        assert [kept(position) for position in (1, 30, 60)] == [0, 0, 0]
        assert (cache.k.data_ptr(), cache.v.data_ptr()) == before


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
