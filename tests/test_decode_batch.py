"""The step as a graph: the same tokens as without, fixed memory, and nobody waits for the device.

On a CPU a stand-in replays a step by running it again: all but CUDA's own capture is the code that runs on a GPU.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.hf import random_model
from tests.test_generate import PHI_2, prompts_of
from xiangxin_fast import decode_batch, generator
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.decode_batch import DecodeBatch, Record
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.kv_cache import KVCache
from xiangxin_fast.model import Phi

KINDS = {
    "greedy": {"temperature": 0},
    "penalized": {"temperature": 0, "repetition_penalty": 1.2},
    "sampled": {"seed": 1},
    "with everything": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "temperature": 0.8},
}


@pytest.fixture(scope="module")
def model() -> Phi:
    return random_model(PHI_2)


class _Replayed:
    """Stands for a CUDA graph: no step when it is captured, one into the same result with each replay."""

    def __init__(self, step):
        self._step, self.result, self.replays = step, torch.empty(0, dtype=torch.float64), 0

    def replay(self) -> None:
        values = self._step()
        self.result.resize_(values.shape).copy_(values)
        self.replays += 1

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def captured(monkeypatch) -> list[tuple[_Replayed, str | None]]:
    """The graphs that were captured, with the pool each was given."""
    graphs = []

    def capture(step, pool):
        graph = _Replayed(step)
        graphs.append((graph, pool))
        return graph, graph.result

    monkeypatch.setattr(decode_batch, "CAPTURES", {"cpu"})
    monkeypatch.setattr(decode_batch, "capture", capture)
    monkeypatch.setitem(generator.LAG, "cpu", 1)
    return graphs


class TestGraphs:
    @pytest.mark.parametrize("lookup", [0, 3])
    @pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
    def test_completions_are_those_without(self, model, captured, monkeypatch, options, lookup):
        """Seven prompts in five rows that end at different steps: batches of every size, in buckets that are larger."""
        prompts = [*prompts_of(PHI_2, 3, 12, 1, 9, 7), [5, 6] * 6, [9] * 4]
        replayed = Generator(model, rows=5).complete(prompts, max_length=28, lookup=lookup, **options)
        assert len(captured) == 4  # 1, 2, 4 and 8 rows
        assert all(graph.replays > 0 for graph, _ in captured)
        monkeypatch.undo()
        assert replayed == Generator(model, rows=5).complete(prompts, max_length=28, **options)

    def test_a_size_is_captured_once_and_for_all_samplings_of_a_kind(self, model, captured):
        engine, prompts = Generator(model), [[1], [2]]
        for temperature, seed in ((0.5, 1), (2.0, 2), (1.0, 3)):
            engine.generate(prompts, max_new_tokens=6, temperature=temperature, seed=seed)
        assert len(captured) == 1
        engine.generate(prompts, max_new_tokens=6, temperature=0)
        assert len(captured) == 2
        engine.generate(prompts, max_new_tokens=6, temperature=0, lookup=2)
        assert len(captured) == 3
        engine.generate(prompts * 4, max_new_tokens=6, temperature=0, lookup=2)
        assert len(captured) == 4  # more slots: other buffers

    @pytest.mark.parametrize(("lookup", "sequences"), [(8, 3), (4, 5), (31, 1), (0, 32)])
    def test_no_step_has_more_rows_than_read_the_weights_once(self, model, captured, monkeypatch, lookup, sequences):
        decode, rows = Phi.decode, []
        monkeypatch.setattr(Phi, "decode", lambda *a: rows.append(len(a[1])) or decode(*a))
        Generator(model, rows=32).generate([[5, 6] * 3] * sequences, max_new_tokens=3, temperature=0, lookup=lookup)
        assert 32 - (1 + lookup) < max(rows) <= 32

    def test_an_interrupted_change_of_rows_is_made_up_for(self, model, captured, monkeypatch):
        """What the next step serves is what it was asked for, and not what the one that was interrupted had sent."""
        batch = DecodeBatch(model, 2, 64, 131)
        for slot, prompt in enumerate(([1, 2, 1], [3])):
            batch.begin(slot, prompt, 20, slot, batch.prefill(slot, prompt, 0))
        batch.step([0])
        sent = batch._sent

        def interrupted(values):
            batch._rows.fill_(1)
            raise KeyboardInterrupt

        monkeypatch.setattr(batch, "_sent", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step([1])
        monkeypatch.setattr(batch, "_sent", sent)
        before = batch._state[0].tolist()
        batch.step([0])
        assert batch._state[0].tolist() == [before[0] + 1, before[1]]

    def test_graphs_of_one_batch_share_their_memory(self, model, captured):
        Generator(model).generate(prompts_of(PHI_2, 1, 2, 3), max_length=8)
        assert [pool for _, pool in captured] == [None, "pool", "pool"]

    def test_values_reach_a_captured_step(self, model, captured):
        """Another temperature, seed or prompt without another capture gives what it gives on its own."""
        engine = Generator(model)
        for prompt, options in (([1], {"seed": 1}), ([1], {"seed": 2}), ([2], {"temperature": 0.3})):
            expected = Generator(model).complete([prompt], max_new_tokens=9, **options)
            assert engine.complete([prompt], max_new_tokens=9, **options) == expected

    def test_moved_weights_are_captured_anew(self, captured):
        model = random_model(PHI_2)
        engine = Generator(model)
        engine.generate([[1]], max_new_tokens=6)
        model.head_w = torch.nn.Parameter(-model.head_w.detach())
        expected = Generator(model).complete([[1]], max_new_tokens=6)
        assert engine.complete([[1]], max_new_tokens=6) == expected
        assert len(captured) == 3


class _Looks(TorchDispatchMode):
    """Notes the operators whose result has a size, or is a number, that only the device knows."""

    OPERATORS = (
        "local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave",
        "is_nonzero",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        by_mask = name.strip("_").startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])
        )
        if by_mask or name.strip("_").startswith(self.OPERATORS):
            self.found.append(name)
        return operator(*args, **kwargs or {})


class TestSteps:
    @pytest.mark.parametrize(
        "look",
        [
            lambda t: t[t > 1],
            lambda t: t.masked_select(t > 1),
            lambda t: t.index_put_((t > 1,), t[:1]),
            torch.nonzero,
            lambda t: t[0].item(),
            torch.unique,
        ],
    )
    def test_a_look_would_be_noticed(self, look):
        with _Looks() as inside:
            look(torch.arange(3))
        assert inside.found

    def test_a_step_looks_at_no_value(self, model, monkeypatch):
        """On a GPU each look would be a wait. The model's decode is the kernels' business, and left out."""
        batch = DecodeBatch(model, 4, 64, 131)
        batch.configure(generator.Sampling(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1), 2)
        for slot, prompt in enumerate(([1, 2, 1], [3])):
            batch.begin(slot, prompt, 20, slot, torch.zeros(1, 131))
        logits = torch.randn(6, 131)
        monkeypatch.setattr(Phi, "decode", lambda *_: logits)
        looks = []
        for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
            plain = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *a, plain=plain, name=name: looks.append(name) or plain(*a))
        with _Looks() as inside:
            batch._advance(torch.tensor([0, 1]))
        assert looks == inside.found == []
        torch.zeros(1).item()
        assert looks == ["item"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_allocation_grows_with_the_length(self, dtype):
        """But for one in torch: its sum of bf16 rows widens the weights, 4 bytes for each head and position."""
        model = random_model(PHI_2, dtype)
        batch, allocated = DecodeBatch(model, 1, 64, 131), []
        batch.begin(0, [1], 64, 0, batch.prefill(0, [1], 0))
        activities = [torch.profiler.ProfilerActivity.CPU]
        for _ in range(40):
            batch.step([0])
        for _ in range(6):
            with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as run:
                batch.step([0])
            sizes = [event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
            allocated.append(sum(size for size in sizes if size > 0))
        grown = {after - before for before, after in itertools.pairwise(allocated)}
        assert grown == {0 if dtype == torch.float32 else 4 * PHI_2.layers * PHI_2.heads}

    def test_rows_begin_at_multiples_of_16_bytes_and_hold_no_id_without_a_token(self, model, monkeypatch):
        """A GPU's softmax gives a row other bits where they do not: they would depend on its place in the batch."""
        plain, found = decode_batch.process, []
        monkeypatch.setattr(decode_batch, "process", lambda logits, *rest: found.append(logits) or plain(logits, *rest))
        Generator(model, valid_ids=101).generate(prompts_of(PHI_2, 3, 5), max_new_tokens=2, repetition_penalty=1.2)
        logits = torch.stack(found[:2])  # of the first tokens, drawn one by one
        assert logits.is_contiguous()
        assert logits.stride(1) * logits.itemsize % 16 == 0
        assert torch.equal(logits.isneginf(), (torch.arange(logits.shape[2]) >= 101).expand_as(logits))

    def test_buffers_outlive_inference_mode(self, model):
        engine, prompts = Generator(model), prompts_of(PHI_2, 3, 5)
        with torch.inference_mode():
            inside = engine.generate(prompts, max_new_tokens=4, repetition_penalty=1.2)
        assert engine.generate(prompts, max_new_tokens=4, repetition_penalty=1.2) == inside

    def test_a_record_keeps_what_it_was_given(self):
        values = torch.tensor([[2.0, 1.0, 7.0, 8.0, 0.0, -0.5, -1.5, 0.0], [1.0, 0.0, 9.0, 0.0, 0.0, -2.5, 0.0, 0.0]])
        values = values.double()
        record = Record(values, 1)
        values.zero_()
        assert record.read() == [([7, 8], [-0.5, -1.5], 1)]

    def test_log_probabilities_are_the_models_own(self, model):
        """Whatever the sampling: of the softmax over valid ids alone."""
        prompt, valid_ids = prompts_of(PHI_2, 9)[0], 100
        options = {"temperature": 0.5, "top_k": 4, "repetition_penalty": 1.3, "seed": 2, "max_new_tokens": 12}
        completion = Generator(model, valid_ids=valid_ids).complete([prompt], **options)[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1, :valid_ids]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture
    def model(self) -> Phi:
        return random_model(PHI_2, torch.bfloat16).cuda()

    PROMPTS = (*prompts_of(PHI_2, 3, 12, 1, 9, 7), [5, 6] * 6, [9] * 4)

    @pytest.mark.parametrize("lookup", [0, 3])
    @pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
    def test_completions_are_those_without_graphs(self, model, monkeypatch, options, lookup):
        replayed = Generator(model, rows=5)
        first = replayed.complete(self.PROMPTS, max_length=28, lookup=lookup, **options)
        assert sorted(replayed._idle._graphs) == [1, 2, 4, 8]
        assert replayed.complete(self.PROMPTS, max_length=28, lookup=lookup, **options) == first
        monkeypatch.setattr(decode_batch, "CAPTURES", set())
        assert Generator(model, rows=5).complete(self.PROMPTS, max_length=28, **options) == first

    def test_memory_is_fixed_after_the_first_call(self, model):
        engine, allocated = Generator(model, rows=5), []
        for seed in range(3):
            engine.generate(self.PROMPTS, max_length=28, seed=seed)
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
        assert allocated[0] == allocated[1] == allocated[2]

    def test_nobody_waits(self, model):
        engine = Generator(model, rows=5)
        expected = engine.complete(self.PROMPTS, max_length=28, lookup=2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert engine.complete(self.PROMPTS, max_length=28, lookup=2) == expected
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_check_that_nobody_waits_can_fail(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                torch.ones(1, device="cuda").item()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_too_little_memory_is_one_line(self):
        with pytest.raises(InputError, match=r"65536 rows of 2048 tokens need 43980.47 GB.* would fit"):
            KVCache.allocate(PhiConfig.from_preset("phi-2"), 1 << 16, 2048, device="cuda", dtype=torch.bfloat16)
